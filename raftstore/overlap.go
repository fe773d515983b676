package raftstore

import (
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// overlapLog lets a leader write its log while the other servers write theirs
// (Ongaro, "Consensus: Bridging Theory and Practice", section 10.2.1). StoreLogs of a
// leader of others returns at once; what it was given is read from memory until it is on
// disk. In return [overlapTransport] keeps back every answer of another server until the
// entries that the answer is about are on this disk too. So what raft counts as stored by
// a quorum is on the leader's disk, as if the leader had written first.
//
// With no other vote there are no answers to keep back, and entries that change the
// configuration change who has one: both are on disk when StoreLogs returns.
//
// It is as safe for concurrent use as what it wraps; changes come from one goroutine,
// raft's own, on which a server does not begin or cease to lead meanwhile.
type overlapLog struct {
	raft.LogStore
	leads func() bool // this server leads others; asked on raft's goroutine

	mu      sync.Mutex
	pending []*raft.Log // consecutive; the oldest may be on their way to the disk
	failed  error       // of the last attempt to write them
	changed chan struct{}
	stopped bool
	wake    chan struct{} // capacity 1: there is something to write
	stop    chan struct{}
	done    chan struct{}
}

// retryWrite is the time between two attempts to write when there is no room.
const retryWrite = 100 * time.Millisecond

func newOverlapLog(inner raft.LogStore, leads func() bool) *overlapLog {
	o := &overlapLog{LogStore: inner, leads: leads, changed: make(chan struct{}), wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go o.write()
	return o
}

// IsMonotonic implements raft.MonotonicLogStore.
func (o *overlapLog) IsMonotonic() bool {
	m, ok := o.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

// FirstIndex implements raft.LogStore.
func (o *overlapLog) FirstIndex() (uint64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	first, err := o.LogStore.FirstIndex()
	if err == nil && first == 0 && len(o.pending) > 0 {
		first = o.pending[0].Index
	}
	return first, err
}

// LastIndex implements raft.LogStore.
func (o *overlapLog) LastIndex() (uint64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.pending); n > 0 {
		return o.pending[n-1].Index, nil
	}
	return o.LogStore.LastIndex()
}

// GetLog implements raft.LogStore.
func (o *overlapLog) GetLog(index uint64, log *raft.Log) error {
	o.mu.Lock()
	if n := len(o.pending); n > 0 && index >= o.pending[0].Index && index <= o.pending[n-1].Index {
		*log = *o.pending[index-o.pending[0].Index]
		o.mu.Unlock()
		return nil
	}
	o.mu.Unlock()
	return o.LogStore.GetLog(index, log)
}

// StoreLog implements raft.LogStore.
func (o *overlapLog) StoreLog(log *raft.Log) error { return o.StoreLogs([]*raft.Log{log}) }

// StoreLogs implements raft.LogStore.
func (o *overlapLog) StoreLogs(logs []*raft.Log) error {
	if o.mayWait(logs) {
		o.mu.Lock()
		defer o.mu.Unlock()
		if !o.stopped && o.failed == nil {
			o.pending = append(o.pending, logs...)
			select {
			case o.wake <- struct{}{}:
			default:
			}
			return nil
		}
		if o.failed != nil {
			return o.failed
		}
	}
	if err := o.drain(); err != nil {
		return err
	}
	return o.LogStore.StoreLogs(logs)
}

// leadsOthers reports whether r, which may be nil, leads, and needs the vote of another
// server for whatever it does.
func leadsOthers(r *raft.Raft) bool {
	if r == nil || r.State() != raft.Leader {
		return false
	}
	voters := 0
	for _, s := range r.GetConfiguration().Configuration().Servers {
		if s.Suffrage == raft.Voter {
			voters++
		}
	}
	return voters > 1
}

// mayWait reports whether the entries are a leader's whose followers have to store them
// too before they count.
func (o *overlapLog) mayWait(logs []*raft.Log) bool {
	for _, log := range logs {
		if log.Type == raft.LogConfiguration {
			return false
		}
	}
	return o.leads()
}

// DeleteRange implements raft.LogStore.
func (o *overlapLog) DeleteRange(first, last uint64) error {
	if err := o.drain(); err != nil {
		return err
	}
	return o.LogStore.DeleteRange(first, last)
}

// drain waits until nothing is pending.
func (o *overlapLog) drain() error {
	return o.wait(func() bool { return len(o.pending) == 0 })
}

// await waits until this server's entry at an index is on disk, or is no more.
func (o *overlapLog) await(index uint64) error {
	return o.wait(func() bool { return len(o.pending) == 0 || o.pending[0].Index > index })
}

var errStopped = errors.New("the log is closed, and not all of it was written")

// wait returns when so is true, or with the error why it does not become true.
func (o *overlapLog) wait(so func() bool) error {
	for {
		o.mu.Lock()
		changed, is, err := o.changed, so(), o.failed
		if err == nil && o.stopped {
			err = errStopped
		}
		o.mu.Unlock()
		switch {
		case is:
			return nil
		case err != nil:
			return err
		}
		<-changed
	}
}

// write brings what is pending to the disk, all of it at once.
func (o *overlapLog) write() {
	defer close(o.done)
	for {
		o.mu.Lock()
		batch := o.pending
		o.mu.Unlock()
		var pause <-chan time.Time
		wake := o.wake
		if len(batch) > 0 {
			err := o.LogStore.StoreLogs(batch)
			o.mu.Lock()
			o.failed = err
			if err == nil {
				o.pending = append([]*raft.Log(nil), o.pending[len(batch):]...) // the others can go
			}
			close(o.changed)
			o.changed = make(chan struct{})
			more := len(o.pending) > 0
			o.mu.Unlock()
			if err == nil && more {
				continue
			}
			if err != nil {
				pause, wake = time.After(retryWrite), nil
			}
		}
		select {
		case <-wake:
		case <-pause:
		case <-o.stop:
			return
		}
	}
}

// close waits until what is pending is on disk, or cannot be brought there, and ends
// everybody who waits. From then on nothing waits any more.
func (o *overlapLog) close() {
	_ = o.drain() // what is not written was promised to nobody
	o.mu.Lock()
	if o.stopped {
		o.mu.Unlock()
		return
	}
	o.stopped = true
	close(o.changed)
	o.changed = make(chan struct{})
	o.mu.Unlock()
	close(o.stop)
	<-o.done
}

// overlapTransport keeps back answers: see [overlapLog].
type overlapTransport struct {
	raft.Transport
	log *overlapLog
}

// overlapping wraps a transport, with all that raft may ask of it.
func overlapping(t raft.Transport, log *overlapLog) raft.Transport {
	o := &overlapTransport{t, log}
	if v, ok := t.(raft.WithPreVote); ok {
		return struct {
			*overlapTransport
			raft.WithPreVote
		}{o, v}
	}
	return o
}

// Close implements raft.WithClose.
func (t *overlapTransport) Close() error {
	if c, ok := t.Transport.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}

// AppendEntries implements raft.Transport.
func (t *overlapTransport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := t.Transport.AppendEntries(id, target, args, resp); err != nil {
		return err
	}
	return t.own(args)
}

// own waits until the entries of a request are on this server's disk.
func (t *overlapTransport) own(args *raft.AppendEntriesRequest) error {
	if n := len(args.Entries); n > 0 {
		return t.log.await(args.Entries[n-1].Index)
	}
	return nil
}

// AppendEntriesPipeline implements raft.Transport.
func (t *overlapTransport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	inner, err := t.Transport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	p := &overlapPipeline{AppendPipeline: inner, transport: t, answers: make(chan raft.AppendFuture), closed: make(chan struct{})}
	go p.pass()
	return p, nil
}

// overlapPipeline passes the answers of a pipeline on, in order.
type overlapPipeline struct {
	raft.AppendPipeline
	transport *overlapTransport
	answers   chan raft.AppendFuture
	closed    chan struct{}
	once      sync.Once
}

// Consumer implements raft.AppendPipeline.
func (p *overlapPipeline) Consumer() <-chan raft.AppendFuture { return p.answers }

// Close implements raft.AppendPipeline.
func (p *overlapPipeline) Close() error {
	p.once.Do(func() { close(p.closed) })
	return p.AppendPipeline.Close()
}

func (p *overlapPipeline) pass() {
	for {
		select {
		case f := <-p.AppendPipeline.Consumer():
			if p.transport.own(f.Request()) != nil {
				// As if the connection had broken: raft asks again.
				_ = p.Close()
				return
			}
			select {
			case p.answers <- f:
			case <-p.closed:
				return
			}
		case <-p.closed:
			return
		}
	}
}
