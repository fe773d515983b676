package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// File is one file of a volume.
type File struct {
	Data []byte
	Mode fs.FileMode
}

const (
	dataLink = "..data"
	tempLink = "..data_tmp"
)

// WriteAtomic makes dir show exactly files (by slash-separated relative path) so
// that a reader sees either all of the old content or all of the new: the files
// live in a new folder, and the symlink ..data is renamed over to it, as Kubernetes
// does. gid, when not negative, owns the files. Nothing happens when the content is
// there already. It reports whether anything changed.
func WriteAtomic(dir string, files map[string]File, gid int) (changed bool, err error) {
	for name := range files {
		if err := checkPath(name); err != nil {
			return false, err
		}
	}
	current, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("read the current version of volume %s: %w", dir, err)
	}
	if current != "" && same(filepath.Join(dir, current), files) {
		return false, link(dir, files)
	}
	next, err := os.MkdirTemp(dir, "..v-")
	if err != nil {
		return false, fmt.Errorf("make the next version of volume %s: %w", dir, err)
	}
	if err := writeAll(next, files, gid); err != nil {
		return false, errors.Join(err, os.RemoveAll(next))
	}
	temp := filepath.Join(dir, tempLink)
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := os.Symlink(filepath.Base(next), temp); err != nil {
		return false, err
	}
	if err := os.Rename(temp, filepath.Join(dir, dataLink)); err != nil {
		return false, fmt.Errorf("put the next version of volume %s into force: %w", dir, err)
	}
	if err := link(dir, files); err != nil {
		return true, err
	}
	return true, removeOld(dir, filepath.Base(next))
}

// checkPath refuses names that leave the volume or clash with its own.
func checkPath(name string) error {
	if !filepath.IsLocal(name) || strings.HasPrefix(name, "..") || name == "." || strings.ContainsRune(name, 0) {
		return fmt.Errorf("volume path %q: must be relative, without \"..\"", name)
	}
	return nil
}

// same reports that folder holds exactly files.
func same(folder string, files map[string]File) bool {
	seen := 0
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(folder, path)
		if err != nil {
			return err
		}
		f, ok := files[filepath.ToSlash(rel)]
		if !ok {
			return fs.ErrExist
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !bytes.Equal(data, f.Data) || info.Mode().Perm() != f.Mode.Perm() {
			return fs.ErrExist
		}
		seen++
		return nil
	})
	return err == nil && seen == len(files)
}

func writeAll(folder string, files map[string]File, gid int) error {
	if err := os.Chmod(folder, 0o755); err != nil {
		return err
	}
	for name, f := range files {
		path := filepath.Join(folder, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.Data, 0o600); err != nil {
			return err
		}
		if gid >= 0 {
			if err := os.Lchown(path, -1, gid); err != nil {
				return err
			}
		}
		if err := os.Chmod(path, f.Mode.Perm()); err != nil {
			return err
		}
	}
	return nil
}

// link makes the names that people see point into ..data, and removes those of
// files that are no more.
func link(dir string, files map[string]File) error {
	want := map[string]bool{}
	for name := range files {
		top, _, _ := strings.Cut(name, "/")
		want[top] = true
	}
	for top := range want {
		path, target := filepath.Join(dir, top), filepath.Join(dataLink, top)
		if old, err := os.Readlink(path); err == nil && old == target {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		if err := os.Symlink(target, path); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type()&fs.ModeSymlink != 0 && !strings.HasPrefix(e.Name(), "..") && !want[e.Name()] {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeOld removes the folders of earlier versions.
func removeOld(dir, keep string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	old := slices.DeleteFunc(entries, func(e fs.DirEntry) bool {
		return !strings.HasPrefix(e.Name(), "..v-") || e.Name() == keep
	})
	for _, e := range old {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
