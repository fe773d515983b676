package raftstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Member is one server of the raft configuration.
type Member struct {
	ID      string
	Address string // host:port
	Voter   bool
	Leader  bool
}

// Members returns the servers of the newest configuration that this server knows,
// committed or not, in its order.
func (s *Store) Members() []Member {
	leader, _ := s.Leader()
	var list []Member
	for _, server := range s.raft.GetConfiguration().Configuration().Servers {
		list = append(list, Member{
			ID: string(server.ID), Address: string(server.Address), Voter: server.Suffrage == raft.Voter, Leader: string(server.ID) == leader,
		})
	}
	return list
}

// SetMember adds a server to the cluster, or changes its address or its vote. Only
// the leader can. It returns once the change is committed. One that was added has to
// catch up: give it a vote only when it has. A [*TooOldError] says that it could not read
// what the cluster has written; nothing was changed.
func (s *Store) SetMember(ctx context.Context, m Member) error {
	id, address := raft.ServerID(m.ID), raft.ServerAddress(m.Address)
	known := false
	for _, other := range s.Members() {
		if other.Address == m.Address && other.ID != m.ID {
			return fmt.Errorf("add server %s: %s is at %s already: remove it first", m.ID, other.ID, m.Address)
		}
		if other.ID != m.ID {
			continue
		}
		known = true
		if other.Address == m.Address && other.Voter == m.Voter {
			return nil
		}
		if other.Voter && !m.Voter {
			return s.change(ctx, "take the vote of", m.ID, func() raft.Future { return s.raft.DemoteVoter(id, 0, 0) })
		}
	}
	if !known {
		done, err := s.letIn(m.ID)
		if err != nil {
			return fmt.Errorf("add server %s: %w", m.ID, err)
		}
		defer done()
	}
	return s.change(ctx, "add", m.ID, func() raft.Future {
		if m.Voter {
			return s.raft.AddVoter(id, address, 0, 0)
		}
		return s.raft.AddNonvoter(id, address, 0, 0)
	})
}

// RemoveMember takes a server out of the cluster. Only the leader can; one that
// removes itself stops to lead. It refuses to remove the last voter.
func (s *Store) RemoveMember(ctx context.Context, id string) error {
	voters, found := 0, false
	for _, m := range s.Members() {
		if m.Voter && m.ID != id {
			voters++
		}
		found = found || m.ID == id
	}
	switch {
	case !found:
		return nil
	case voters == 0:
		return fmt.Errorf("remove server %s: it is the only one with a vote, the cluster would be lost", id)
	}
	return s.change(ctx, "remove", id, func() raft.Future { return s.raft.RemoveServer(raft.ServerID(id), 0, 0) })
}

func (s *Store) change(ctx context.Context, verb, id string, question func() raft.Future) error {
	if !s.IsLeader() {
		return s.notLeader()
	}
	if err := s.ask(ctx, question); err != nil {
		return fmt.Errorf("%s server %s: %w", verb, id, s.raftError(err))
	}
	return nil
}

// TransferLeadership hands the lead over to the server id, or to the one that is
// closest behind when id is empty. It returns when the other one has been told to
// take it. After one that failed, the next one in the same term has to wait, see [handover].
func (s *Store) TransferLeadership(ctx context.Context, id string) error {
	question := func() raft.Future { return s.raft.LeadershipTransfer() }
	if id != "" {
		to := raft.ServerAddress("")
		for _, m := range s.Members() {
			if m.ID == id && m.Voter {
				to = raft.ServerAddress(m.Address)
			}
		}
		if to == "" {
			return fmt.Errorf("hand the lead over to %s: there is no such server with a vote", id)
		}
		question = func() raft.Future { return s.raft.LeadershipTransferToServer(raft.ServerID(id), to) }
	}
	now, term := time.Now(), s.raft.CurrentTerm()
	if err := s.handover.allowed(now, term); err != nil {
		return fmt.Errorf("hand the lead over to %s: %w", cmp.Or(id, "another server"), err)
	}
	err := s.change(ctx, "hand the lead over to", id, question)
	if err != nil && !errors.Is(err, ErrNotLeader) {
		s.handover.failed(now, term)
	}
	return err
}

// handover keeps a second attempt away from raft for as long as the first may hang there.
//
// Raft hands its wish to the goroutine that replicates to the other server, through a
// channel with room for one. If that goroutine hangs, a second wish waits for room, and
// goes on to wait after the lead was lost, when nobody takes wishes any more: raft 1.7.3
// then holds a transfer for going on for ever, and refuses everything if this server
// leads again. The simulator found this.
type handover struct {
	mu   sync.Mutex
	term uint64
	at   time.Time
}

// handoverRest is more than the longest time that raft waits between two attempts to
// reach a server that does not answer (41 s), and the attempt itself.
const handoverRest = time.Minute

func (h *handover) allowed(now time.Time, term uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if left := h.at.Add(handoverRest).Sub(now); h.term == term && left > 0 {
		return fmt.Errorf("the one that was asked %s ago did not take it, and may hang: ask again in %s",
			now.Sub(h.at).Round(time.Second), left.Round(time.Second))
	}
	return nil
}

func (h *handover) failed(at time.Time, term uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.term, h.at = term, at
}

// HandOver lets another server lead before this one stops, so that nobody has to
// notice its absence first. Without another voter there is nothing to do. It takes two
// election timeouts at most. Close does it too; who ends the network of a server
// before its store calls it first.
func (s *Store) HandOver() {
	if s.raft == nil || !s.IsLeader() || s.refusal() != nil {
		return
	}
	others := 0
	for _, m := range s.Members() {
		if m.Voter && m.ID != s.cfg.NodeID {
			others++
		}
	}
	if others == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*s.cfg.ElectionTimeout)
	defer cancel()
	if err := s.TransferLeadership(ctx, ""); err != nil && !errors.Is(err, ErrNotLeader) {
		s.log.Info("stopping without handing over the lead", "error", err)
	}
}

// LeaderGone tells the store that the process of the leader id has certainly ended,
// so that there is nothing to wait for: this server stands for election at once. It
// does nothing if another server leads, or if this one has no vote. A false alarm
// costs an election and no data.
func (s *Store) LeaderGone(id string) {
	// Who was asked for its vote knows of no leader.
	if leader, _ := s.Leader(); leader != "" && leader != id || s.IsLeader() || s.refusal() != nil {
		return
	}
	for _, m := range s.Members() {
		if m.ID == s.cfg.NodeID && m.Voter {
			s.campaign()
		}
	}
}

// campaignIfAlone lets the only voter of a cluster stand for election at once:
// nobody else could lead, so there is no leader to wait for.
func (s *Store) campaignIfAlone() {
	voters := 0
	self := false
	for _, m := range s.Members() {
		if m.Voter {
			voters++
			self = self || m.ID == s.cfg.NodeID
		}
	}
	if voters == 1 && self {
		s.campaign()
	}
}

// campaign makes this server stand for election. The message is the one that a leader
// sends to hand over; failing to send it costs one timeout.
func (s *Store) campaign() {
	id, address := raft.ServerID(s.cfg.NodeID), s.cfg.Transport.LocalAddr()
	request := raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersionMax,
		ID:              []byte(id),
		Addr:            s.cfg.Transport.EncodePeer(id, address),
	}}
	if err := s.cfg.Transport.TimeoutNow(id, address, &request, &raft.TimeoutNowResponse{}); err != nil {
		s.log.Warn("standing for election at once", "error", err)
	}
}

// Lag says how old this server's view may be: for how long it has not heard from the
// leader, and how many entries it knows of and has not applied. A leader that lost its
// quorum without knowing it calls itself up to date for up to LeaderLeaseTimeout.
func (s *Store) Lag() string {
	behind := s.raft.CommitIndex() - min(s.raft.CommitIndex(), s.raft.AppliedIndex())
	last := s.raft.LastContact()
	switch {
	case s.IsLeader():
		return "0s, this server leads"
	case last.IsZero():
		return "unknown, no leader was heard of since this server started"
	}
	return fmt.Sprintf("%s since the leader was heard of, %d entries to apply", time.Since(last).Round(time.Millisecond), behind)
}

// Progress says how far this server is.
type Progress struct {
	Term      uint64 `json:"term"`
	LastIndex uint64 `json:"lastIndex"` // of the log on its disk
	Commit    uint64 `json:"commit"`
	Applied   uint64 `json:"applied"`
	Revision  uint64 `json:"revision"`
}

// Progress returns how far this server is, as of now.
func (s *Store) Progress() Progress {
	return Progress{
		Term: s.raft.CurrentTerm(), LastIndex: s.raft.LastIndex(), Commit: s.raft.CommitIndex(), Applied: s.raft.AppliedIndex(),
		Revision: s.View().Revision(),
	}
}
