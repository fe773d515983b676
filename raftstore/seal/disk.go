package seal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DiskConfig says how a [Disk] is watched. Everything has a default.
type DiskConfig struct {
	// MinFree is how many bytes should stay free: below, the server should not lead any
	// more, so that somebody else does before writes fail. 256 MiB when zero, but not
	// more than 5 % of the file system; negative: no limit.
	MinFree int64
	// Interval is how often the disk is looked at, 1 s when zero.
	Interval time.Duration
	// SlowAfter is how long a write with its fsync may take before the disk counts as
	// slow, 100 ms when zero.
	SlowAfter time.Duration
	// Observe, when not nil, is told of every write with its fsync: what was written
	// ("log" or "stable") and how long that took. It must not block.
	Observe func(what string, took time.Duration)
}

// Disk knows how the disk of one folder is doing: from the errors and the durations of
// writes, and from looking by itself while [Disk.Run] runs. All methods are safe for
// concurrent use.
type Disk struct {
	cfg DiskConfig
	dir string

	mu      sync.Mutex
	failed  error // matches ErrDisk, for good
	full    error // matches ErrNoSpace: a write found no room
	low     error // matches ErrNoSpace: there is little left
	changed chan struct{}
	writing map[*time.Time]struct{} // when the writes under way began
	average time.Duration           // of the last writes, the newest counting most
}

// Space is how much room a file system has, in bytes, for a process without privileges.
type Space struct{ Free, Total uint64 }

// NewDisk returns the Disk of the folder, which need not exist yet.
func NewDisk(dir string, cfg DiskConfig) *Disk {
	if cfg.Interval == 0 {
		cfg.Interval = time.Second
	}
	if cfg.SlowAfter == 0 {
		cfg.SlowAfter = 100 * time.Millisecond
	}
	return &Disk{cfg: cfg, dir: dir, changed: make(chan struct{}), writing: map[*time.Time]struct{}{}}
}

// Healthy returns nil, or why this server should not lead: an error that matches
// [ErrNoSpace], which goes away by itself, or [ErrDisk], which does not.
func (d *Disk) Healthy() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.healthy()
}

func (d *Disk) healthy() error {
	switch {
	case d.failed != nil:
		return d.failed
	case d.full != nil:
		return d.full
	}
	return d.low
}

// Changed returns a channel that is closed when [Disk.Healthy] turns from nil to an
// error, or back, or to another kind of error. Take the channel first, then ask.
func (d *Disk) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

// set changes what is known, and tells who waits for a change.
func (d *Disk) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before := kind(d.healthy())
	change()
	if kind(d.healthy()) != before {
		close(d.changed)
		d.changed = make(chan struct{})
	}
}

func kind(err error) error {
	switch {
	case errors.Is(err, ErrDisk):
		return ErrDisk
	case errors.Is(err, ErrNoSpace):
		return ErrNoSpace
	}
	return nil
}

// Slow reports whether writes take longer than SlowAfter, on average or the one that
// is under way.
func (d *Disk) Slow() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.average > d.cfg.SlowAfter {
		return true
	}
	for start := range d.writing {
		if time.Since(*start) > d.cfg.SlowAfter {
			return true
		}
	}
	return false
}

// Space asks the file system.
func (d *Disk) Space() (Space, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(d.dir, &s); err != nil {
		return Space{}, fmt.Errorf("ask for free space in %s: %w", d.dir, err)
	}
	return Space{Free: s.Bavail * uint64(s.Bsize), Total: s.Blocks * uint64(s.Bsize)}, nil
}

// Run looks at the disk until ctx ends.
func (d *Disk) Run(ctx context.Context) error {
	ticker := time.NewTicker(d.cfg.Interval)
	defer ticker.Stop()
	for {
		d.Probe()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// Probe looks at the disk once: at the free space, and, if a write has found none, by
// writing. It returns what [Disk.Healthy] says then.
func (d *Disk) Probe() error {
	space, err := d.Space()
	if err != nil {
		return d.Healthy() // a folder that cannot be asked is no news about the disk
	}
	d.mu.Lock()
	full, low := d.full, d.low
	d.mu.Unlock()
	least := d.minFree(space)
	if low != nil {
		least += least / 4 // not back and forth at the limit
	}
	low = nil
	if space.Free < least {
		low = fmt.Errorf("%w: %d of %d MiB are free in %s: make room, the server resumes by itself", ErrNoSpace, space.Free>>20, space.Total>>20, d.dir)
	}
	if full != nil && low == nil && d.tryWrite() == nil {
		full = nil
	}
	d.set(func() { d.full, d.low = full, low })
	return d.Healthy()
}

func (d *Disk) minFree(s Space) uint64 {
	switch {
	case d.cfg.MinFree < 0:
		return 0
	case d.cfg.MinFree == 0:
		return min(256<<20, s.Total/20)
	}
	return uint64(d.cfg.MinFree)
}

// tryWrite writes as much as a growing log needs, and takes it away again.
func (d *Disk) tryWrite() error {
	f, err := os.CreateTemp(d.dir, "probe-*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 1<<20))
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
}

// clean removes what a crash in tryWrite has left.
func (d *Disk) clean() {
	left, _ := filepath.Glob(filepath.Join(d.dir, "probe-*.tmp"))
	for _, name := range left {
		os.Remove(name)
	}
}

// do runs a write to the log file, with its fsync, unless an earlier one has failed.
// The error is classified, see [Disk.classify].
func (d *Disk) do(what string, write func() error) error {
	start := time.Now()
	d.mu.Lock()
	if d.failed != nil {
		defer d.mu.Unlock()
		return d.failed
	}
	d.writing[&start] = struct{}{}
	d.mu.Unlock()
	err := guarded("the log", write)
	took := time.Since(start)
	d.mu.Lock()
	delete(d.writing, &start)
	d.average += (took - d.average) / 8
	d.mu.Unlock()
	if d.cfg.Observe != nil {
		d.cfg.Observe(what, took)
	}
	return d.classify(err)
}

// classify remembers what an error of writing the log means. Only a write that found
// no room may be tried again: it has changed nothing that counts. After anything else,
// a failed fsync above all, the kernel may have dropped the pages and call the next
// fsync good, so that nothing but a new start, which reads all from the disk, will do
// (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
func (d *Disk) classify(err error) error {
	switch {
	case err == nil || isClosed(err):
		return err
	case noRoom(err):
		err = fmt.Errorf("%w: %w", ErrNoSpace, err)
		d.set(func() { d.full = err })
		return err
	}
	err = fmt.Errorf("%w: %w (check the disk, then start the server again)", ErrDisk, err)
	d.set(func() {
		if d.failed == nil {
			d.failed = err
		}
	})
	return err
}

// note is classify for a write that only makes checks sharper: that it found no room
// does not matter.
func (d *Disk) note(err error) {
	if err != nil && !isNoSpace(err) {
		d.classify(err)
	}
}

// doFile runs a step of writing a new file. Running out of space at any step spoils
// that file only, which is thrown away.
func (d *Disk) doFile(step func() error) error {
	d.mu.Lock()
	failed := d.failed
	d.mu.Unlock()
	if failed != nil {
		return failed
	}
	err := step()
	if isNoSpace(err) {
		err = fmt.Errorf("%w: %w", ErrNoSpace, err)
		d.set(func() { d.full = err })
		return err
	}
	return d.classify(err)
}

// noRoom reports whether bbolt found no room before it changed anything: when it wrote
// pages or made the file longer. "No space" from its fdatasync comes without a path.
func noRoom(err error) bool {
	var path *fs.PathError
	if isNoSpace(err) && errors.As(err, &path) {
		return path.Op == "write" || path.Op == "truncate"
	}
	text := "" // bbolt keeps the text only
	if err != nil {
		text = err.Error()
	}
	return strings.HasPrefix(text, "file resize error: ") &&
		(strings.HasSuffix(text, syscall.ENOSPC.Error()) || strings.HasSuffix(text, syscall.EDQUOT.Error()))
}

func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
