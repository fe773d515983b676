package raftsim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore/raftsim"
)

// A seed runs in a process of its own, which is made to always run alike: one processor,
// no preemption, no garbage collection, no clock, and the randomness that the runtime
// begins with (for select, maps and timers) replaced. While the program starts its threads
// run in a fixed order (startup), and then only one of them does.

const (
	jobVar    = "RAFTSIM_JOB"
	resultTag = "raftsim result: "
	traceFile = "trace"
	traceRoom = 64 << 20 // bytes
)

// TestChild is the child.
func TestChild(t *testing.T) {
	text := os.Getenv(jobVar)
	if text == "" {
		t.Skip("only in the processes that other tests start")
	}
	var o raftsim.Options
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	// Every run is traced, into a file and without allocating, so that all are alike: a run
	// depends on where in memory things are, because maps are keyed by pointers.
	file, err := unix.Open(traceFile, unix.O_CREAT|unix.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	room := traceRoom
	o.Trace = func(line []byte) {
		if room -= len(line); room > 0 {
			unix.Write(file, line)
		}
	}
	cryptotest.SetGlobalRandom(t, o.Seed)
	rand.Seed(int64(o.Seed)) //lint:ignore SA1019 hashicorp/raft draws its timeouts from the global source
	synctest.Test(t, func(t *testing.T) {
		begin()
		thread := unix.Gettid()
		out, err := json.Marshal(raftsim.Run(o))
		if err != nil {
			t.Fatal(err)
		}
		if unix.Gettid() != thread {
			t.Fatal("this ended on another thread than it began: it would not run alike again")
		}
		fmt.Printf("%s%s\n", resultTag, out)
		// Servers that crashed may be about to end still, and hashicorp/raft leaves
		// goroutines behind that never do.
		os.Exit(0)
	})
}

// childTime is how long a child may take, in real time: a thousand times what it needs.
const childTime = time.Minute

// runChild runs a seed in a child. keep, when not nil, decides whether the trace of every
// event is kept in a file, which is then named.
func runChild(o raftsim.Options, keep func(*raftsim.Report, error) bool) (r *raftsim.Report, trace string, err error) {
	dir, err := os.MkdirTemp(memory(), fmt.Sprintf("raftsim-%d-", o.Seed))
	if err != nil {
		return nil, "", err
	}
	defer os.RemoveAll(dir)
	if r, err = startChild(o, dir); err != nil {
		err = fmt.Errorf("run seed %d: %w", o.Seed, err)
	}
	if keep != nil && keep(r, err) {
		data, readErr := os.ReadFile(filepath.Join(dir, traceFile))
		trace = filepath.Join(os.TempDir(), filepath.Base(dir)+".trace")
		err = errors.Join(err, readErr, os.WriteFile(trace, data, 0o600))
	}
	return r, trace, err
}

// The programs that children run.
var (
	thisVersion = sync.OnceValues(func() (*os.File, error) {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		return inMemory(self)
	})
	// nextVersion is these tests with what stands in for the next version of decree.
	nextVersion = sync.OnceValues(func() (*os.File, error) {
		dir, err := os.MkdirTemp("", "raftsim-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		file := filepath.Join(dir, "next.test")
		if out, err := exec.Command("go", "test", "-c", "-tags", "decree_next_format", "-o", file, ".").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build the next version: %w\n%s", err, out)
		}
		return inMemory(file)
	})
)

// inMemory copies a program to where its name is always the same: a program knows the name
// of its file, and where its memory is depends on how long that is.
func inMemory(program string) (*os.File, error) {
	from, err := os.Open(program)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	fd, err := unix.MemfdCreate("raftsim", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "raftsim")
	_, err = io.Copy(f, from)
	return f, err
}

func startChild(o raftsim.Options, dir string) (*raftsim.Report, error) {
	o.Dir = "."
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	program := thisVersion
	if o.Upgrade {
		program = nextVersion
	}
	file, err := program()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), childTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/fd/3", "-test.run=^TestChild$", "-test.timeout=0")
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGQUIT) } // tells where it hangs
	cmd.WaitDelay = childTime / 10
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Dir, cmd.ExtraFiles = dir, []*os.File{file}
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1,memprofilerate=0,randseednop=0", jobVar + "=" + string(text)}
	err = runAlike(cmd, o.Seed)
	if text, ok := after(stdout.String(), resultTag); ok && err == nil {
		r := new(raftsim.Report)
		return r, json.Unmarshal([]byte(text), r)
	}
	return nil, fmt.Errorf("no result: %w\n%s%s", err, stdout.String(), tail(stderr.String()))
}

// after returns the rest of the line that has a tag.
func after(text, tag string) (string, bool) {
	_, rest, ok := strings.Cut(text, tag)
	line, _, _ := strings.Cut(rest, "\n")
	return line, ok
}

func tail(s string) string { return s[max(0, len(s)-8000):] }

// memory is a folder in memory, if there is one.
func memory() string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		return "/dev/shm"
	}
	return ""
}
