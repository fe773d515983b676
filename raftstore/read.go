package raftstore

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/state"
)

// Read returns a state that contains everything that was acknowledged, by any
// server, before Read was called. Nothing is written for it.
//
// On the leader: a leader that has applied what its predecessors acknowledged, and
// that a quorum still follows, holds every acknowledged change, because it
// acknowledges its own only after it has applied them. On any other server: the
// leader says, by the same rule, which revision contains everything, and the server
// waits until it has applied that (the read index of the Raft thesis, section 6.4).
// Neither rests on clocks, as a lease would. Reads that wait together share one
// question to the quorum.
//
// While there is no leader, Read waits for one, unless the store has no Peers: then
// the error matches ErrNotLeader.
func (s *Store) Read(ctx context.Context) (view *state.State, err error) {
	retry := func(err error) bool { return errors.Is(err, ErrNotLeader) || errors.Is(err, ErrLeadershipLost) }
	err = s.untilLed(ctx, retry, func() (err error) {
		view, err = s.readOnce(ctx)
		return err
	})
	return view, err
}

func (s *Store) readOnce(ctx context.Context) (*state.State, error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	if s.IsLeader() || s.cfg.Peers == nil {
		return s.readHere(ctx)
	}
	id, address := s.Leader()
	if id == "" {
		return nil, s.notLeader()
	}
	revision, err := s.cfg.Peers.ReadIndex(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("ask %s at %s what to read: %w", id, address, err)
	}
	return s.AwaitRevision(ctx, revision)
}

// ReadIndex returns a revision that contains everything that was acknowledged before
// it was called. Only the leader can; others get ErrNotLeader.
func (s *Store) ReadIndex(ctx context.Context) (uint64, error) {
	view, err := s.readHere(ctx)
	if err != nil {
		return 0, err
	}
	return view.Revision(), nil
}

// round is one question to the quorum, and the reads that wait for its answer. They
// all came before it was asked.
type round struct {
	done chan struct{}
	view *state.State
	err  error
}

// readHere joins the next question to the quorum.
func (s *Store) readHere(ctx context.Context) (*state.State, error) {
	s.mu.Lock()
	if err := s.refusal(); err != nil {
		s.mu.Unlock()
		return nil, err
	}
	r := s.nextRound
	if r == nil {
		r = &round{done: make(chan struct{})}
		s.nextRound = r
		select {
		case s.readers <- struct{}{}:
		default:
		}
	}
	s.mu.Unlock()
	select {
	case <-r.done:
		return r.view, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("read: %w", context.Cause(ctx))
	}
}

// answerReads asks the quorum for as long as there are reads, one question at a time.
func (s *Store) answerReads() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for {
		select {
		case <-s.readers:
		case <-s.closing:
		}
		closed := errors.Is(s.refusal(), ErrClosed) // then readHere lets nobody wait any more
		s.mu.Lock()
		r := s.nextRound
		s.nextRound = nil
		s.mu.Unlock()
		if r != nil {
			r.view, r.err = s.verifiedView(ctx)
			close(r.done)
		}
		if closed {
			return
		}
	}
}

// verifiedView is the state of a leader that a quorum follows.
func (s *Store) verifiedView(ctx context.Context) (*state.State, error) {
	if err := s.refusal(); err != nil {
		return nil, err
	}
	if err := s.caughtUp(ctx); err != nil {
		return nil, err
	}
	term := s.readTerm.Load()
	if err := s.ask(ctx, func() raft.Future { return s.raft.VerifyLeader() }); err != nil {
		return nil, s.readError(ctx, err)
	}
	if s.raft.CurrentTerm() != term {
		return nil, s.notLeader()
	}
	return s.View(), nil
}

// caughtUp is catchUp where it was not done in this term.
func (s *Store) caughtUp(ctx context.Context) error {
	switch {
	case !s.IsLeader():
		return s.notLeader()
	case s.Leads():
		return nil
	}
	return s.catchUp(ctx)
}

// catchUp makes sure that this leader has applied all that earlier leaders
// acknowledged, and writes what the servers that it knows then understand.
func (s *Store) catchUp(ctx context.Context) error {
	term := s.raft.CurrentTerm()
	if err := s.ask(ctx, func() raft.Future { return s.raft.Barrier(0) }); err != nil {
		return s.readError(ctx, err)
	}
	if s.raft.CurrentTerm() != term {
		return s.notLeader()
	}
	s.settleFormat()
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
