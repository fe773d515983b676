package raftstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
)

// Peers reaches the other servers. An error that matches ErrNotLeader means that
// nothing was asked of anybody, or that the server at the address does not lead; one
// that matches ErrLeadershipLost that the outcome is unknown.
type Peers interface {
	// Propose hands an encoded transaction to the server at address, for its
	// ProposeEncoded.
	Propose(ctx context.Context, address string, txn []byte) (command.Result, error)
	// ReadIndex asks the server at address for [Store.ReadIndex].
	ReadIndex(ctx context.Context, address string) (uint64, error)
}

// The waits between two looks at who leads, should no change be seen in between.
const (
	firstLook = 5 * time.Millisecond
	lastLook  = 100 * time.Millisecond
)

// deliver brings an encoded transaction to the leader. again allows to try anew when
// the outcome is unknown.
func (s *Store) deliver(ctx context.Context, data []byte, again bool) (command.Result, error) {
	var lost error // of an attempt whose outcome is unknown
	for wait := firstLook; ; wait = min(2*wait, lastLook) {
		changed := s.LeaderChange()
		result, err := s.deliverOnce(ctx, data)
		retry := false
		switch {
		case err == nil:
			return result, nil
		case errors.Is(err, ErrLeadershipLost):
			retry, lost = again, err
		case errors.Is(err, ErrNotLeader):
			retry = true
			if lost != nil { // that this attempt did nothing says nothing about the earlier one
				err = lost
			}
		}
		if !retry || s.cfg.Peers == nil || !s.await(ctx, changed, wait) {
			return result, err
		}
	}
}

func (s *Store) deliverOnce(ctx context.Context, data []byte) (command.Result, error) {
	if err := s.refusal(); err != nil {
		return command.Result{}, err
	}
	id, address := s.Leader()
	if s.IsLeader() || s.cfg.Peers == nil {
		return s.proposeHere(ctx, data)
	}
	if id == "" {
		return command.Result{}, s.notLeader()
	}
	result, err := s.cfg.Peers.Propose(ctx, address, data)
	if err != nil {
		return result, fmt.Errorf("forward to %s at %s: %w", id, address, err)
	}
	// Who proposes here expects to see the outcome here.
	_, err = s.AwaitRevision(ctx, result.Revision)
	return result, err
}

// await waits for a change of leader, but not longer than d. It reports whether it
// makes sense to go on.
func (s *Store) await(ctx context.Context, changed <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
		return false
	case <-s.closing:
		return false
	case <-s.fsm.stopped:
		return false
	}
	return true
}

// AwaitRevision waits until this server's state has reached a revision, and returns it.
func (s *Store) AwaitRevision(ctx context.Context, revision uint64) (*state.State, error) {
	for {
		view := s.View()
		if view.Revision() >= revision {
			return view, nil
		}
		if _, err := s.WaitChange(ctx, view.Revision()); err != nil {
			return nil, fmt.Errorf("waiting for revision %d, at %d: %w", revision, view.Revision(), err)
		}
	}
}

// LeaderChange returns a channel that is closed when another server leads, none does,
// or this one has become fit to serve as leader. Ask for it before looking.
func (s *Store) LeaderChange() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leaderChange
}

func (s *Store) noteLeaderChange() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.leaderChange)
	s.leaderChange = make(chan struct{})
}
