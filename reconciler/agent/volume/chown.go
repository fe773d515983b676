package volume

import (
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// owns reports that dir belongs to the group and passes it on to new files.
func owns(dir string, gid int) bool {
	info, err := os.Stat(dir)
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Gid) == gid && info.Mode()&fs.ModeSetgid != 0
}

// chownTree gives a volume to the group: it may read and write everything, and new
// files belong to it. Symbolic links are not followed.
func chownTree(dir string, gid int) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if err := root.Lchown(rel, -1, gid); err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode := info.Mode().Perm() | 0o060
		if d.IsDir() {
			mode |= 0o010 | fs.ModeSetgid
		}
		return root.Chmod(rel, mode)
	})
}
