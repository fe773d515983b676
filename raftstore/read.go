package raftstore

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/state"
)

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
