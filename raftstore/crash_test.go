package raftstore_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// childVariable makes the test binary a process that proposes until it is killed.
const childVariable = "RAFTSTORE_TEST_CHILD"

// childMain is the life of such a process: it prints the name of every transaction
// that was acknowledged, and the next line only after that.
func childMain() bool {
	dir, run, ok := strings.Cut(os.Getenv(childVariable), "|")
	if !ok {
		return false
	}
	cfg := config(dir)
	cfg.SnapshotThreshold, cfg.SnapshotInterval, cfg.TrailingLogs = 40, 20e6, 10
	s, err := raftstore.Open(cfg)
	if err == nil {
		err = s.WaitReady(context.Background())
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	var out sync.Mutex
	var wg sync.WaitGroup
	for p := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				name := fmt.Sprintf("r%s-%d-%d", run, p, i)
				r, err := s.Propose(context.Background(), create(configMap(name, "x"), configMap(name+"-twin", "x")))
				if err != nil || r.Err() != nil {
					fmt.Println("error:", err, r.Err())
					os.Exit(1)
				}
				out.Lock()
				fmt.Println(name)
				out.Unlock()
			}
		})
	}
	wg.Wait()
	return true
}

// TestKill kills a process in the middle of proposals, again and again: everything
// that was acknowledged is there afterwards, and no transaction by half.
func TestKill(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	acknowledged := map[string]bool{}
	for run := range 6 {
		for _, name := range killed(t, dir, run, 20+rand.IntN(150)) {
			acknowledged[name] = true
		}
		s := open(t, config(dir))
		for name := range acknowledged {
			if _, ok := s.View().Get(api.KeyOf(configMap(name, ""))); !ok {
				t.Fatalf("run %d: %s was acknowledged and is gone", run, name)
			}
		}
		for o := range s.View().List(api.ConfigMaps, "") {
			if _, ok := s.View().Get(api.KeyOf(configMap(o.GetName()+"-twin", ""))); !ok && !strings.HasSuffix(o.GetName(), "-twin") {
				t.Fatalf("run %d: %s is there without its twin", run, o.GetName())
			}
		}
		t.Logf("run %d: %d acknowledged, %d objects", run, len(acknowledged), s.View().Len(api.ConfigMaps))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// killed runs a child until it has acknowledged n transactions, kills it, and
// returns all that it acknowledged.
func killed(t *testing.T, dir string, run, n int) (names []string) {
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%d", childVariable, dir, run))
	child.Stderr = os.Stderr
	stdout, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			break // a cut line was not acknowledged
		}
		if strings.HasPrefix(line, "error:") {
			t.Errorf("child: %s", line)
			break
		}
		if names = append(names, strings.TrimSpace(line)); len(names) == n {
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	child.Wait() // killed
	if len(names) < n {
		t.Fatalf("the child ended after %d of %d transactions", len(names), n)
	}
	return names
}
