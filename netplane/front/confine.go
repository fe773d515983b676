package front

import (
	"fmt"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rights are the capabilities that servers need: their ports, and files in folders that are not
// root's, such as a program or a log in somebody's home.
var rights = []uintptr{unix.CAP_NET_BIND_SERVICE, unix.CAP_DAC_OVERRIDE}

// confine takes from this process, and from its successors, all other ones: it hears strangers,
// and the node's kernel and containers are not its business (capabilities(7)). Programs built
// with cgo get [errors.ErrUnsupported].
func confine() error {
	if err := everyThread(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("give up new privileges: %w", err)
	}
	for c := uintptr(0); ; c++ { // what programs that it starts may get
		if slices.Contains(rights, c) {
			continue
		}
		if err := everyThread(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0); err == unix.EINVAL || err == unix.EPERM {
			break // the kernel has no more, or they are gone since its predecessor
		} else if err != nil {
			return fmt.Errorf("give up capability %d: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var keep [2]unix.CapUserData
	for _, c := range rights {
		keep[0].Effective |= 1 << c
	}
	keep[0].Permitted = keep[0].Effective
	if err := everyThread(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&keep)), 0); err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	return nil
}

// everyThread makes a system call for all threads, of which each has rights of its own.
func everyThread(trap, a1, a2, a3 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall(trap, a1, a2, a3); errno != 0 {
		return errno
	}
	return nil
}
