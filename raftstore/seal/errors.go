package seal

import (
	"errors"
	"fmt"
)

// The errors that callers tell apart, with errors.Is.
var (
	// ErrCorrupt: the disk gave back something else than what was written. Nothing of
	// this folder may be used for voting any more: set it aside and join again.
	ErrCorrupt = errors.New("the data on disk is damaged")
	// ErrMasterKey: the master key is missing, is not the one that belongs to the
	// folder, or can be read by others. The data are fine, an operator has to act.
	ErrMasterKey = errors.New("the master key cannot be used")
	// ErrNoSpace: the disk is full, or nearly. Nothing that was acknowledged is lost,
	// and the same write may be tried again once there is room.
	ErrNoSpace = errors.New("no space on the disk")
	// ErrDisk: a write or an fsync failed, and what the disk holds is unknown. The
	// process must stop using the folder; a new start reads and verifies what is there.
	ErrDisk = errors.New("the disk failed")
)

// CorruptError is the [ErrCorrupt] of one place.
type CorruptError struct {
	Index uint64 // of the log entry, or zero
	What  string // what is damaged: "log entry", "snapshot 2-17-1690000000000", ...
	Cause error  // may be nil
}

// Error implements error.
func (e *CorruptError) Error() string {
	s := e.What
	if e.Index != 0 {
		s = fmt.Sprintf("%s %d", s, e.Index)
	}
	if e.Cause == nil {
		return s + ": " + ErrCorrupt.Error()
	}
	return fmt.Sprintf("%s: %v: %v", s, ErrCorrupt, e.Cause)
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// Unwrap returns the cause.
func (e *CorruptError) Unwrap() error { return e.Cause }

func corrupt(what, format string, args ...any) error {
	return &CorruptError{What: what, Cause: fmt.Errorf(format, args...)}
}

func corruptEntry(index uint64, cause error) error {
	return &CorruptError{Index: index, What: "log entry", Cause: cause}
}
