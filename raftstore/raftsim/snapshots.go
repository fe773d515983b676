package raftsim

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"syscall"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/seal"
)

// snap is one whole snapshot on a disk.
type snap struct {
	meta raft.SnapshotMeta
	data []byte
}

// retain is how many snapshots stay.
const retain = 2

// snapStore implements raft.SnapshotStore. Half a snapshot is none: a crash before the
// sink is closed leaves nothing.
type snapStore struct{ *disk }

// Create implements raft.SnapshotStore.
func (d snapStore) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.disk.snaps++
	return &sink{disk: d.disk, snap: &snap{meta: raft.SnapshotMeta{
		Version: v, ID: fmt.Sprintf("%d-%d-%d", term, index, d.disk.snaps), Index: index, Term: term, Configuration: c, ConfigurationIndex: cIndex,
	}}}, nil
}

// List implements raft.SnapshotStore.
func (d snapStore) List() ([]*raft.SnapshotMeta, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []*raft.SnapshotMeta
	for _, s := range d.seen.snaps {
		list = append(list, copyOf(&s.meta))
	}
	return list, nil
}

// Open implements raft.SnapshotStore.
func (d snapStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.seen.snaps {
		if s.meta.ID == id {
			return copyOf(&s.meta), io.NopCloser(bytes.NewReader(s.data)), nil
		}
	}
	return nil, nil, fmt.Errorf("snapshot %s is not there", id)
}

// sink implements raft.SnapshotSink.
type sink struct {
	disk *disk
	snap *snap
	done bool
}

// Write implements io.Writer.
func (s *sink) Write(b []byte) (int, error) {
	s.disk.mu.Lock()
	full := s.disk.full && !s.disk.dead
	s.disk.mu.Unlock()
	if full {
		return 0, fmt.Errorf("%w: %w", seal.ErrNoSpace, syscall.ENOSPC)
	}
	s.snap.data = append(s.snap.data, b...)
	return len(b), nil
}

// Close implements raft.SnapshotSink.
func (s *sink) Close() error {
	if s.done {
		return nil
	}
	s.done = true
	s.snap.meta.Size = int64(len(s.snap.data))
	return s.disk.write(fmt.Sprintf("snapshot %d", s.snap.meta.Index), true, func(i *image) {
		i.snaps = append([]*snap{s.snap}, i.snaps...) // the newest of those that are equal
		slices.SortStableFunc(i.snaps, func(a, b *snap) int { return newer(&a.meta, &b.meta) })
		i.snaps = slices.Clone(i.snaps[:min(len(i.snaps), retain)])
	})
}

func newer(a, b *raft.SnapshotMeta) int {
	switch {
	case a.Term > b.Term, a.Term == b.Term && a.Index > b.Index:
		return -1
	case a.Term == b.Term && a.Index == b.Index:
		return 0
	}
	return 1
}

// Cancel implements raft.SnapshotSink.
func (s *sink) Cancel() error { s.done = true; return nil }

// ID implements raft.SnapshotSink.
func (s *sink) ID() string { return s.snap.meta.ID }
