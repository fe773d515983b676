package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// crashes is how many times the control plane is killed.
const crashes = 50

// TestCrash kills the control plane at random moments during pushes. After each
// restart the state must be that of the last acknowledged push, or of the push that
// was under way: all of it, in the store, in the source's status and in Git.
func TestCrash(t *testing.T) {
	c := newCrashWorld(t)
	c.start(t)
	c.git(t, "", "clone", "-q", "decree://"+c.address+"/cluster", c.repo)
	acked, span := 0, 300*time.Millisecond
	interrupted := 0
	for n := 1; n <= crashes; n++ {
		c.write(t, n)
		c.git(t, c.repo, "add", "-A")
		c.git(t, c.repo, "commit", "-qm", fmt.Sprint("value ", n))
		begun := time.Now()
		push := c.command("git", "-C", c.repo, "push", "-q", "origin", "HEAD:main")
		if err := push.Start(); err != nil {
			t.Fatal(err)
		}
		killed := make(chan struct{})
		delay := time.Duration(rand.Int64N(int64(span)))
		time.AfterFunc(delay, func() { _ = c.server.Process.Kill(); close(killed) }) // the random moment is the test
		err := push.Wait()
		if err == nil {
			span = (span + 2*time.Since(begun)) / 2 // keep the moments inside the push
		}
		<-killed
		_ = c.server.Wait()
		c.start(t)

		got := c.state(t)
		switch {
		case err == nil && got != n:
			t.Fatalf("push %d was acknowledged, after the crash (at %s) the state is that of push %d", n, delay, got)
		case err != nil && got != n && got != acked:
			t.Fatalf("push %d was cut off at %s; the state is that of push %d, want %d or %d", n, delay, got, acked, n)
		}
		if err != nil {
			interrupted++
		}
		acked = got
		if acked == 0 {
			continue // nothing was ever accepted: there is no branch yet
		}
		c.git(t, c.repo, "fetch", "-q", "origin")
		c.git(t, c.repo, "reset", "-q", "--hard", "origin/main")
		data, err := os.ReadFile(filepath.Join(c.repo, "value.cue"))
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("value: \"%d\"", acked); !strings.Contains(string(data), want) {
			t.Fatalf("Git and the store disagree: the branch holds %q, the store %s", data, want)
		}
	}
	t.Logf("%d crashes, %d of them cut a push off", crashes, interrupted)
	if interrupted == 0 {
		t.Error("no crash hit a push: the test proves nothing")
	}
}

// crashWorld is a control plane without an agent, and a clone of its repository.
type crashWorld struct {
	dir, data, repo, address string
	server                   *exec.Cmd
}

func newCrashWorld(t *testing.T) *crashWorld {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "decree-crash-")
	if err != nil {
		t.Fatal(err)
	}
	c := &crashWorld{dir: dir, data: filepath.Join(dir, "data"), repo: filepath.Join(dir, "repo")}
	t.Cleanup(func() {
		if c.server != nil {
			_ = c.server.Process.Kill()
			_ = c.server.Wait()
		}
		_ = os.RemoveAll(dir)
	})
	sh(t, built(t), "cp", "-a", "bin", dir)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.address = l.Addr().String()
	l.Close()
	return c
}

func (c *crashWorld) command(args ...string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "DECREE_DATA="+c.data, "PATH="+c.dir+"/bin:"+os.Getenv("PATH"), "HOME="+c.dir, "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=Ada", "GIT_AUTHOR_EMAIL=ada@example.com", "GIT_COMMITTER_NAME=Ada", "GIT_COMMITTER_EMAIL=ada@example.com")
	return cmd
}

func (c *crashWorld) git(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := c.command(append([]string{"git"}, args...)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %s: %v\n%s\n%s", strings.Join(args, " "), err, out, c.evidence())
	}
}

// evidence is what a failure leaves: the files of the repository, and the end of the log.
func (c *crashWorld) evidence() string {
	files, _ := exec.Command("find", filepath.Join(c.data, "git"), "-type", "f", "-printf", "%T+ %s %p\n").CombinedOutput()
	log, _ := os.ReadFile(filepath.Join(c.dir, "log"))
	return fmt.Sprintf("files:\n%s\nlog:\n%s", files, log[max(0, len(log)-8<<10):])
}

// start runs the control plane and returns when it is ready.
func (c *crashWorld) start(t *testing.T) {
	t.Helper()
	c.server = c.command(filepath.Join(c.dir, "bin/decree"), "up", "--agent=false", "--address", c.address)
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	c.server.Stderr = log
	c.server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := c.server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.server.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan bool, 1)
	go func() {
		found := false
		for s := bufio.NewScanner(out); s.Scan(); {
			if strings.HasPrefix(s.Text(), "ready") && !found {
				found = true
				ready <- true
			}
		}
		if !found {
			ready <- false
		}
	}()
	select {
	case ok := <-ready:
		if ok {
			return
		}
	case <-time.After(30 * time.Second):
	}
	data, _ := os.ReadFile(filepath.Join(c.dir, "log"))
	t.Fatalf("the control plane is not ready:\n%s", data)
}

// values is how many objects one push changes.
const values = 20

// write makes the tree of push n: objects that all hold the same value.
func (c *crashWorld) write(t *testing.T, n int) {
	t.Helper()
	tree := fmt.Sprintf(`package crash

value: "%d"

objects: [for i in [%s] {
	apiVersion: "v1"
	kind:       "ConfigMap"
	metadata: name: "value-\(i)"
	data: "value": value
}]
`, n, numbers(values))
	if err := os.WriteFile(filepath.Join(c.repo, "value.cue"), []byte(tree), 0o644); err != nil {
		t.Fatal(err)
	}
}

func numbers(n int) string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprint(i)
	}
	return strings.Join(list, ",")
}

// state returns the value that all objects hold, 0 when there are none, and fails
// if they differ: a commit is all or nothing.
func (c *crashWorld) state(t *testing.T) int {
	t.Helper()
	out, err := c.command(filepath.Join(c.dir, "bin/decree"), "get", "configmaps", "-o", "json").Output()
	if err != nil {
		t.Fatalf("get configmaps: %v", err)
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Data     map[string]string
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("get configmaps: %v\n%s", err, out)
	}
	seen, value := 0, 0
	for _, cm := range list.Items {
		if !strings.HasPrefix(cm.Metadata.Name, "value-") {
			continue
		}
		var v int
		fmt.Sscan(cm.Data["value"], &v)
		if seen > 0 && v != value {
			t.Fatalf("half a commit: %s holds %d, others %d", cm.Metadata.Name, v, value)
		}
		seen, value = seen+1, v
	}
	if seen != 0 && seen != values {
		t.Fatalf("half a commit: %d of %d objects", seen, values)
	}
	return value
}
