package seal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// OpenBolt opens the log file at path, and makes it if there is none. The caller has
// made sure that no other process uses it. The error matches [ErrCorrupt] if the file
// is not what bbolt has written.
//
// The pages are checked before bbolt sees them. Opening reads every page in a
// goroutine of bbolt's own, where a panic about a garbage page, or the endless
// recursion of a page that leads to itself, would end the process.
func OpenBolt(path string) (*raftboltdb.BoltStore, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := createBolt(path); err != nil {
			return nil, fmt.Errorf("make log %s: %w", path, err)
		}
	}
	if err := checkBolt(path); err != nil {
		return nil, fmt.Errorf("open log %s: %w", path, err)
	}
	store, err := openBolt(path)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", path, err)
	}
	return store, nil
}

// createBolt makes an empty log file under another name first, so that a crash leaves
// none or a whole one.
func createBolt(path string) error {
	fresh := path + ".new"
	if err := remove("bolt", fresh); err != nil {
		return err
	}
	store, err := openBolt(fresh)
	if err != nil {
		return err
	}
	reach("bolt.close")
	if err := store.Close(); err != nil {
		return err
	}
	return rename("bolt", fresh, path)
}

func openBolt(path string) (store *raftboltdb.BoltStore, err error) {
	var file *os.File
	options := &bbolt.Options{
		Timeout: time.Second, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
		OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
			f, err := os.OpenFile(name, flag, mode)
			file = f
			return f, err
		},
	}
	err = guarded("the log", func() (err error) {
		store, err = raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: options})
		return err
	})
	switch {
	case err == nil:
		return store, nil
	case errors.Is(err, ErrCorrupt):
		if file != nil {
			// bbolt did not get to it. The mapping stays, and would keep the lock.
			syscall.Flock(int(file.Fd()), syscall.LOCK_UN)
			file.Close()
		}
	case isDamage(err):
		err = corrupt("the log", "%w", err)
	}
	return nil, err
}

// isDamage tells what bbolt says about the content of the file from other trouble.
func isDamage(err error) bool {
	for _, e := range []error{bbolterrors.ErrInvalid, bbolterrors.ErrVersionMismatch, bbolterrors.ErrChecksum, bbolterrors.ErrIncompatibleValue} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
