package containerd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

const (
	shmName = "shm"
	shmSize = 64 << 20 // the kubelet's
)

var cloneFlags = map[string]int{"net": unix.CLONE_NEWNET, "ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS}

// makeNamespaces unshares the sandbox's namespaces on a thread of their own and
// pins each to a file by a bind mount. The thread ends with the call; the mounts
// keep the namespaces alive without any process.
func (r *Runtime) makeNamespaces(rec sandboxRecord, sysctls map[string]string) error {
	dir := filepath.Join(r.cfg.nsDir(), string(rec.UID))
	if err := removeNamespaces(dir); err != nil {
		return err
	}
	kinds := rec.namespaces()
	if len(kinds) == 0 {
		return nil
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	done := make(chan error, 1)
	go onSpareThread(func() { done <- unshareOnThread(dir, rec.Hostname, kinds, sysctls) })
	if err := <-done; err != nil {
		return errors.Join(fmt.Errorf("make namespaces: %w", err), removeNamespaces(dir))
	}
	return nil
}

// onSpareThread runs f on a thread that ends with it. It must be called in a goroutine
// of its own.
func onSpareThread(f func()) {
	// Never unlocked: a thread in foreign namespaces must not serve others, so the
	// runtime ends it together with this goroutine.
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	// The first thread never ends, and /proc/self shows its namespaces: while it is
	// held here, another goroutine is on another thread.
	done := make(chan struct{})
	go func() {
		defer close(done)
		onSpareThread(f)
	}()
	<-done
	runtime.UnlockOSThread()
}

func unshareOnThread(dir, hostname string, kinds []string, sysctls map[string]string) error {
	flags := 0
	for _, kind := range kinds {
		flags |= cloneFlags[kind]
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("unshare %s: %w", strings.Join(kinds, ", "), err)
	}
	if slices.Contains(kinds, "uts") && hostname != "" {
		if err := unix.Sethostname([]byte(hostname)); err != nil {
			return fmt.Errorf("set hostname %s: %w", hostname, err)
		}
	}
	if slices.Contains(kinds, "net") {
		if err := loopbackUp(); err != nil {
			return err
		}
	}
	for name, value := range sysctls {
		path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl %s to %q: %w", name, value, err)
		}
	}
	for _, kind := range kinds {
		path := filepath.Join(dir, kind)
		if err := os.WriteFile(path, nil, 0o444); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/"+kind, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s namespace on %s: %w", kind, path, err)
		}
	}
	if slices.Contains(kinds, "ipc") {
		return mountShm(filepath.Join(dir, shmName))
	}
	return nil
}

// mountShm makes the pod's shared memory: POSIX shared memory is a file system, which
// the IPC namespace does not carry along.
func mountShm(path string) error {
	if err := os.Mkdir(path, 0o711); err != nil {
		return err
	}
	if err := unix.Mount("shm", path, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, fmt.Sprintf("mode=1777,size=%d", shmSize)); err != nil {
		return fmt.Errorf("mount shared memory on %s: %w", path, err)
	}
	return nil
}

func loopbackUp() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	return nil
}

// removeNamespaces unmounts and removes the pinned namespaces in dir.
func removeNamespaces(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		// EINVAL: not a mount point. A pin may be mounted twice after a crash.
		for err = nil; err == nil; {
			err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}

// isNamespace reports whether a namespace is mounted on path.
func isNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// podSysctls returns the kernel parameters to set in a pod's namespaces: its own and
// the defaults that replace the capabilities NET_BIND_SERVICE and NET_RAW, so that
// any user may bind any port and send echo requests in the pod's own network.
func podSysctls(pod *corev1.Pod) (map[string]string, error) {
	set := map[string]string{}
	if !pod.Spec.HostNetwork {
		set["net.ipv4.ip_unprivileged_port_start"] = "0"
		set["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	if pod.Spec.SecurityContext == nil {
		return set, nil
	}
	for _, s := range pod.Spec.SecurityContext.Sysctls {
		name := strings.ReplaceAll(s.Name, "/", ".")
		switch {
		case strings.Contains(name, ".."):
			return nil, fmt.Errorf("sysctl %q: not a name", s.Name)
		case strings.HasPrefix(name, "net.") && pod.Spec.HostNetwork, !strings.HasPrefix(name, "net.") && pod.Spec.HostIPC:
			return nil, fmt.Errorf("sysctl %q belongs to the node, with which this pod shares that namespace", s.Name)
		case strings.HasPrefix(name, "net."), strings.HasPrefix(name, "kernel.shm"), strings.HasPrefix(name, "kernel.msg"),
			name == "kernel.sem", strings.HasPrefix(name, "fs.mqueue."):
			set[name] = s.Value
		default:
			return nil, fmt.Errorf("sysctl %q is not separate for each pod: set it on the node", s.Name)
		}
	}
	return set, nil
}
