package raftsim

import (
	"context"
	"errors"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// grow adds servers to the first one, until all are there that the cluster begins with.
func (c *cluster) grow(ctx context.Context) error {
	for _, s := range c.servers[:c.size] {
		err := errors.New("nobody leads")
		for err != nil {
			if lead, _ := c.members(); lead != nil {
				err = s.admit(ctx, lead.store, true)
			}
			if ctx.Err() != nil {
				return fmt.Errorf("%w: %w", context.Cause(ctx), err)
			}
			c.pause(ctx, 20*time.Millisecond)
		}
	}
	return nil
}

// admit adds a server to the cluster, on the leader, as raftstore/membership does: first
// the word of what it understands, then the membership.
func (s *server) admit(ctx context.Context, lead *raftstore.Store, voter bool) error {
	view, err := lead.Read(ctx)
	if err != nil {
		return err
	}
	if err := introduce(ctx, lead, view, s.id, int(s.format.Load())); err != nil {
		return err
	}
	return lead.SetMember(ctx, raftstore.Member{ID: s.id, Address: s.id, Voter: voter})
}

// announce tells the cluster what this run understands, until the cluster knows.
func (r *run) announce() {
	c := r.server.cluster
	for r.ctx.Err() == nil {
		ctx, cancel := c.within(c.ctx, r, 2*time.Second)
		view, ok := c.read(ctx, r, time.Second)
		if ok && r.isMember() {
			if known, _ := formatOf(view, r.server.id); known == r.format {
				cancel()
				return
			}
			err := introduce(ctx, r.store, view, r.server.id, r.format)
			c.trace.add("%s announces format %d: %v", r.server.id, r.format, err)
		}
		cancel()
		c.pause(r.ctx, breakAfter)
	}
}

// isMember reports whether this run takes its server for a member.
func (r *run) isMember() bool {
	for _, m := range r.store.Members() {
		if m.ID == r.server.id {
			return true
		}
	}
	return false
}

// formatOf is what a server has said that it understands.
func formatOf(view *state.State, id string) (format int, known bool) {
	o, known := api.Get[*api.Server](view, "", id)
	if known {
		format = o.Status.Format
	}
	return format, known
}

// introduce writes what a server understands, unless that is there.
func introduce(ctx context.Context, s *raftstore.Store, view *state.State, id string, format int) error {
	have, known := formatOf(view, id)
	if have == format {
		return nil
	}
	o := &api.Server{ObjectMeta: metav1.ObjectMeta{Name: id}, Spec: api.ServerSpec{Node: id, Address: id}, Status: api.ServerStatus{Format: format}}
	o.SetGroupVersionKind(api.GroupVersion.WithKind("Server"))
	m := api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o}
	if known {
		m.Verb = api.UpdateStatus
	}
	result, err := s.Propose(ctx, command.Txn{Actor: "server/" + id, Reason: "announce", Mutations: []api.Mutation{m}})
	if err == nil {
		err = result.Err()
	}
	if err != nil {
		return fmt.Errorf("announce %s: %w", id, err)
	}
	return nil
}
