// Package netspace runs code in another network namespace of this machine. It is
// what lets every other package work in "the current namespace" only.
package netspace

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Do calls fn on a thread that is in the network namespace at path; an empty path
// means the current one. Sockets and processes that fn makes belong to that
// namespace; goroutines that it starts do not. It returns fn's error.
func Do(path string, fn func() error) error {
	if path == "" {
		return fn()
	}
	target, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer target.Close()
	runtime.LockOSThread()
	before, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer before.Close()
	if err := netns.Set(target); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s (needs root): %w", path, err)
	}
	defer func() {
		// A thread that cannot go back stays locked, and ends with its goroutine.
		if netns.Set(before) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return fn()
}

// Create makes a new network namespace with loopback down, and keeps it at path, a
// file that it makes. Remove ends it.
func Create(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("create network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o600)
	if err != nil {
		return fmt.Errorf("create network namespace: %w", err)
	}
	f.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends here
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}()
	if err := <-done; err != nil {
		os.Remove(path)
		return fmt.Errorf("create network namespace %s (needs root): %w", path, err)
	}
	return nil
}

// Remove ends what Create made. It is no error if there is nothing.
func Remove(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("remove network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}
