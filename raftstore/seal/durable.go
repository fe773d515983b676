package seal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// failpoint is told the name of every step that makes something durable, before it
// is taken. It is nil except in tests, which end the process in it.
var failpoint func(step string)

func reach(step string) {
	if failpoint != nil {
		failpoint(step)
	}
}

// writeFile replaces a file durably: after a crash there is the old one or the new
// one, never half of one. Steps are named after what.
func writeFile(what, path string, data []byte) error {
	temporary := path + ".tmp"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", what, err)
	}
	reach(what + ".write")
	_, err = f.Write(data)
	if err == nil {
		reach(what + ".fsync")
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", what, err)
	}
	return rename(what, temporary, path)
}

// rename gives a file its name durably.
func rename(what, from, to string) error {
	reach(what + ".rename")
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("write %s: %w", what, err)
	}
	return syncDir(what, filepath.Dir(to))
}

// remove removes a file, or a folder with what is in it, durably.
func remove(what, path string) error {
	reach(what + ".remove")
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove %s: %w", what, err)
	}
	return syncDir(what, filepath.Dir(path))
}

// makeDir makes a folder, and those above it, whose names survive a crash.
func makeDir(what, path string) error {
	if err := os.Mkdir(path, 0o700); errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(what, filepath.Dir(path)); err != nil {
			return err
		}
		return makeDir(what, path)
	} else if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make folder of %s: %w", what, err)
	}
	return syncDir(what, filepath.Dir(path)) // also if an earlier start made it and crashed
}

// syncDir makes the names in a folder durable.
func syncDir(what, dir string) error {
	reach(what + ".syncdir")
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}
