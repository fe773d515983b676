package seal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"decree.dev/decree/raftstore/seal/internal/faultfs"
)

// TestFailpoints ends a process before each step that makes something durable: what was
// acknowledged is there, and the same folder goes on.
func TestFailpoints(t *testing.T) {
	t.Parallel()
	var whole promises
	whole.run(t, "scenario", t.TempDir(), 0, 0)
	if whole.problem != "" {
		t.Fatal(whole.problem)
	}
	for _, want := range []string{
		"bolt.close", "bolt.rename", "master.write", "master.fsync", "master.rename", "master.syncdir", "keyring.fsync", "keyring.rename",
		"keyring.syncdir", "mark.fsync", "snapshot.begin", "snapshot.fsync", "snapshot.rename", "snapshot.syncdir", "snapshot.remove",
	} {
		if !slices.Contains(whole.steps, want) {
			t.Errorf("the scenario does not reach %s", want)
		}
	}
	step := 1
	if testing.Short() {
		step = 7
	}
	for n := 1; n <= len(whole.steps); n += step {
		dir := t.TempDir()
		var p promises
		p.run(t, "scenario", dir, n, 0)
		if len(p.steps) != n {
			t.Fatalf("the child ended after %d of %d steps: %s", len(p.steps), n, p.problem)
		}
		t.Logf("crash %d before %s: %d entries", n, p.steps[n-1], len(p.entries))
		p.wantKept(t, dir)
		p.run(t, "scenario", dir, 0, 0)
		if p.problem != "" {
			t.Fatalf("after a crash before %s: %s", whole.steps[n-1], p.problem)
		}
		p.wantKept(t, dir)
	}
}

// TestFailpointsPowerCut cuts the power where TestFailpoints ends the process only.
func TestFailpointsPowerCut(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	step := 1
	if testing.Short() {
		step = 9
	}
	for n := 1; ; n += step {
		f := &faultfs.FS{}
		at := mounted(t, f, t.TempDir())
		var p promises
		p.run(t, "scenario", filepath.Join(at, "data"), n, 0)
		if p.problem != "" {
			t.Fatal(p.problem)
		}
		left := t.TempDir()
		if err := errors.Join(f.Crash(r, left), f.Unmount()); err != nil {
			t.Fatal(err)
		}
		p.wantKept(t, filepath.Join(left, "data"))
		if len(p.steps) < n { // the scenario went through
			return
		}
	}
}

// mounted returns a faulty file system, mounted over the files in live.
func mounted(t *testing.T, f *faultfs.FS, live string) (at string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a file system")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
	at = t.TempDir()
	if err := f.Mount(live, at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Unmount() })
	return at
}

// TestPowerCut cuts the power under a writing process, again and again: what was not
// synced is lost in part, the last writes are torn.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	rounds := 40
	if testing.Short() {
		rounds = 4
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	live := t.TempDir()
	var p promises
	for round := range rounds {
		f := &faultfs.FS{}
		at := mounted(t, f, live)
		p.run(t, "append", filepath.Join(at, "data"), round+1, 1+r.IntN(200))
		if p.problem != "" {
			t.Fatalf("round %d: %s", round, p.problem)
		}
		left := t.TempDir()
		if err := f.Crash(r, left); err != nil {
			t.Fatal(err)
		}
		if err := f.Unmount(); err != nil {
			t.Fatal(err)
		}
		p.wantKept(t, filepath.Join(left, "data"))
		live = left
	}
	t.Logf("%d entries were acknowledged", p.count)
}

// TestLostSyncs: on a disk that lies about syncs what was acknowledged can be gone, but
// what is there is what was written, or the damage is noticed.
func TestLostSyncs(t *testing.T) {
	t.Parallel()
	rounds := 30
	if testing.Short() {
		rounds = 3
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	noticed := 0
	for range rounds {
		var honest promises
		live := t.TempDir()
		honest.run(t, "append", filepath.Join(live, "data"), 1, 100) // kill -9 only
		honest.wantKept(t, filepath.Join(live, "data"))
		f := &faultfs.FS{Lie: func(string) bool { return rand.IntN(3) == 0 }}
		at := mounted(t, f, live)
		var p promises
		p.run(t, "append", filepath.Join(at, "data"), 2, 1+r.IntN(150))
		left := t.TempDir()
		if err := f.Crash(r, left); err != nil {
			t.Fatal(err)
		}
		if err := f.Unmount(); err != nil {
			t.Fatal(err)
		}
		if _, err := wantTrue(t, filepath.Join(left, "data")); err != nil {
			noticed++
		}
	}
	t.Logf("the damage of %d of %d rounds was noticed", noticed, rounds)
}

// TestDiskTrouble makes the calls under the log fail.
func TestDiskTrouble(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, op, file string
		errno          syscall.Errno
		want           error
		goesOn         bool
	}{
		{"no room for pages", "write", logFile, syscall.ENOSPC, ErrNoSpace, true},
		{"over quota", "write", logFile, syscall.EDQUOT, ErrNoSpace, true},
		{"bad sector", "write", logFile, syscall.EIO, ErrDisk, false},
		{"failed sync", "fsync", logFile, syscall.EIO, ErrDisk, false},
		{"no room at sync", "fsync", logFile, syscall.ENOSPC, ErrDisk, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := trouble(t, fmt.Sprintf("%s %s %d", c.op, c.file, c.errno))
			want := fmt.Sprintf("matches %v, goes on %v, kept true\n", c.want, c.goesOn)
			if out != want {
				t.Fatalf("got %q, want %q", out, want)
			}
		})
	}
}

// TestSlowSyncs: syncs that take long under the log are seen, and harm nothing.
func TestSlowSyncs(t *testing.T) {
	live := t.TempDir()
	f := &faultfs.FS{Fault: func(op, path string) syscall.Errno {
		if op == "fsync" && filepath.Base(path) == logFile {
			time.Sleep(20 * time.Millisecond)
		}
		return 0
	}}
	at := mounted(t, f, live)
	var p promises
	p.run(t, "slow", filepath.Join(at, "data"), 0, 0)
	if p.problem != "" {
		t.Fatal(p.problem)
	}
	p.wantKept(t, filepath.Join(live, "data"))
}

func trouble(t *testing.T, what string) string {
	t.Helper()
	var op, file string
	var errno syscall.Errno
	fmt.Sscan(what, &op, &file, &errno)
	switchFile := filepath.Join(t.TempDir(), "fail")
	f := &faultfs.FS{Fault: func(gotOp, path string) syscall.Errno {
		_, err := os.Stat(switchFile)
		if gotOp == op && filepath.Base(path) == file && err == nil {
			return errno
		}
		return 0
	}}
	at := mounted(t, f, t.TempDir())
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), fmt.Sprintf("%s=trouble|%s|0", childVariable, at), "SEAL_TEST_SWITCH="+switchFile)
	child.Stderr = os.Stderr
	out, err := child.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}
