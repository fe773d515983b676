package raftsim_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand"
	rand2 "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore/raftsim"
)

// A seed runs in a process of its own, which is made to always run alike: one processor,
// no preemption, no garbage collection, no clock, and the randomness that the runtime
// begins with (for select, maps and timers) replaced. The runtime's monitor thread, which
// preempts by the real clock, is stopped before it does anything.
//
// What cannot be had is that the program always starts alike: its threads take turns as
// the kernel likes, so memory is handed out in another order now and then, and that
// decides the order of maps that are keyed by pointers, as those of contexts are. So each
// run says how it started, and whoever wants it again starts until it starts like that.

const (
	jobVar    = "RAFTSIM_JOB"
	startTag  = "raftsim start: "
	resultTag = "raftsim result: "
	traceFile = "trace"
	traceRoom = 64 << 20 // bytes
)

// job is what a child is to do.
type job struct {
	raftsim.Options
	Start string // how it must have started, anyStart if that does not matter
}

// anyStart is as long as any other: memory depends on it.
const anyStart = "................"

// result is what a child says.
type result struct {
	raftsim.Report
	Start string // with the seed, all that the run depends on
}

// TestChild is the child.
func TestChild(t *testing.T) {
	text := os.Getenv(jobVar)
	if text == "" {
		t.Skip("only in the processes that other tests start")
	}
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		t.Fatal(err)
	}
	// Every run is traced, into a file and without allocating, so that all are alike: a run
	// depends on where in memory things are, because maps are keyed by pointers.
	file, err := unix.Open(traceFile, unix.O_CREAT|unix.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	o, room := j.Options, traceRoom
	o.Trace = func(line []byte) {
		if room -= len(line); room > 0 {
			unix.Write(file, line)
		}
	}
	cryptotest.SetGlobalRandom(t, o.Seed)
	rand.Seed(int64(o.Seed)) //lint:ignore SA1019 hashicorp/raft draws its timeouts from the global source
	freshThread(t)
	thread := unix.Gettid()
	synctest.Test(t, func(t *testing.T) {
		start := howItStarted()
		if j.Start != anyStart && j.Start != start {
			t.Fatal(sayStart)
		}
		fmt.Printf("%s%s\n", startTag, start)
		out, err := json.Marshal(result{*raftsim.Run(o), start})
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

// threads is more than a program has when it has started.
const threads = 16

// freshThread makes goroutines run on the thread that was started as number 16, by
// keeping all others busy: each thread has random numbers of its own, which follow from
// its number, and how many threads there are and what they used of theirs while the
// program started is a matter of chance.
func freshThread(t *testing.T) {
	started := pprof.Lookup("threadcreate")
	for started.Count() < threads {
		locked := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(locked)
			select {}
		}()
		<-locked
		runtime.Gosched()
	}
	if n := started.Count(); n != threads {
		t.Fatalf("%d threads", n)
	}
	ids, _ := filepath.Glob("/proc/self/task/*")
	newest := 0
	for _, id := range ids {
		n, _ := strconv.Atoi(filepath.Base(id))
		newest = max(newest, n)
	}
	if newest != unix.Gettid() {
		t.Fatal(sayThread)
	}
}

// howItStarted tells where the next memory will come from, of every size and for every
// purpose, and which random numbers come next. Two children of a seed that answer the
// same run alike.
func howItStarted() string {
	sum := fnv.New64a()
	note := func(v uint64) { sum.Write(binary.LittleEndian.AppendUint64(nil, v)) }
	for size := 8; size <= 64<<10; size += max(8, size/8) {
		data, pointers := make([]byte, size), make([]*byte, size/8)
		note(uint64(uintptr(unsafe.Pointer(unsafe.SliceData(data)))))
		note(uint64(uintptr(unsafe.Pointer(unsafe.SliceData(pointers)))))
	}
	stacks := make(chan uint64)
	for range 32 {
		go func() {
			var here byte
			stacks <- uint64(uintptr(unsafe.Pointer(&here)))
		}()
		note(<-stacks)
	}
	open := make(chan struct{})
	close(open)
	for range 64 {
		select { // draws, as the run does
		case <-open:
			note(0)
		case <-open:
			note(1)
		}
	}
	note(rand2.Uint64())
	return fmt.Sprintf("%016x", sum.Sum64())
}

// childTime is how long a child may take, in real time: a thousand times what it needs.
const childTime = time.Minute

// What a child says that did not get the thread or the start it needs. It is started
// again: for a rare start, very often.
const (
	sayThread = "not on the newest thread"
	sayStart  = "another start"
	threadTry = 5
)

var (
	errThread = errors.New("did not get a thread of its own")
	errStart  = errors.New("did not start as asked")
)

// runChild runs a seed in a child, from the given start, which it tries to get for tries
// times. keep, when not nil, decides whether the trace of every event is kept in a file,
// which is then named.
func runChild(j job, tries int, keep func(*result, error) bool) (r *result, trace string, err error) {
	for thread := 0; thread < threadTry && tries > 0; {
		r, trace, err = tryChild(j, keep)
		switch {
		case errors.Is(err, errThread):
			thread++
		case errors.Is(err, errStart):
			thread = 0
			tries--
		case err != nil:
			return r, trace, fmt.Errorf("run seed %d: %w", j.Seed, err)
		default:
			return r, trace, nil
		}
	}
	return r, trace, fmt.Errorf("run seed %d: %w", j.Seed, err)
}

func tryChild(j job, keep func(*result, error) bool) (_ *result, trace string, err error) {
	dir, err := os.MkdirTemp(memory(), fmt.Sprintf("raftsim-%d-", j.Seed))
	if err != nil {
		return nil, "", err
	}
	defer os.RemoveAll(dir)
	r, err := startChild(j, dir)
	if errors.Is(err, errThread) || errors.Is(err, errStart) {
		return nil, "", err
	}
	if keep != nil && keep(r, err) {
		data, readErr := os.ReadFile(filepath.Join(dir, traceFile))
		trace = filepath.Join(os.TempDir(), filepath.Base(dir)+".trace")
		err = errors.Join(err, readErr, os.WriteFile(trace, data, 0o600))
	}
	return r, trace, err
}

// nextVersion builds these tests with what stands in for the next version of decree.
var nextVersion = sync.OnceValues(func() (string, error) {
	file := filepath.Join(built, "next.test")
	if out, err := exec.Command("go", "test", "-c", "-tags", "decree_next_format", "-o", file, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the next version: %w\n%s", err, out)
	}
	return file, nil
})

// built is a folder for nextVersion.
var built string

func TestMain(m *testing.M) {
	if os.Getenv(jobVar) != "" {
		os.Exit(m.Run())
	}
	dir, err := os.MkdirTemp("", "raftsim-built-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func startChild(j job, dir string) (*result, error) {
	j.Dir = "." // a name that is always the same
	text, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err == nil && j.Upgrade {
		self, err = nextVersion()
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), childTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "-test.run=^TestChild$", "-test.timeout=0")
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGQUIT) } // tells where it hangs
	cmd.WaitDelay = childTime / 10
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Dir, cmd.Args[0] = dir, "raftsim"
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1,memprofilerate=0,randseednop=0", jobVar + "=" + string(text)}
	err = runAlike(cmd, j.Seed)
	if text, ok := after(stdout.String(), resultTag); ok && err == nil {
		r := new(result)
		return r, json.Unmarshal([]byte(text), r)
	}
	switch {
	case strings.Contains(stdout.String(), sayThread):
		return nil, errThread
	case strings.Contains(stdout.String(), sayStart):
		return nil, errStart
	}
	start, _ := after(stdout.String(), startTag)
	return nil, fmt.Errorf("no result, start %s: %w\n%s%s", start, err, stdout.String(), tail(stderr.String()))
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
