// Package volume makes the files that a pod's containers see: volumes of the
// supported kinds, the pod's hosts, hostname and resolv.conf, and safe paths into
// volumes. All of it lives in one folder per pod; [Remove] unmounts and deletes it.
//
// It needs root for tmpfs and bind mounts.
package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mounter mounts file systems. The methods are idempotent.
type Mounter interface {
	// Tmpfs mounts a memory file system of at most size bytes (0: no limit of its
	// own) at dir.
	Tmpfs(dir string, size int64) error
	// Bind makes what fd refers to visible at target.
	Bind(fd uintptr, target string) error
	// Unmount removes every mount at or below dir.
	Unmount(dir string) error
}

// Kernel is the [Mounter] of the running kernel.
type Kernel struct{}

// Tmpfs implements [Mounter].
func (Kernel) Tmpfs(dir string, size int64) error {
	if mounted, err := mountinfo.Mounted(dir); err != nil {
		return fmt.Errorf("is %s mounted: %w", dir, err)
	} else if mounted {
		return nil
	}
	data := "mode=0777"
	if size > 0 {
		data += ",size=" + strconv.FormatInt(size, 10)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		return fmt.Errorf("mount tmpfs at %s: %w", dir, err)
	}
	return nil
}

// Bind implements [Mounter].
func (Kernel) Bind(fd uintptr, target string) error {
	if mounted, err := mountinfo.Mounted(target); err != nil {
		return fmt.Errorf("is %s mounted: %w", target, err)
	} else if mounted {
		return nil
	}
	source := fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind to %s: %w", target, err)
	}
	return nil
}

// Unmount implements [Mounter].
func (Kernel) Unmount(dir string) error {
	for range 8 { // mounts may lie over one another
		infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil {
			return fmt.Errorf("list mounts below %s: %w", dir, err)
		}
		if len(infos) == 0 {
			return nil
		}
		slices.SortFunc(infos, func(a, b *mountinfo.Info) int { return len(b.Mountpoint) - len(a.Mountpoint) })
		for _, m := range infos {
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
			}
		}
	}
	return fmt.Errorf("unmount %s: still mounted", dir)
}

// Remove unmounts everything below dir and deletes it. It is idempotent, and never
// deletes through a mount.
func Remove(m Mounter, dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := m.Unmount(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// SubPath returns a path that stands for sub inside the volume root, made under
// target by a bind mount of the opened file: whatever containers do to the volume
// meanwhile, it cannot point outside. A sub that does not exist becomes a folder.
func SubPath(m Mounter, root, sub, target string) (string, error) {
	if !filepath.IsLocal(sub) {
		return "", fmt.Errorf("subPath %q: must be relative, without \"..\"", sub)
	}
	r, err := os.OpenRoot(root)
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	defer r.Close()
	if err := makeFolders(r, sub); err != nil {
		return "", fmt.Errorf("subPath %q: make folder: %w", sub, err)
	}
	f, err := r.OpenFile(sub, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	// An earlier attempt of the container may have left a mount of old content.
	if err := m.Unmount(target); err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	if err := makeTarget(target, info.IsDir()); err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	return target, m.Bind(f.Fd(), target)
}

// makeFolders makes what is missing of sub, as open as the volume itself.
func makeFolders(r *os.Root, sub string) error {
	if _, err := r.Stat(sub); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	info, err := r.Stat(".")
	if err != nil {
		return err
	}
	path := ""
	for part := range strings.SplitSeq(filepath.Clean(sub), "/") {
		path = filepath.Join(path, part)
		if err := r.Mkdir(path, 0o700); errors.Is(err, fs.ErrExist) {
			continue
		} else if err != nil {
			return err
		}
		if err := r.Chmod(path, info.Mode()&(fs.ModePerm|fs.ModeSetgid)); err != nil {
			return err
		}
	}
	return nil
}

// makeTarget makes the empty folder or file that a bind mount covers.
func makeTarget(target string, dir bool) error {
	if dir {
		return os.MkdirAll(target, 0o750)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o640)
	if err != nil {
		return err
	}
	return f.Close()
}
