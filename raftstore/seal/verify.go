package seal

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/raft"
)

// Report is what [Verify] has read.
type Report struct {
	First, Last   uint64             // indexes of the log, 0 if it is empty
	Entries       int                // of the log
	EntryBytes    int64              // of their content
	Plain         int                // entries that are not sealed: stored by an older version
	Snapshot      *raft.SnapshotMeta // the newest one, nil if there is none
	SnapshotBytes int64
}

// Verify reads the newest snapshot and the log, all of it, as a server has to before it
// votes. Raft alone would notice damage when it needs the entry, would go back to an
// older snapshot, or would take a log without its end for a short one.
//
// The error matches [ErrCorrupt] if something is damaged or missing, and never is a
// panic, whatever the log store makes of its pages. The log must reach, without a gap,
// from the entry after the snapshot to its end. Before that gaps are normal: a
// snapshot that a leader sent leaves one.
func Verify(ctx context.Context, log raft.LogStore, snapshots raft.SnapshotStore) (r Report, err error) {
	if err := r.readSnapshot(ctx, snapshots); err != nil {
		return r, fmt.Errorf("verify: %w", err)
	}
	err = guarded("the log", func() error { return r.readLog(ctx, log) })
	if err != nil {
		return r, fmt.Errorf("verify: %w", err)
	}
	return r, nil
}

func (r *Report) readSnapshot(ctx context.Context, snapshots raft.SnapshotStore) error {
	list, err := snapshots.List()
	if err != nil || len(list) == 0 {
		return err
	}
	r.Snapshot = list[0]
	_, content, err := snapshots.Open(r.Snapshot.ID)
	if err != nil {
		return err
	}
	defer content.Close()
	r.SnapshotBytes, err = io.Copy(io.Discard, contextReader{ctx, content})
	if err == nil && r.SnapshotBytes != r.Snapshot.Size {
		err = corrupt("snapshot "+r.Snapshot.ID, "it has %d bytes, and should have %d", r.SnapshotBytes, r.Snapshot.Size)
	}
	return err
}

type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}

// readLog reads downwards from the end to the first gap, then what is below the gap.
func (r *Report) readLog(ctx context.Context, log raft.LogStore) (err error) {
	if r.First, err = log.FirstIndex(); err != nil {
		return err
	}
	if r.Last, err = log.LastIndex(); err != nil || r.Last == 0 {
		return err
	}
	if r.First > r.Last {
		return corrupt("the log", "it begins at %d and ends at %d", r.First, r.Last)
	}
	var needed uint64 = 1
	if r.Snapshot != nil {
		needed = r.Snapshot.Index + 1
	}
	above := walk{index: r.Last, needed: needed}
	for above.index >= r.First && above.index > 0 {
		found, err := r.readEntry(ctx, log, &above)
		if err != nil {
			return err
		}
		if !found {
			break
		}
		above.index--
	}
	if above.index >= needed && r.Last >= needed {
		return corruptEntry(above.index, errors.New("it is missing"))
	}
	for below := (walk{index: r.First, needed: needed}); below.index < above.index; below.index++ {
		if found, err := r.readEntry(ctx, log, &below); err != nil || !found {
			return err
		}
	}
	return nil
}

// walk is a place in the log on the way down, and what the entry above it said. Only
// entries after the snapshot are compared: those before can be from a history that the
// snapshot, sent by a leader, has overruled.
type walk struct {
	index, needed uint64
	term          uint64 // of the entry above, 0: there is none
	want          uint64 // the term that this entry has according to it, 0: not known
}

// readEntry reads the entry; it reports whether there is one.
func (r *Report) readEntry(ctx context.Context, log raft.LogStore, w *walk) (bool, error) {
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	var entry raft.Log
	var inside sealedEntry
	var err error
	if sealed, ok := log.(*LogStore); ok {
		inside, err = sealed.get(w.index, &entry)
		if err == nil && inside.key == (KeyID{}) {
			r.Plain++
		}
	} else {
		err = log.GetLog(w.index, &entry)
	}
	if errors.Is(err, raft.ErrLogNotFound) {
		return false, nil
	}
	if err != nil {
		if !errors.Is(err, ErrCorrupt) && !isClosed(err) {
			err = corruptEntry(w.index, err)
		}
		return false, err
	}
	if err := w.check(&entry, inside.before); err != nil {
		return false, err
	}
	r.Entries++
	r.EntryBytes += int64(len(entry.Data) + len(entry.Extensions))
	return true, nil
}

// check compares the entry with the one above.
func (w *walk) check(entry *raft.Log, before uint64) error {
	if entry.Index != w.index {
		return corruptEntry(w.index, fmt.Errorf("entry %d is in its place", entry.Index))
	}
	if w.index < w.needed {
		return nil
	}
	if w.want != 0 && entry.Term != w.want || w.term != 0 && entry.Term > w.term {
		return corruptEntry(w.index, fmt.Errorf("its term %d does not fit the entry after it: one of them is from the past", entry.Term))
	}
	w.term, w.want = entry.Term, before
	return nil
}
