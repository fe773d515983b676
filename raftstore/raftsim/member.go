package raftsim

import (
	"context"
	"fmt"
	"slices"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/schemas/api"
)

// self is what the server says of itself.
func (r *run) self() membership.Self {
	return membership.Self{
		ID:           r.id,
		ServerSpec:   api.ServerSpec{Node: r.server.id, Address: r.server.id, NonVoter: r.nonVoter},
		ServerStatus: api.ServerStatus{Format: r.format},
	}
}

// announce tells the cluster about this run, and so joins it, until the cluster knows.
// A server that is refused for good ends.
func (r *run) announce() {
	c := r.server.cluster
	for r.ctx.Err() == nil {
		err := r.announceOnce()
		c.trace.add("%s announces itself as %s: %v", r.server.id, r.id, err)
		switch {
		case err == nil:
			r.admitted.Store(true)
			return
		case membership.IsRemoved(err) || membership.IsTooOld(err):
			c.nemesis.count("refused")
			r.server.crashRun(r)
			return
		}
		c.pause(r.ctx, breakAfter)
	}
}

func (r *run) announceOnce() error {
	c := r.server.cluster
	ctx, cancel := c.within(c.ctx, r, 2*time.Second)
	defer cancel()
	if r.store.Leads() {
		return r.keeper.AdmitHere(ctx, r.self())
	}
	var others []string
	if _, leader := r.store.Leader(); leader != "" && leader != r.server.id {
		others = append(others, leader)
	}
	for _, s := range c.servers {
		if s != r.server {
			others = append(others, s.id)
		}
	}
	return r.keeper.Announce(ctx, others)
}

// lead looks after the servers whenever this one leads.
func (r *run) lead() {
	for r.ctx.Err() == nil {
		changed := r.store.LeaderChange()
		if r.store.Leads() {
			r.tenure()
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
		}
	}
}

// tenure looks after the servers until another one leads.
func (r *run) tenure() {
	c := r.server.cluster
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	c.work.Go(func() {
		defer cancel()
		for {
			changed := r.store.LeaderChange()
			if !r.store.Leads() {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	})
	c.autopilot.began(r)
	for ctx.Err() == nil {
		err := r.keeper.AdmitHere(ctx, r.self())
		if err == nil {
			r.keeper.Lead(ctx)
			return
		}
		c.trace.add("%s leads: %v", r.server.id, err)
		c.pause(ctx, breakAfter)
	}
}

// enter has a server announce itself, and so become a member. If it was removed, an
// operator makes a token for it, and empties its disk.
func (s *server) enter(ctx context.Context) {
	if lead, _ := s.cluster.members(); lead != nil && lead.server != s && s.forgiven(ctx, lead) {
		s.crash()
		s.reinstall()
	}
	s.restart()
}

// forgiven reports whether the server was removed, and may come back.
func (s *server) forgiven(ctx context.Context, lead *run) bool {
	c := s.cluster
	ctx, cancel := c.within(ctx, lead, 2*time.Second)
	defer cancel()
	view, err := lead.store.Read(ctx)
	if err != nil {
		return false
	}
	txn := command.Txn{Actor: "user/sim", Reason: "a token for " + s.id}
	for o := range api.List[*api.Server](view, "") {
		if o.Spec.Node == s.id && o.Status.Removed != nil {
			txn.Mutations = append(txn.Mutations, api.Guarded(api.Delete, o))
		}
	}
	if txn.Mutations == nil || s.isMember(lead) { // its disk is needed for as long as it is one
		return false
	}
	result, err := lead.store.Propose(ctx, txn)
	return err == nil && result.Err() == nil && lead.store.Leads() && !s.isMember(lead)
}

// isMember reports whether another one takes the server for a member.
func (s *server) isMember(by *run) bool {
	return slices.ContainsFunc(by.store.Members(), func(m raftstore.Member) bool { return m.ID == s.member() })
}

// grow adds servers to the first one, until all have a vote that the cluster begins with.
func (c *cluster) grow(ctx context.Context) error {
	for _, s := range c.servers[1:c.size] {
		if err := s.start(); err != nil {
			return err
		}
	}
	for {
		voters, _ := c.voters()
		if voters == c.size {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%d of %d servers vote: %w", voters, c.size, context.Cause(ctx))
		}
		c.pause(ctx, 50*time.Millisecond)
	}
}

// voters counts the members with a vote. They are well if all of them are there, have
// answered the leader lately, know the configuration, and want their votes.
func (c *cluster) voters() (n int, well bool) {
	lead, members := c.members()
	well = lead != nil
	for id, m := range members {
		if m.Voter {
			n++
			well = well && slices.ContainsFunc(c.servers, func(s *server) bool { return s.member() == id && s.isWell(lead) })
		}
	}
	return n, well
}

func (s *server) isWell(lead *run) bool {
	r := s.current()
	if r == nil || r.nonVoter || s.nonVoter.Load() {
		return false
	}
	same := slices.EqualFunc(r.store.Members(), lead.store.Members(), func(a, b raftstore.Member) bool { return a.ID == b.ID && a.Voter == b.Voter })
	return same && (r == lead || s.cluster.autopilot.answeredWithin(lead, r.id, 2*breakAfter))
}
