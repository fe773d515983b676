package raftstore

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
)

// fsm applies committed entries, one after another, on raft's own goroutine. It
// does nothing but decode, Reduce, swap the state and tell the hub.
type fsm struct {
	state   atomic.Pointer[state.State]
	hub     *hub
	metrics *metrics
	decoder command.Decoder
	format  func(int) // is told in which format what was read is

	fatal   atomic.Pointer[error]
	stopped chan struct{} // closed with the first fatal error
	settled chan struct{} // capacity 1: the cluster has settings since now
	onFatal func(error)
}

var _ raft.FSM = (*fsm)(nil)

func newFSM(h *hub, m *metrics, newest int, format func(int), onFatal func(error)) *fsm {
	f := &fsm{hub: h, metrics: m, decoder: command.Decoder{Max: newest}, format: format, stopped: make(chan struct{}), settled: make(chan struct{}, 1), onFatal: onFatal}
	f.state.Store(state.New())
	return f
}

// Apply implements raft.FSM. Its response is []command.Result, one for each
// transaction of the entry, or the error that stopped the store.
func (f *fsm) Apply(entry *raft.Log) any {
	if fatal := f.fatal.Load(); fatal != nil {
		return *fatal
	}
	start := time.Now()
	txns, err := f.decoder.Entry(entry.Data)
	if err != nil {
		return f.fail(fmt.Errorf("%w: log entry %d of term %d cannot be applied, and must not be skipped: %w", ErrFatal, entry.Index, entry.Term, err))
	}
	f.format(command.FormatOfEntry(entry.Data))
	next, results, batches := state.ReduceEntry(f.state.Load(), entry.Index, txns)
	for _, r := range results {
		f.metrics.outcome(r)
	}
	batches = slices.DeleteFunc(batches, func(b []state.Event) bool { return len(b) == 0 })
	f.hub.publish(next.Revision(), batches, func() { f.swap(next) })
	f.metrics.applySeconds.Observe(time.Since(start).Seconds())
	return results
}

// fail stops the store for good; of several errors the first counts.
func (f *fsm) fail(err error) error {
	if !f.fatal.CompareAndSwap(nil, &err) {
		return *f.fatal.Load()
	}
	close(f.stopped)
	f.onFatal(err)
	return err
}

// Snapshot implements raft.FSM. The state is immutable, so there is nothing to copy.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if fatal := f.fatal.Load(); fatal != nil {
		return nil, *fatal
	}
	return snapshot{f.state.Load()}, nil
}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	s, err := state.ReadFormat(r, f.decoder.Max)
	if err != nil {
		return err
	}
	// A leader that takes this server for further behind than it is may send an old
	// snapshot, and raft would go back to it, though the log in between is gone.
	if have := f.state.Load(); s.Index() < have.Index() {
		return fmt.Errorf("restore a snapshot of index %d: this server is at %d already", s.Index(), have.Index())
	}
	f.format(s.Format())
	f.hub.reset(s.Revision(), func() { f.swap(s) })
	return nil
}

func (f *fsm) swap(next *state.State) {
	before := f.state.Swap(next)
	if before.Settings() == nil && next.Settings() != nil {
		select {
		case f.settled <- struct{}{}:
		default:
		}
	}
}

type snapshot struct{ state *state.State }

// Persist implements raft.FSMSnapshot.
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	w := bufio.NewWriterSize(sink, 256<<10)
	_, err := s.state.WriteTo(w)
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		sink.Cancel()
		return fmt.Errorf("write snapshot %s: %w", sink.ID(), err)
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (s snapshot) Release() {}
