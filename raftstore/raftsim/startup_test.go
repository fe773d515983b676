package raftsim_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// startup runs the threads of a traced Go program one at a time, each until it waits for
// another one, and the one that has been able to go on for longest next. So which thread
// does what, and with it the order in which memory and random numbers are handed out, is
// no matter of chance, as it would be if the kernel chose.
//
// The first thread that the program starts, the runtime's monitor, is never run: it acts
// by the real clock.
type startup struct {
	pid     int
	running int // the thread whose turn it is; it is stopped when nobody waits for it
	monitor int
	begun   int       // the thread that has called begin, 0 as long as none has
	ready   []int     // could go on, but are stopped
	asleep  []sleeper // in the order in which the kernel wakes them
}

// sleeper is a thread that waits for another one to wake it.
type sleeper struct {
	thread int
	at     uint64 // the address of what it waits on
}

// run goes on until the program has called begin, and all threads but the one that did
// are asleep.
func (s *startup) run() error {
	for s.running != s.begun || len(s.ready) > 0 {
		status, err := s.step()
		switch {
		case err != nil:
		case status.TrapCause() == unix.PTRACE_EVENT_CLONE:
			err = s.started()
		case status.StopSignal() == unix.SIGTRAP|0x80:
			err = s.called()
		case status.StopSignal() != unix.SIGTRAP:
			err = fmt.Errorf("it got %v", status.StopSignal())
		}
		if err != nil {
			return fmt.Errorf("thread %d: %w", s.running, err)
		}
	}
	return nil
}

// step lets the running thread go on to where it stops next.
func (s *startup) step() (unix.WaitStatus, error) {
	if err := unix.PtraceSyscall(s.running, 0); err != nil {
		return 0, fmt.Errorf("let it go on: %w", err)
	}
	return stopped(s.running)
}

// stopped waits until a thread has stopped.
func stopped(thread int) (status unix.WaitStatus, err error) {
	for {
		_, err = unix.Wait4(thread, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait for thread %d: %w", thread, err)
		case !status.Stopped():
			return 0, fmt.Errorf("thread %d ended, status %#x", thread, uint32(status))
		default:
			return status, nil
		}
	}
}

// started takes note of the thread that the running one has started.
func (s *startup) started() error {
	id, err := unix.PtraceGetEventMsg(s.running)
	if err != nil {
		return fmt.Errorf("find what it started: %w", err)
	}
	if _, err := stopped(int(id)); err != nil {
		return err
	}
	if s.monitor == 0 {
		s.monitor = int(id)
	} else {
		s.ready = append(s.ready, int(id))
	}
	return nil
}

// called acts on what the running thread asks of the kernel.
func (s *startup) called() error {
	const wait, wake, command = 0, 1, 0x7f // of futex
	c, err := callOf(s.running)
	if err != nil || c.Op != unix.PTRACE_SYSCALL_INFO_ENTRY {
		return err
	}
	switch c.Number {
	case unix.SYS_GETPPID:
		s.begun = s.running
		if len(s.ready) > 0 {
			return s.next()
		}
	case unix.SYS_SCHED_YIELD, unix.SYS_NANOSLEEP:
		if _, err := s.step(); err != nil {
			return err
		}
		s.ready = append(s.ready, s.running)
		return s.next()
	case unix.SYS_FUTEX:
		switch at := c.Arguments[0]; c.Arguments[1] & command {
		case wait:
			return s.sleep(at, uint32(c.Arguments[2]), c.Arguments[3] != 0)
		case wake:
			return s.wake(at, uint32(c.Arguments[2]))
		}
	}
	return nil
}

// next gives the turn to the next thread.
func (s *startup) next() error {
	switch {
	case len(s.ready) > 0:
		s.running, s.ready = s.ready[0], s.ready[1:]
	case s.begun != 0:
		s.running = s.begun
	default:
		return fmt.Errorf("it waits, as do the %d others", len(s.asleep)-1)
	}
	return nil
}

// sleep lets the running thread wait as long as there is a value at an address.
func (s *startup) sleep(at uint64, value uint32, timed bool) error {
	var now [4]byte
	if _, err := unix.PtracePeekData(s.running, uintptr(at), now[:]); err != nil {
		return fmt.Errorf("read what it waits on: %w", err)
	}
	switch {
	case binary.NativeEndian.Uint32(now[:]) != value:
		return nil // it does not wait
	case timed:
		return errors.New("it waits by the real clock")
	}
	if err := unix.PtraceSyscall(s.running, 0); err != nil {
		return fmt.Errorf("let it wait: %w", err)
	}
	for asleep := false; !asleep; {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", s.pid, s.running))
		if err != nil {
			return fmt.Errorf("see whether it waits: %w", err)
		}
		asleep = bytes.Contains(stat, []byte(") S "))
	}
	s.asleep = append(s.asleep, sleeper{s.running, at})
	return s.next()
}

// wake lets the running thread wake up to n others that wait on an address.
func (s *startup) wake(at uint64, n uint32) error {
	if _, err := s.step(); err != nil {
		return err
	}
	for ; n > 0; n-- {
		i := slices.IndexFunc(s.asleep, func(other sleeper) bool { return other.at == at })
		if i < 0 {
			break
		}
		thread := s.asleep[i].thread
		if _, err := stopped(thread); err != nil {
			return err
		}
		s.asleep = slices.Delete(s.asleep, i, i+1)
		s.ready = append(s.ready, thread)
	}
	return nil
}

// detach lets go of all threads but the monitor.
func (s *startup) detach() error {
	for _, other := range s.asleep { // only who is stopped can be let go
		if err := unix.Tgkill(s.pid, other.thread, unix.SIGSTOP); err != nil {
			return fmt.Errorf("stop thread %d: %w", other.thread, err)
		}
		for {
			status, err := stopped(other.thread)
			if err != nil {
				return err
			}
			if status.StopSignal() == unix.SIGSTOP {
				break
			}
			if err := unix.PtraceCont(other.thread, 0); err != nil {
				return fmt.Errorf("let thread %d go on: %w", other.thread, err)
			}
		}
		if err := unix.PtraceDetach(other.thread); err != nil {
			return fmt.Errorf("let go of thread %d: %w", other.thread, err)
		}
	}
	return unix.PtraceDetach(s.running)
}

// call is the kernel's ptrace_syscall_info: what a thread asks of the kernel.
type call struct {
	Op        uint8 // whether the kernel is about to answer, or has
	_         [3]uint8
	_         uint32
	_, _      uint64
	Number    uint64 // these only if it is about to answer
	Arguments [6]uint64
	_         [64]byte // room for newer kernels
}

// callOf returns the call of a stopped thread.
func callOf(thread int) (c call, err error) {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(thread), unsafe.Sizeof(c), uintptr(unsafe.Pointer(&c)), 0, 0)
	if errno != 0 {
		return c, fmt.Errorf("see what it asks of the kernel: %w", errno)
	}
	return c, nil
}
