package raftsim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/seal"
)

// image is what is on a disk.
type image struct {
	logs  map[uint64]*raft.Log
	kv    map[string][]byte
	snaps []*snap // the newest first
}

func (i *image) clone() *image {
	return &image{logs: maps.Clone(i.logs), kv: maps.Clone(i.kv), snaps: slices.Clone(i.snaps)}
}

// disk is the disk that one run of a server sees. A write is durable when it returns.
// A crash makes a new disk of what was durable; the server that crashed goes on with
// the old one, which nobody looks at any more.
type disk struct {
	name  string
	trace *trace

	mu      sync.Mutex
	rnd     *rand.Rand
	seen    *image // what reads see
	durable *image // what a crash leaves
	pending []*func(*image)
	unsaved []func(*image) // acknowledged, though a crash loses them: of a disk that lies
	lies    bool
	dead    bool
	full    bool
	slow    time.Duration // the longest latency, when it is slow
	snaps   int
	changed chan struct{}
	// configured, when not nil, is told of every configuration that is written, and of the
	// one before it.
	configured func(at logPlace, before, after raft.Configuration)
}

func newDisk(name string, rnd *rand.Rand, t *trace) *disk {
	empty := &image{logs: map[uint64]*raft.Log{}, kv: map[string][]byte{}}
	return &disk{name: name, trace: t, rnd: rnd, seen: empty, durable: empty.clone(), changed: make(chan struct{})}
}

// crash returns the disk that the next run of the server finds. What was being written
// is there, or is not, each as a whole, and in the order of the writes.
func (d *disk) crash() *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	left := d.durable
	if len(d.unsaved) == 0 { // what a liar forgot comes before
		for _, op := range d.pending[:d.rnd.IntN(len(d.pending)+1)] {
			(*op)(left)
		}
	}
	d.trace.add("%s crash, %d writes forgotten", d.name, len(d.unsaved))
	d.durable = left.clone()
	return &disk{
		name: d.name, trace: d.trace, rnd: d.rnd, seen: left.clone(), durable: left, lies: d.lies, full: d.full, slow: d.slow,
		snaps: d.snaps, changed: make(chan struct{}), configured: d.configured,
	}
}

// write makes op durable. space is whether it needs room.
func (d *disk) write(what string, space bool, op func(*image)) error {
	d.mu.Lock()
	if d.dead {
		op(d.seen)
		d.mu.Unlock()
		return nil
	}
	latency := between(d.rnd, 50*time.Microsecond, 300*time.Microsecond)
	if d.slow > 0 {
		latency = between(d.rnd, d.slow/10, d.slow)
	}
	d.pending = append(d.pending, &op)
	d.mu.Unlock()
	time.Sleep(latency)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pending = slices.DeleteFunc(d.pending, func(p *func(*image)) bool { return p == &op })
	if d.full && space && !d.dead {
		d.trace.add("%s %s no space", d.name, what)
		return fmt.Errorf("%w: %w", seal.ErrNoSpace, syscall.ENOSPC)
	}
	op(d.seen)
	switch {
	case d.dead:
		return nil
	case d.lies && chance(d.rnd, 0.9):
		d.unsaved = append(d.unsaved, op)
	default:
		for _, earlier := range d.unsaved {
			earlier(d.durable)
		}
		d.unsaved = nil
		op(d.durable)
	}
	d.trace.add("%s %s", d.name, what)
	return nil
}

// set changes how the disk behaves.
func (d *disk) set(full bool, slow time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.slow = slow
	if d.full != full {
		d.full = full
		close(d.changed)
		d.changed = make(chan struct{})
	}
}

// storage is the disk as a Store sees it.
func (d *disk) storage(string) (raftstore.Storage, error) {
	return raftstore.Storage{Log: logStore{d}, Stable: logStore{d}, Snapshots: snapStore{d}, Disk: d, Close: func() error { return nil }}, nil
}

// Run implements raftstore.DiskHealth.
func (d *disk) Run(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) }

// Changed implements raftstore.DiskHealth.
func (d *disk) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

// Healthy implements raftstore.DiskHealth.
func (d *disk) Healthy() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.full {
		return seal.ErrNoSpace
	}
	return nil
}

// Slow implements raftstore.DiskHealth.
func (d *disk) Slow() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.slow > 0
}

// logStore implements raft.LogStore and raft.StableStore.
type logStore struct{ *disk }

func (d logStore) bounds() (first, last uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.seen.logs {
		if first == 0 || i < first {
			first = i
		}
		last = max(last, i)
	}
	return first, last
}

// FirstIndex implements raft.LogStore.
func (d logStore) FirstIndex() (uint64, error) { first, _ := d.bounds(); return first, nil }

// LastIndex implements raft.LogStore.
func (d logStore) LastIndex() (uint64, error) { _, last := d.bounds(); return last, nil }

// GetLog implements raft.LogStore.
func (d logStore) GetLog(index uint64, log *raft.Log) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	l, ok := d.seen.logs[index]
	if !ok {
		return raft.ErrLogNotFound
	}
	*log = *l
	return nil
}

// StoreLog implements raft.LogStore.
func (d logStore) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (d logStore) StoreLogs(logs []*raft.Log) error {
	copies := make([]raft.Log, len(logs))
	for i, l := range logs {
		copies[i] = *l
		if l.Type == raft.LogConfiguration {
			d.configure(l)
		}
	}
	return d.write(fmt.Sprintf("log %d+%d", logs[0].Index, len(logs)), true, func(i *image) {
		for k := range copies {
			i.logs[copies[k].Index] = &copies[k]
		}
	})
}

// configure tells of a configuration that is about to be written.
func (d logStore) configure(l *raft.Log) {
	d.mu.Lock()
	var newest uint64
	var before raft.Configuration
	if len(d.seen.snaps) > 0 {
		newest, before = d.seen.snaps[0].meta.Index, d.seen.snaps[0].meta.Configuration
	}
	for i, other := range d.seen.logs {
		if other.Type == raft.LogConfiguration && i < l.Index && i > newest {
			newest, before = i, raft.DecodeConfiguration(other.Data)
		}
	}
	tell := d.configured
	if d.dead {
		tell = nil
	}
	d.mu.Unlock()
	if tell != nil {
		tell(logPlace{l.Index, l.Term}, before, raft.DecodeConfiguration(l.Data))
	}
}

// DeleteRange implements raft.LogStore.
func (d logStore) DeleteRange(low, high uint64) error {
	return d.write(fmt.Sprintf("delete %d to %d", low, high), false, func(i *image) {
		for k := low; k <= high; k++ {
			delete(i.logs, k)
		}
	})
}

// Set implements raft.StableStore. There is always room for the few bytes of a vote.
func (d logStore) Set(key, value []byte) error {
	k, v := string(key), slices.Clone(value)
	return d.write("set "+k, false, func(i *image) { i.kv[k] = v })
}

// Get implements raft.StableStore.
func (d logStore) Get(key []byte) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, ok := d.seen.kv[string(key)]
	if !ok {
		return nil, errors.New("not found") // raft compares the text
	}
	return slices.Clone(v), nil
}

// SetUint64 implements raft.StableStore.
func (d logStore) SetUint64(key []byte, v uint64) error {
	return d.Set(key, binary.BigEndian.AppendUint64(nil, v))
}

// GetUint64 implements raft.StableStore.
func (d logStore) GetUint64(key []byte) (uint64, error) {
	v, err := d.Get(key)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(v), nil
}
