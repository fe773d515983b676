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

	"golang.org/x/sys/unix"
)

// begin is called by a program that was started with [runAlike] where all threads but the
// one that calls it have come to rest, and what is to be alike begins. It returns at once.
func begin() { unix.Getppid() } // a call that nothing in the start of a Go program makes

// runAlike runs a Go program such that it does the same every time. The program must call
// [begin]; one that ends before was not started alike, and is an error.
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

// prepare brings a process that was just started to where it calls begin, and lets it go,
// without its monitor thread, whose id it returns.
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
	var processors, one unix.CPUSet
	if err := unix.SchedGetaffinity(pid, &processors); err != nil {
		return 0, fmt.Errorf("ask for the child's processors: %w", err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if processors.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	// The runtime counts its processors when it starts, and waits in other ways with one.
	if err := unix.SchedSetaffinity(pid, &one); err != nil {
		return 0, fmt.Errorf("give the child one processor: %w", err)
	}
	// With EXITKILL, a child never outlives who started it.
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_EXITKILL); err != nil {
		return 0, fmt.Errorf("trace the child: %w", err)
	}
	s := startup{pid: pid, running: pid}
	if err := s.run(); err != nil {
		return 0, fmt.Errorf("start the child, one thread at a time: %w", err)
	}
	if err := unix.SchedSetaffinity(s.running, &processors); err != nil {
		return 0, fmt.Errorf("give the child all processors: %w", err)
	}
	if err := s.detach(); err != nil {
		return 0, fmt.Errorf("let the child go: %w", err)
	}
	return s.monitor, nil
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
