package raftstore

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/seal"
)

// The errors that callers tell apart, with errors.Is.
var (
	// ErrNotLeader: this server does not lead, nothing was proposed. Ask the leader.
	ErrNotLeader = errors.New("this server is not the leader")
	// ErrLeadershipLost: the outcome is unknown. A retry with the same Txn.Key is
	// harmless.
	ErrLeadershipLost = errors.New("leadership was lost, whether the transaction was applied is unknown (retry it with the same key)")
	// ErrClosed: the store is closed or closing. Whether a waiting proposal was
	// applied is unknown.
	ErrClosed = errors.New("the store is closed")
	// ErrCompacted: the revision is older than the history that is kept, or newer
	// than the state. List, then watch from the list's revision.
	ErrCompacted = errors.New("the revision is not in the history any more (list again, then watch from there)")
	// ErrSlowWatcher: the watcher was overtaken by the history. It comes together
	// with ErrCompacted.
	ErrSlowWatcher = errors.New("the watcher is too slow")
	// ErrFatal: the store met what it must not skip, and stopped.
	ErrFatal = errors.New("the store has stopped")
)

// raftError translates what hashicorp/raft reports about an entry or a read.
func (s *Store) raftError(err error) error {
	if fatal := s.fsm.fatal.Load(); fatal != nil {
		return *fatal
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return s.notLeader()
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrAbortedByRestore):
		return fmt.Errorf("%w: %w", ErrLeadershipLost, err)
	case errors.Is(err, seal.ErrNoSpace) && !s.alone():
		// Another one leads soon, and may have the entry.
		return fmt.Errorf("%w: %w", ErrLeadershipLost, err)
	case errors.Is(err, raft.ErrRaftShutdown):
		return ErrClosed
	}
	return fmt.Errorf("raft: %w", err)
}

func (s *Store) notLeader() error {
	if id, address := s.Leader(); id != "" {
		return fmt.Errorf("%w, %s at %s is", ErrNotLeader, id, address)
	}
	return fmt.Errorf("%w, and none is known", ErrNotLeader)
}

// unknown is the error of a caller who stopped waiting for a proposal.
func unknown(ctx context.Context) error {
	return fmt.Errorf("waiting for a transaction to be applied, whether it is remains unknown (retry it with the same key): %w", context.Cause(ctx))
}
