package gitsource

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/go-git/go-git/v5/plumbing"
)

// refDir holds the references of a bare repository as Git's loose reference files,
// written durably and replaced as a whole. The caller serializes writes.
type refDir struct{ repo string }

// list returns every reference below refs/.
func (r refDir) list() (map[string]plumbing.Hash, error) {
	refs := make(map[string]plumbing.Hash)
	err := filepath.WalkDir(filepath.Join(r.repo, "refs"), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed while we look
		}
		if err != nil || d.IsDir() || strings.HasSuffix(path, ".lock") {
			return err
		}
		name, err := filepath.Rel(r.repo, path)
		if err != nil {
			return err
		}
		h, err := r.get(filepath.ToSlash(name))
		if err == nil && !h.IsZero() {
			refs[filepath.ToSlash(name)] = h
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list references: %w", err)
	}
	return refs, nil
}

// get returns the hash of a reference, zero if it does not exist.
func (r refDir) get(name string) (plumbing.Hash, error) {
	data, err := os.ReadFile(filepath.Join(r.repo, filepath.FromSlash(name)))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.ENOTDIR) {
		return plumbing.ZeroHash, nil
	}
	if err != nil {
		return plumbing.ZeroHash, fmt.Errorf("read reference %s: %w", name, err)
	}
	h, err := parseHash(strings.TrimSpace(string(data)))
	if err != nil {
		return h, fmt.Errorf("read reference %s: %w", name, err)
	}
	return h, nil
}

// set creates or changes a reference and syncs it to disk.
func (r refDir) set(name string, h plumbing.Hash) error {
	path := filepath.Join(r.repo, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write reference %s: %w", name, err)
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		if err := removeEmptyDirs(path); err != nil {
			return fmt.Errorf("write reference %s: there are references below it: %w", name, err)
		}
	}
	if err := writeDurable(path, []byte(h.String()+"\n")); err != nil {
		return fmt.Errorf("write reference %s: %w", name, err)
	}
	return syncParents(filepath.Dir(path), filepath.Join(r.repo, "refs"))
}

// writeDurable replaces a file as a whole: after a crash it has the old content or
// the new one.
func writeDurable(path string, data []byte) error {
	tmp := path + ".lock"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

// syncParents syncs dir and its parents up to and including top.
func syncParents(dir, top string) error {
	for {
		if err := syncDir(dir); err != nil {
			return err
		}
		if dir == top || len(dir) <= len(top) {
			return nil
		}
		dir = filepath.Dir(dir)
	}
}

// removeEmptyDirs removes a folder that holds nothing but empty folders, which is
// what deleted references leave.
func removeEmptyDirs(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			return fmt.Errorf("%s exists", e.Name())
		}
		if err := removeEmptyDirs(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}
