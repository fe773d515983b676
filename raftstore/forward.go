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

// untilLed makes attempts until one succeeds, fails in a way that retry does not
// accept, or there is no sense in going on. Between two attempts it waits for another
// leader, but not for long.
func (s *Store) untilLed(ctx context.Context, retry func(error) bool, attempt func() error) error {
	for wait := firstLook; ; wait = min(2*wait, lastLook) {
		changed := s.LeaderChange()
		err := attempt()
		if err == nil || s.cfg.Peers == nil || !retry(err) || !s.await(ctx, changed, wait) {
			return err
		}
	}
}

// leaderPatience is how long OnLeader waits for a leader: some elections.
const leaderPatience = 3 * time.Second

// OnLeader calls here if this server leads, or there with the address of the one that
// does. While nobody leads, or who was asked does no more (the error matches
// ErrNotLeader: nothing happened), it waits and tries again; but not for long, as an
// operator who calls is to learn that nobody leads.
func (s *Store) OnLeader(ctx context.Context, here func() error, there func(address string) error) error {
	begun := time.Now()
	nothing := func(err error) bool { return errors.Is(err, ErrNotLeader) && time.Since(begun) < leaderPatience }
	return s.untilLed(ctx, nothing, func() error {
		if s.Leads() {
			return here()
		}
		id, address := s.Leader()
		if id == "" || id == s.cfg.NodeID { // it is not ready to lead yet
			return s.notLeader()
		}
		return there(address)
	})
}

// deliver brings an encoded transaction to the leader. again allows to try anew when
// the outcome is unknown.
func (s *Store) deliver(ctx context.Context, data []byte, again bool) (result command.Result, err error) {
	var lost error // of an attempt whose outcome is unknown
	retry := func(err error) bool {
		return errors.Is(err, ErrNotLeader) || again && errors.Is(err, ErrLeadershipLost)
	}
	err = s.untilLed(ctx, retry, func() (err error) {
		result, err = s.deliverOnce(ctx, data)
		if errors.Is(err, ErrLeadershipLost) {
			lost = err
		}
		return err
	})
	if lost != nil && errors.Is(err, ErrNotLeader) { // that this attempt did nothing says nothing about the earlier one
		err = lost
	}
	return result, err
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
