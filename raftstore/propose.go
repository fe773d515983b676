package raftstore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
)

// proposalOverhead is what a waiting proposal counts for beside its bytes.
const proposalOverhead = 256

// batchBytes is where a log entry stops taking more transactions. One that is
// larger travels alone.
const batchBytes = 1 << 20

// proposal is one encoded transaction and the caller who waits for it.
type proposal struct {
	data []byte
	done chan outcome // capacity 1
}

type outcome struct {
	result command.Result
	err    error
}

// flight is a log entry on its way, with the proposals in it.
type flight struct {
	future    raft.ApplyFuture
	proposals []*proposal
	start     time.Time
}

// Propose makes t happen: it returns once t is durable on a quorum and applied
// here. A zero t.Time becomes now. Proposals that wait together share a log entry.
//
// A transaction that the state machine rejects is a Result, not an error; see
// [command.Result.Err]. Errors: ErrNotLeader (nothing happened), one matching
// command.ErrTooLarge (nothing happened), ErrLeadershipLost, ErrClosed, ErrFatal
// and the context's cause (unknown: retry with the same t.Key).
func (s *Store) Propose(ctx context.Context, t command.Txn) (command.Result, error) {
	if t.Time == 0 {
		t.Time = time.Now().UnixMilli()
	}
	data, err := command.EncodeTxn(&t)
	if err != nil {
		return command.Result{}, fmt.Errorf("propose: %w", err)
	}
	p := &proposal{data: data, done: make(chan outcome, 1)}
	size := int64(len(data)) + proposalOverhead
	if err := s.room.Acquire(ctx, size); err != nil {
		return command.Result{}, fmt.Errorf("propose, waiting for room in the queue (nothing was proposed): %w", err)
	}
	defer s.room.Release(size)
	if err := s.enqueue(p); err != nil {
		return command.Result{}, err
	}
	start := time.Now()
	select {
	case out := <-p.done:
		s.metrics.proposeSeconds.Observe(time.Since(start).Seconds())
		return out.result, out.err
	case <-ctx.Done():
		return command.Result{}, unknown(ctx)
	}
}

func (s *Store) enqueue(p *proposal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.waiting = append(s.waiting, p)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil
}

// take removes the proposals that go into the next entry.
func (s *Store) take() []*proposal {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, size := 0, 0
	for n < len(s.waiting) && n < command.MaxTxns && (n == 0 || size+len(s.waiting[n].data) <= batchBytes) {
		size += len(s.waiting[n].data)
		n++
	}
	batch := s.waiting[:n:n]
	s.waiting = s.waiting[n:]
	if len(s.waiting) == 0 {
		s.waiting = nil
	}
	return batch
}

// batch hands entries to raft until the store closes. While raft writes one entry
// to disk, the proposals of the next one gather.
func (s *Store) batch() {
	defer close(s.flights)
	for {
		select {
		case <-s.wake:
		case <-s.closing:
			for b := s.take(); len(b) > 0; b = s.take() {
				answer(b, outcome{err: ErrClosed})
			}
			return
		}
		for b := s.take(); len(b) > 0; b = s.take() {
			s.launch(b)
		}
	}
}

func (s *Store) launch(batch []*proposal) {
	parts := make([][]byte, len(batch))
	for i, p := range batch {
		parts[i] = p.data
	}
	entry, err := command.EncodeEntry(parts...)
	if err != nil {
		answer(batch, outcome{err: fmt.Errorf("propose: %w", err)})
		return
	}
	s.metrics.batchTxns.Observe(float64(len(batch)))
	start := time.Now()
	s.flights <- flight{future: s.raft.Apply(entry, 0), proposals: batch, start: start}
}

// land answers the proposals of every entry, in the order of the entries.
func (s *Store) land() {
	defer close(s.landed)
	for f := range s.flights {
		if err := s.arrival(f.future); err != nil {
			answer(f.proposals, outcome{err: s.raftError(err)})
			continue
		}
		s.metrics.commitSeconds.Observe(time.Since(f.start).Seconds())
		switch response := f.future.Response().(type) {
		case []command.Result:
			for i, p := range f.proposals {
				p.done <- outcome{result: response[i]}
			}
		case error:
			answer(f.proposals, outcome{err: response})
		}
	}
}

// arrival waits for an entry. Raft may stop without a word about entries that it
// was just applying; their outcome is unknown.
func (s *Store) arrival(f raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		return err
	case <-s.stopped:
		return raft.ErrRaftShutdown
	}
}

func answer(batch []*proposal, out outcome) {
	for _, p := range batch {
		p.done <- out
	}
}

// Read returns a state that contains everything that was acknowledged, by any
// server, before Read was called. Only the leader can; others get ErrNotLeader.
//
// Nothing is written for it: a leader that has applied what its predecessors
// acknowledged, and that a quorum still follows, holds every acknowledged change,
// because it acknowledges its own only after it has applied them.
func (s *Store) Read(ctx context.Context) (*state.State, error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	term := s.raft.CurrentTerm()
	if s.readTerm.Load() != term {
		if !s.IsLeader() {
			return nil, s.notLeader()
		}
		if err := s.catchUp(ctx); err != nil {
			return nil, err
		}
		term = s.readTerm.Load()
	}
	if err := s.ask(ctx, func() raft.Future { return s.raft.VerifyLeader() }); err != nil {
		return nil, s.readError(ctx, err)
	}
	if s.raft.CurrentTerm() != term {
		return nil, s.notLeader()
	}
	return s.View(), nil
}

// catchUp makes sure that this leader has applied all that earlier leaders
// acknowledged.
func (s *Store) catchUp(ctx context.Context) error {
	term := s.raft.CurrentTerm()
	if err := s.ask(ctx, func() raft.Future { return s.raft.Barrier(0) }); err != nil {
		return s.readError(ctx, err)
	}
	if s.raft.CurrentTerm() != term {
		return s.notLeader()
	}
	s.readTerm.Store(term)
	return nil
}

func (s *Store) readError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil, errors.Is(err, ErrClosed), errors.Is(err, ErrFatal):
		return fmt.Errorf("read: %w", err)
	case errors.Is(err, raft.ErrLeadershipLost):
		return s.notLeader()
	}
	return s.raftError(err)
}

// ask waits for what raft answers to a question, but not longer than ctx or the
// store last.
func (s *Store) ask(ctx context.Context, question func() raft.Future) error {
	s.mu.Lock()
	err := s.refusal()
	if err == nil {
		s.asking.Add(1)
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer s.asking.Done()
		done <- question().Error()
	}()
	select {
	case err := <-done:
		return err
	case <-s.closing:
		return ErrClosed
	case <-s.fsm.stopped:
		return *s.fsm.fatal.Load()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// refusal is why raft is not to be asked any more, nil as long as it is.
func (s *Store) refusal() error {
	select {
	case <-s.closing:
		return ErrClosed
	case <-s.fsm.stopped:
		return *s.fsm.fatal.Load()
	default:
		return nil
	}
}

// lead follows who leads: a new leader catches up and, in a new cluster, proposes
// the settings. It ends with the store.
func (s *Store) lead() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.running.Go(func() {
		select {
		case <-s.closing:
		case <-s.fsm.stopped:
			s.stopRaft()
		}
		cancel()
	})
	changes := make(chan raft.Observation, 16)
	observer := raft.NewObserver(changes, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	s.raft.RegisterObserver(observer)
	defer s.raft.DeregisterObserver(observer)
	for {
		if s.IsLeader() {
			if err := s.establish(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("taking the lead", "error", err)
			}
		}
		if s.becomeReady() {
			changes = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-s.raft.LeaderCh():
		case <-changes:
		case <-s.fsm.settled:
		}
	}
}

// establish makes a new leader fit to serve.
func (s *Store) establish(ctx context.Context) error {
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	if s.View().Settings() != nil || s.cfg.Bootstrap == nil {
		return nil
	}
	settings := *s.cfg.Bootstrap
	if settings.ClusterID == "" {
		settings.ClusterID = newClusterID()
	}
	result, err := s.Propose(ctx, command.Txn{Actor: "server/" + s.cfg.NodeID, Reason: "new cluster", Bootstrap: &settings})
	if err != nil {
		return fmt.Errorf("propose the settings of the new cluster: %w", err)
	}
	if err := result.Err(); err != nil {
		return fmt.Errorf("settings of the new cluster: %w", err)
	}
	return nil
}

// becomeReady closes Ready when its conditions hold, and reports whether they did
// once.
func (s *Store) becomeReady() bool {
	select {
	case <-s.ready:
		return true
	default:
	}
	settings := s.View().Settings()
	if id, _ := s.Leader(); id == "" || settings == nil || s.fsm.fatal.Load() != nil {
		return false
	}
	if s.IsLeader() && s.readTerm.Load() != s.raft.CurrentTerm() {
		return false
	}
	if err := s.identity.join(settings.ClusterID); err != nil {
		s.fsm.fail(fmt.Errorf("%w: %w", ErrFatal, err))
		return false
	}
	close(s.ready)
	return true
}

func newClusterID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
