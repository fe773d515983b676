package raftsim_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore/raftsim"
)

// A seed runs in a process of its own, which is made to always run alike: one processor,
// no preemption, no garbage collection, and the randomness that the runtime begins with
// (for select, maps and timers) replaced. What is left is the runtime's monitor thread,
// which preempts by the real clock: it is stopped before it does anything.

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
	freshThread(t)
	thread := unix.Gettid()
	synctest.Test(t, func(t *testing.T) {
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
		t.Fatal(errThread)
	}
}

// childTime is how long a child may take, in real time: a thousand times what it needs.
const childTime = time.Minute

// errThread is what a child says that did not get the thread it needs. It is started again.
const errThread = "not on the newest thread"

// runChild runs a seed in a child. keep, when not nil, decides whether the trace of every
// event is kept in a file, which is then named.
func runChild(o raftsim.Options, keep func(*raftsim.Report, error) bool) (report *raftsim.Report, trace string, err error) {
	for range 5 {
		if report, trace, err = tryChild(o, keep); err == nil || !strings.Contains(err.Error(), errThread) {
			break
		}
	}
	if err != nil {
		err = fmt.Errorf("run seed %d: %w", o.Seed, err)
	}
	return report, trace, err
}

func tryChild(o raftsim.Options, keep func(*raftsim.Report, error) bool) (_ *raftsim.Report, trace string, err error) {
	dir, err := os.MkdirTemp(memory(), "raftsim-")
	if err != nil {
		return nil, "", err
	}
	defer os.RemoveAll(dir)
	report, err := startChild(o, dir)
	if keep != nil && keep(report, err) {
		data, readErr := os.ReadFile(filepath.Join(dir, traceFile))
		trace = filepath.Join(os.TempDir(), fmt.Sprintf("raftsim-%d.trace", o.Seed))
		err = errors.Join(err, readErr, os.WriteFile(trace, data, 0o600))
	}
	return report, trace, err
}

func startChild(o raftsim.Options, dir string) (*raftsim.Report, error) {
	o.Dir = "." // a name that is always the same
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
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
	cmd.Dir = dir
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1,memprofilerate=0,randseednop=0", jobVar + "=" + string(text)}
	err = runAlike(cmd, o.Seed)
	if _, result, ok := strings.Cut(stdout.String(), resultTag); ok && err == nil {
		line, _, _ := strings.Cut(result, "\n")
		report := new(raftsim.Report)
		return report, json.NewDecoder(strings.NewReader(line)).Decode(report)
	}
	return nil, fmt.Errorf("no result: %w\n%s%s", err, stdout.String(), tail(stderr.String()))
}

func tail(s string) string { return s[max(0, len(s)-8000):] }

// memory is a folder in memory, if there is one.
func memory() string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		return "/dev/shm"
	}
	return ""
}

// runAlike runs a Go program such that it does the same every time.
func runAlike(cmd *exec.Cmd, seed uint64) error {
	runtime.LockOSThread() // whoever traces a process is one thread
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := startUnshuffled(cmd); err != nil {
		return err
	}
	monitor, err := prepare(cmd.Process.Pid, seed)
	if err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	// The monitor ends with the process; until then it must stay with us.
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(monitor, &status, unix.WALL, nil)
		if err == nil && !status.Stopped() || err != nil && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return cmd.Wait()
}

// startUnshuffled starts cmd with its memory at the same addresses every time.
func startUnshuffled(cmd *exec.Cmd) error {
	const addrNoRandomize = 0x0040000
	old, _, errno := unix.Syscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0)
	if errno != 0 {
		return fmt.Errorf("ask for the personality: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_PERSONALITY, old|addrNoRandomize, 0, 0); errno != 0 {
		return fmt.Errorf("ask for fixed addresses: %w", errno)
	}
	defer unix.Syscall(unix.SYS_PERSONALITY, old, 0, 0)
	return cmd.Start()
}

// prepare brings a process that was just started to the point where its monitor thread
// is there, stopped for ever, and lets the others go. It returns the monitor's id.
func prepare(pid int, seed uint64) (monitor int, err error) {
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil || !status.Stopped() {
		return 0, fmt.Errorf("wait for the child: %v %w", status, err)
	}
	if err := plant(pid, seed); err != nil {
		return 0, fmt.Errorf("plant the seed: %w", err)
	}
	if err := settleOn(pid, int(seed)); err != nil {
		return 0, fmt.Errorf("give the child one processor: %w", err)
	}
	// With EXITKILL, a child never outlives who started it.
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
		return 0, fmt.Errorf("trace the child: %w", err)
	}
	for signal := 0; ; {
		if err := unix.PtraceCont(pid, signal); err != nil {
			return 0, fmt.Errorf("let the child go on: %w", err)
		}
		if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil || !status.Stopped() {
			return 0, fmt.Errorf("wait for the child's monitor: %v %w", status, err)
		}
		if status.TrapCause() == unix.PTRACE_EVENT_CLONE {
			break // the first thread that the runtime starts
		}
		signal = int(status.StopSignal())
	}
	id, err := unix.PtraceGetEventMsg(pid)
	if err != nil {
		return 0, fmt.Errorf("find the child's monitor: %w", err)
	}
	if _, err := unix.Wait4(int(id), &status, unix.WALL, nil); err != nil {
		return 0, fmt.Errorf("stop the child's monitor: %w", err)
	}
	if err := unix.PtraceDetach(pid); err != nil {
		return 0, fmt.Errorf("let the child go: %w", err)
	}
	return int(id), nil
}

// settleOn keeps a process on one processor, and lets none of its threads interrupt
// another one: how many threads the runtime starts would depend on that.
func settleOn(pid, n int) error {
	var have unix.CPUSet
	if err := unix.SchedGetaffinity(pid, &have); err != nil {
		return err
	}
	n %= have.Count()
	for cpu := 0; ; cpu++ {
		if !have.IsSet(cpu) {
			continue
		}
		if n == 0 {
			var one unix.CPUSet
			one.Set(cpu)
			if err := unix.SchedSetaffinity(pid, &one); err != nil {
				return err
			}
			break
		}
		n--
	}
	const batch = 3 // SCHED_BATCH
	var priority int32
	if _, _, errno := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, uintptr(pid), batch, uintptr(unsafe.Pointer(&priority))); errno != 0 {
		return errno
	}
	return nil
}

// plant overwrites the 16 random bytes that the kernel gives a program.
func plant(pid int, seed uint64) error {
	vector, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", pid))
	if err != nil {
		return err
	}
	const atRandom = 25
	for ; len(vector) >= 16; vector = vector[16:] {
		if binary.NativeEndian.Uint64(vector) != atRandom {
			continue
		}
		bytes := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, seed+1), ^seed)
		_, err := unix.PtracePokeData(pid, uintptr(binary.NativeEndian.Uint64(vector[8:])), bytes)
		return err
	}
	return errors.New("the kernel gave no random bytes")
}
