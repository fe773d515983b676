package raftsim_test

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

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
	if err := stopClock(pid); err != nil {
		return 0, fmt.Errorf("stop the clock of the child: %w", err)
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
	const atRandom = 25
	at, err := auxiliary(pid, atRandom)
	if err != nil {
		return err
	}
	bytes := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, seed+1), ^seed)
	_, err = unix.PtracePokeData(pid, at, bytes)
	return err
}

// stopClock makes the real clock of a process that was just started stand still, where
// the code for that is known. Nothing in a run depends on how late it is, but the Go
// runtime asks how much time has passed: a mutex that was waited for longer than 1 ms is
// handed over in another way.
func stopClock(pid int) error {
	code, ok := map[string][]byte{"amd64": {
		0x48, 0xc7, 0x06, 0x00, 0xca, 0x9a, 0x3b, // movq $1000000000, (%rsi): the seconds
		0x48, 0xc7, 0x46, 0x08, 0x00, 0x00, 0x00, 0x00, // movq $0, 8(%rsi): the nanoseconds
		0x31, 0xc0, // xorl %eax, %eax
		0xc3, // ret
	}}[runtime.GOARCH]
	if !ok {
		return nil
	}
	const atVDSO = 33
	at, err := auxiliary(pid, atVDSO)
	if err != nil {
		return err
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer memory.Close()
	library, err := elf.NewFile(io.NewSectionReader(memory, int64(at), 1<<20))
	if err != nil {
		return err
	}
	symbols, err := library.DynamicSymbols()
	if err != nil {
		return err
	}
	for _, s := range symbols {
		if s.Name == "__vdso_clock_gettime" {
			_, err := unix.PtracePokeText(pid, at+uintptr(s.Value), code)
			return err
		}
	}
	return errors.New("the kernel gave no clock")
}

// auxiliary returns one of the values that the kernel gives a program.
func auxiliary(pid int, tag uint64) (uintptr, error) {
	vector, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", pid))
	if err != nil {
		return 0, err
	}
	for ; len(vector) >= 16; vector = vector[16:] {
		if binary.NativeEndian.Uint64(vector) == tag {
			return uintptr(binary.NativeEndian.Uint64(vector[8:])), nil
		}
	}
	return 0, fmt.Errorf("the kernel gave no auxiliary value %d", tag)
}
