package seal

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// Inner is what a sealed log is stored in. *raftboltdb.BoltStore is one.
type Inner interface {
	raft.LogStore
	raft.StableStore
}

// LogStore is a raft.LogStore whose entries are sealed. Index, term and type of an
// entry are bound to its content, so that reading returns what was stored there or an
// error that matches [ErrCorrupt]. It is as safe for concurrent use as what it wraps.
type LogStore struct {
	inner Inner
	ring  *Keyring
	disk  *Disk

	mu   sync.Mutex // one writer at a time
	mark *mark
	name []byte // memory for the name of an entry
}

var (
	_ raft.LogStore          = (*LogStore)(nil)
	_ raft.MonotonicLogStore = (*LogStore)(nil)
)

// OpenLog returns the sealed log and the sealed stable values that are in inner; both
// report to disk. MarkPath is a small file that belongs to inner and has to be moved
// with it: it remembers up to where the log was written.
//
// An inner that has entries but no mark was written by a version that did not seal:
// its entries stay as they are and can be read until they are compacted away or
// overwritten; everything new is sealed.
func OpenLog(inner Inner, ring *Keyring, markPath string, disk *Disk) (*LogStore, *StableStore, error) {
	m, err := openMark(markPath, ring)
	if err == nil && m == nil {
		m, err = adopt(inner, ring, markPath)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open log: %w", err)
	}
	l := &LogStore{inner: inner, ring: ring, disk: disk, mark: m}
	stable, err := openStable(l)
	if err == nil {
		err = l.checkEnd()
	}
	if err != nil {
		m.file.Close()
		return nil, nil, fmt.Errorf("open log: %w", err)
	}
	return l, stable, nil
}

// adopt makes the mark of a log that has none.
func adopt(inner Inner, ring *Keyring, markPath string) (*mark, error) {
	var s markState
	err := guarded("the log", func() (err error) {
		s.plain, err = inner.LastIndex()
		if err != nil || s.plain == 0 {
			return err
		}
		var last raft.Log
		if err := inner.GetLog(s.plain, &last); err != nil {
			return err
		}
		if isBox(last.Data) {
			return corruptEntry(s.plain, fmt.Errorf("it is sealed, and %s is missing", markPath))
		}
		s.index, s.term = s.plain, last.Term
		return nil
	})
	if err == nil {
		err = guarded("the stable values", func() error {
			if _, err := inner.Get(stableKey); err == nil {
				return corrupt("the stable values", "they are sealed, and %s is missing", markPath)
			}
			return nil
		})
	}
	if err != nil {
		return nil, err
	}
	return createMark(markPath, ring, s)
}

// checkEnd compares the end of the log with the mark.
func (l *LogStore) checkEnd() error {
	last, err := l.LastIndex()
	if err != nil {
		return err
	}
	if last < l.mark.index {
		return corruptEntry(l.mark.index, fmt.Errorf("it was stored, and the log ends at %d", last))
	}
	first, err := l.FirstIndex()
	if err != nil {
		return err
	}
	if l.mark.term == 0 || l.mark.index < first { // an old mark survived a power cut, its entry was compacted
		return nil
	}
	var entry raft.Log
	if err := l.GetLog(l.mark.index, &entry); err != nil {
		return corruptEntry(l.mark.index, err)
	}
	if entry.Term != l.mark.term {
		return corruptEntry(l.mark.index, fmt.Errorf("it was stored with term %d, and has term %d", l.mark.term, entry.Term))
	}
	return nil
}

// close releases the mark; inner stays open.
func (l *LogStore) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mark.file.Close()
}

// remark writes the mark anew, with the current key.
func (l *LogStore) remark() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.disk.do("log", l.mark.settle)
}

// IsMonotonic implements raft.MonotonicLogStore.
func (l *LogStore) IsMonotonic() bool {
	m, ok := l.inner.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

// FirstIndex implements raft.LogStore.
func (l *LogStore) FirstIndex() (index uint64, err error) {
	err = guarded("the log", func() (err error) { index, err = l.inner.FirstIndex(); return err })
	return index, err
}

// LastIndex implements raft.LogStore.
func (l *LogStore) LastIndex() (index uint64, err error) {
	err = guarded("the log", func() (err error) { index, err = l.inner.LastIndex(); return err })
	return index, err
}

// GetLog implements raft.LogStore. The error matches raft.ErrLogNotFound or, with a
// [CorruptError], [ErrCorrupt].
func (l *LogStore) GetLog(index uint64, log *raft.Log) error {
	_, err := l.get(index, log)
	return err
}

// get also returns what else a sealed entry holds.
func (l *LogStore) get(index uint64, log *raft.Log) (inside sealedEntry, err error) {
	var stored raft.Log
	err = guarded("the log", func() error { return l.inner.GetLog(index, &stored) })
	switch {
	case errors.Is(err, raft.ErrLogNotFound) || isClosed(err):
		return inside, err
	case err != nil:
		return inside, corruptEntry(index, err)
	case stored.Index != index:
		return inside, corruptEntry(index, fmt.Errorf("entry %d is in its place", stored.Index))
	}
	if index <= l.mark.plainTo.Load() {
		if isBox(stored.Data) {
			return inside, corruptEntry(index, errors.New("it should not be sealed"))
		}
		*log = stored
		return inside, nil
	}
	inside, err = l.unseal(&stored)
	if err != nil {
		return inside, corruptEntry(index, err)
	}
	stored.Data, stored.Extensions, stored.AppendedAt = inside.data, inside.extensions, inside.appendedAt
	*log = stored
	return inside, nil
}

func (l *LogStore) unseal(stored *raft.Log) (inside sealedEntry, err error) {
	var dst []byte
	if _, ok := l.inner.(*raftboltdb.BoltStore); ok && len(stored.Data) > boxHeader {
		dst = stored.Data[boxHeader:boxHeader] // it was decoded for this call, nobody else has it
	}
	plain, err := l.ring.open(dst, stored.Data, appendName(nil, stored))
	if err != nil {
		return inside, err
	}
	inside, err = parseEntry(plain)
	inside.key = KeyID(stored.Data[2:])
	return inside, err
}

// StoreLog implements raft.LogStore.
func (l *LogStore) StoreLog(log *raft.Log) error { return l.StoreLogs([]*raft.Log{log}) }

// StoreLogs implements raft.LogStore. The error matches [ErrNoSpace], after which the
// same may be tried again, [ErrDisk], after which everything fails, or [ErrCorrupt].
func (l *LogStore) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if first := logs[0].Index; first <= l.mark.plain {
		l.mark.plain = first - 1 // from here on nothing in the clear is accepted
		if err := l.disk.do("log", l.mark.settle); err != nil {
			return err
		}
	}
	sealed, err := l.sealAll(logs)
	if err != nil {
		return fmt.Errorf("store log entry %d: %w", logs[0].Index, err)
	}
	if err := l.disk.do("log", func() error { return l.inner.StoreLogs(sealed) }); err != nil {
		return fmt.Errorf("store log entry %d: %w", logs[0].Index, err)
	}
	if last := logs[len(logs)-1]; last.Index >= l.mark.index {
		l.mark.index, l.mark.term = last.Index, last.Term
		l.disk.note(l.mark.advance())
	}
	return nil
}

// sealAll returns sealed copies of entries, with three allocations for all.
func (l *LogStore) sealAll(logs []*raft.Log) ([]*raft.Log, error) {
	size := 0
	for _, log := range logs {
		size += boxHeader + entryOverhead + len(log.Extensions) + len(log.Data) + boxTag
	}
	slab := make([]byte, 0, size)
	copies := make([]raft.Log, len(logs))
	sealed := make([]*raft.Log, len(logs))
	var before raft.Log
	for i, log := range logs {
		if before.Index+1 != log.Index || i == 0 {
			before = l.before(log.Index)
		}
		l.name = appendName(l.name[:0], log)
		box := appendEntry(slab[len(slab):len(slab)+boxHeader], log, before.Term)
		box, err := l.ring.seal(box, l.name)
		if err != nil {
			return nil, err
		}
		slab = slab[:len(slab)+len(box)]
		copies[i] = raft.Log{Index: log.Index, Term: log.Term, Type: log.Type, Data: box[:len(box):len(box)]}
		sealed[i], before = &copies[i], *log
	}
	return sealed, nil
}

// before returns the entry before index, without its content; its term is 0 if it is
// not in the log.
func (l *LogStore) before(index uint64) raft.Log {
	if l.mark.index+1 == index {
		return raft.Log{Index: l.mark.index, Term: l.mark.term}
	}
	var log raft.Log
	if err := guarded("the log", func() error { return l.inner.GetLog(index-1, &log) }); err != nil {
		return raft.Log{}
	}
	return raft.Log{Index: log.Index, Term: log.Term}
}

// DeleteRange implements raft.LogStore. Errors are those of [LogStore.StoreLogs].
func (l *LogStore) DeleteRange(first, last uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.lower(first, last); err != nil {
		return fmt.Errorf("delete log entries %d to %d: %w", first, last, err)
	}
	if err := l.disk.do("log", func() error { return l.inner.DeleteRange(first, last) }); err != nil {
		return fmt.Errorf("delete log entries %d to %d: %w", first, last, err)
	}
	return nil
}

// lower makes the mark true for the time after entries were deleted.
func (l *LogStore) lower(first, last uint64) error {
	start, err := l.FirstIndex()
	if err != nil {
		return err
	}
	next := l.mark.markState
	if last >= next.index {
		next.index, next.term = 0, 0
		if before := l.before(first); start < first && before.Index != 0 {
			next.index, next.term = before.Index, before.Term
		}
	}
	if first <= start && last >= next.plain {
		next.plain = 0
	}
	if next == l.mark.markState {
		return nil
	}
	l.mark.markState = next
	return l.disk.do("log", l.mark.settle)
}

// oldestKey returns the key of the oldest sealed entry. Keys come in the order of the
// entries, so all older keys are not used by the log.
func (l *LogStore) oldestKey() (KeyID, bool, error) {
	first, err := l.FirstIndex()
	if err != nil {
		return KeyID{}, false, err
	}
	last, err := l.LastIndex()
	if err != nil {
		return KeyID{}, false, err
	}
	for i := max(first, l.mark.plainTo.Load()+1); i <= last && first != 0; i++ {
		var entry raft.Log
		inside, err := l.get(i, &entry)
		if errors.Is(err, raft.ErrLogNotFound) {
			continue
		}
		return inside.key, err == nil, err
	}
	return KeyID{}, false, nil
}

// isClosed tells a store that is being closed from one that is damaged.
func isClosed(err error) bool {
	return errors.Is(err, bbolterrors.ErrDatabaseNotOpen) || errors.Is(err, bbolterrors.ErrTxClosed)
}

// guarded runs f, and turns a panic in it into an error that matches [ErrCorrupt].
// bbolt trusts its pages: a garbage one makes it panic, or touch memory that is not
// there, which the runtime does not survive unless it is told to panic instead.
func guarded(what string, f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = corrupt(what, "reading it went wrong: %v\n%s", r, debug.Stack())
		}
	}()
	return f()
}
