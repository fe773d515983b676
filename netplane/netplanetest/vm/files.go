package vm

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// libraryDirs are where Debian has shared libraries; its loader looks there.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib"}

// addFiles copies executables of this machine, to the same places, with the loader and the
// libraries that they need.
func (a *archive) addFiles(paths []string) error {
	done := map[string]bool{}
	for len(paths) > 0 {
		file := paths[0]
		paths = paths[1:]
		if done[file] {
			continue
		}
		done[file] = true
		needs, err := needsOf(file)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w; %w", err, ErrMissing)
		}
		if err != nil {
			return fmt.Errorf("look for what %s needs: %w", file, err)
		}
		paths = append(paths, needs...)
		a.parents(file)
		a.copy(strings.TrimPrefix(file, "/"), file)
	}
	return a.err
}

// parents makes the folders above a file.
func (a *archive) parents(file string) {
	dir := strings.TrimPrefix(path.Dir(file), "/")
	for i, r := range dir + "/" {
		if r == '/' && !a.folders[dir[:i]] {
			a.folder(dir[:i])
		}
	}
}

// needsOf returns the loader and the libraries that an executable or a library names.
func needsOf(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return nil, err
		}
		out = append(out, strings.TrimRight(string(b), "\x00"))
	}
	names, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		at, err := library(name)
		if err != nil {
			return nil, err
		}
		out = append(out, at)
	}
	return out, nil
}

func library(name string) (string, error) {
	for _, dir := range libraryDirs {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return filepath.Join(dir, name), nil
		}
	}
	return "", fmt.Errorf("library %s: %w", name, os.ErrNotExist)
}
