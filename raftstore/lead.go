package raftstore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/command"
)

// formatEvery is the time between two looks at what the servers understand.
const formatEvery = 200 * time.Millisecond

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
	// Other servers may say at any time that they understand more.
	formats := time.NewTicker(formatEvery)
	defer formats.Stop()
	stuck := false
	var noted leadership
	for {
		if s.IsLeader() {
			if err := s.establish(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("taking the lead", "error", err)
			}
		}
		s.becomeReady()
		if now := s.leadership(); now != noted {
			noted = now
			s.noteLeaderChange()
		}
		select {
		case <-ctx.Done():
			return
		case <-s.raft.LeaderCh():
		case <-changes:
		case <-s.fsm.settled:
		case <-formats.C:
			if was := stuck; s.stuck(&stuck) && was {
				s.campaign()
			}
			if s.Leads() {
				s.settleFormat()
				continue
			}
		}
	}
}

// leadership is what waits for LeaderChange are about.
type leadership struct {
	leader string
	term   uint64
	leads  bool
}

func (s *Store) leadership() leadership {
	id, _ := s.Leader()
	return leadership{leader: id, term: s.raft.CurrentTerm(), leads: s.Leads()}
}

// stuck notes whether this server stands for election and yet takes another one for the
// leader. That is a mistake of hashicorp/raft 1.7.3, which it does not get out of: a
// message of a leader that comes after the one with which it hands over is taken down,
// and from then on the candidate refuses its vote to everybody, because there is a
// leader. Standing again as at a handover forgets that one.
func (s *Store) stuck(now *bool) bool {
	id, _ := s.Leader()
	*now = s.raft.State() == raft.Candidate && id != "" && id != s.cfg.NodeID
	return *now
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

// becomeReady closes Ready when its conditions hold.
func (s *Store) becomeReady() {
	select {
	case <-s.ready:
		return
	default:
	}
	settings := s.View().Settings()
	if id, _ := s.Leader(); id == "" || settings == nil || s.fsm.fatal.Load() != nil {
		return
	}
	if s.IsLeader() && !s.Leads() {
		return
	}
	if err := s.identity.join(settings.ClusterID); err != nil {
		s.fsm.fail(fmt.Errorf("%w: %w", ErrFatal, err))
		return
	}
	close(s.ready)
}

// Leads reports whether this server leads and has applied all that earlier leaders
// acknowledged, as far as it knows.
func (s *Store) Leads() bool { return s.IsLeader() && s.readTerm.Load() == s.raft.CurrentTerm() }

func newClusterID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
