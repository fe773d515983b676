package gitsource

import (
	"errors"
	"fmt"
	"time"
)

// Limits bound what one push, one fetch or one tree may cost. Zero fields take the
// defaults named beside them.
type Limits struct {
	PackBytes     int64         // bytes of one pack on the wire; 256 MiB
	Objects       int           // objects in one pack, and entries of one tree object; 200,000
	ObjectBytes   int64         // bytes of one object, inflated; 64 MiB
	InflatedBytes int64         // bytes of all objects of one pack, inflated and with deltas applied; 4 GiB
	DeltaBytes    int64         // bytes held in memory while deltas are applied; 256 MiB
	Files         int           // files and folders in the tree of a followed commit; 200,000
	Depth         int           // folders inside folders in the tree of a followed commit; 64
	Refs          int           // branches and tags of one repository; 10,000
	Uploads       int           // packs received, or sent, at the same time by one Server or Mirror; 8
	Time          time.Duration // wall time of one push or fetch; 10 min
}

func (l Limits) withDefaults() Limits {
	def := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	defInt := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.PackBytes, 256<<20)
	def(&l.ObjectBytes, 64<<20)
	def(&l.InflatedBytes, 4<<30)
	def(&l.DeltaBytes, 256<<20)
	defInt(&l.Objects, 200_000)
	defInt(&l.Files, 200_000)
	defInt(&l.Depth, 64)
	defInt(&l.Refs, 10_000)
	defInt(&l.Uploads, 8)
	if l.Time <= 0 {
		l.Time = 10 * time.Minute
	}
	return l
}

// Errors that callers tell apart with errors.Is.
var (
	// ErrLimit says that something is larger than Limits allow.
	ErrLimit = errors.New("over the limit")
	// ErrGarbage says that what was received is not a sound Git pack, object or tree.
	ErrGarbage = errors.New("not sound Git data")
	// ErrNotFound says that a repository, commit or object is not stored here.
	ErrNotFound = errors.New("not found")
	// ErrExists says that a repository already has what was to be created.
	ErrExists = errors.New("exists already")
)

// limitf reports what went over a limit. The text names the limit.
func limitf(format string, args ...any) error {
	return fmt.Errorf(format+" (%w)", append(args, ErrLimit)...)
}

// garbagef reports unsound data.
func garbagef(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrGarbage}, args...)...)
}

// bytesText formats a size for people.
func bytesText(n int64) string {
	switch {
	case n >= 1<<30 && n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 10<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	default:
		return fmt.Sprintf("%d bytes", n)
	}
}
