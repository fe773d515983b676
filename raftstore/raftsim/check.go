package raftsim

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
)

// final is what the servers agree on in the end.
type final struct{ revision uint64 }

// settleTime is how long a cluster may take to recover when all faults are over.
const settleTime = 2 * time.Minute

// settle waits until every member has the same state, and compares these.
func (c *cluster) settle() bool {
	ctx, cancel := context.WithTimeout(c.ctx, settleTime)
	defer cancel()
	c.pause(ctx, time.Second) // what clients who are gone have sent may still arrive
	if !c.checkMembers(ctx) || !c.bury(ctx) {
		return false
	}
	// Every member can write, and so sees what all wrote. What it writes is large: that
	// can be when the cluster knows of every member that it is upgraded.
	ok := c.eachMember(ctx, "has not recovered", func(ctx context.Context, s *server, r *run) error {
		txn := command.Txn{Key: "settle-" + s.id, Actor: "user/sim"}
		txn.Mutations = (&operation{verb: create, names: []string{"settled-" + s.id}, value: "1", large: true}).mutations()
		result, err := r.store.Propose(ctx, txn)
		for err != nil && ctx.Err() == nil {
			c.pause(ctx, 100*time.Millisecond)
			result, err = r.store.Propose(ctx, txn)
		}
		c.final.revision = max(c.final.revision, result.Revision)
		return errors.Join(err, result.Err())
	})
	ok = ok && c.eachMember(ctx, "has not caught up", func(ctx context.Context, _ *server, r *run) error {
		_, err := r.store.AwaitRevision(ctx, c.final.revision)
		c.recorder.drain(r)
		c.recorder.compare(r)
		return err
	})
	if !ok {
		return false
	}
	c.trace.add("settled at %d", c.final.revision)
	return c.eachMember(ctx, "has not told its watchers", func(ctx context.Context, _ *server, r *run) error {
		for _, w := range c.watchers {
			w.finish(ctx, r, c.final.revision)
		}
		return ctx.Err()
	})
}

// eachMember does something on every member of the cluster. A server that is no member
// any more when it fails is forgiven: changes of the membership can be late.
func (c *cluster) eachMember(ctx context.Context, complaint string, do func(context.Context, *server, *run) error) bool {
	for _, s := range c.servers {
		if !c.isMember(ctx, s) {
			continue
		}
		r := s.current()
		if r == nil {
			c.fail("%s is a member, and has ended", s.id)
			return false
		}
		turn, cancel := context.WithTimeout(ctx, settleTime/2)
		err := do(turn, s, r)
		cancel()
		if err != nil && c.isMember(ctx, s) {
			c.fail("%s %s: %v", s.id, complaint, err)
			return false
		}
	}
	return true
}

// isMember asks the leader, when there is one.
func (c *cluster) isMember(ctx context.Context, s *server) bool {
	for {
		if lead, members := c.members(); lead != nil {
			_, ok := members[s.member()]
			return ok
		}
		if ctx.Err() != nil {
			return true
		}
		c.pause(ctx, 20*time.Millisecond)
	}
}

// past is the history of the cluster as its servers told it.
type past struct {
	revision uint64
	changes  map[uint64]change
	states   map[uint64]map[string]entry
}

// at returns the objects at a revision.
func (p *past) at(revision uint64) map[string]entry { return p.states[revision] }

// check checks everything that needs the whole history.
func (c *cluster) check() {
	p := c.replay()
	for _, w := range c.watchers {
		w.check(p)
	}
	c.checkWrites(p)
	c.checkOrder(p)
	c.checkPorcupine(p)
}

// replay puts the changes together.
func (c *cluster) replay() *past {
	p := &past{revision: c.final.revision, changes: c.recorder.changes, states: map[uint64]map[string]entry{}}
	now := map[string]entry{}
	p.states[0], p.states[1] = nil, map[string]entry{}
	for r := uint64(2); r <= p.revision; r++ {
		e, ok := p.changes[r]
		if !ok {
			c.fail("no server told of revision %d of %d", r, p.revision)
			return p
		}
		switch {
		case e.name == "":
		case e.typ == raftstore.Deleted:
			delete(now, e.name)
		default:
			now[e.name] = entry{e.value, r}
		}
		p.states[r] = maps.Clone(now)
	}
	return p
}

// checkWrites makes sure that what was acknowledged happened, and that nothing happened
// twice or without anybody asking.
func (c *cluster) checkWrites(p *past) {
	wrote := map[string]int{} // by object and value
	for _, e := range p.changes {
		if e.name != "" && e.typ != raftstore.Deleted {
			wrote[e.name+"="+e.value]++
		}
	}
	for what, n := range wrote {
		if n > 1 {
			c.fail("%s was written %d times", what, n)
		}
	}
	for _, o := range c.history.ops {
		if o.verb == get || o.verb == list {
			continue
		}
		for i, name := range o.names {
			happened := wrote[name+"="+o.value] > 0
			at := o.revision - uint64(len(o.names)-1-i)
			switch {
			case o.outcome == rejected && o.verb != remove && happened:
				c.fail("was rejected, and happened: %v", o)
			case o.outcome == done && o.verb == remove && p.changes[at] != change{raftstore.Deleted, name, p.states[at-1][name].value}:
				c.fail("was acknowledged, and did not happen: %v", o)
			case o.outcome == done && o.verb != remove && p.states[at][name] != entry{o.value, at}:
				c.fail("was acknowledged, and did not happen: %v: %s at %d is %v", o, name, at, p.states[at][name])
			}
		}
	}
}

// checkOrder makes sure that revisions follow real time, and that a reader saw exactly
// the state of its revision. Together these say that the history is linearizable, in
// the order of revisions.
func (c *cluster) checkOrder(p *past) {
	ops := slices.Clone(c.history.ops)
	ends := slices.Clone(ops)
	slices.SortFunc(ops, func(a, b *operation) int { return int(a.call - b.call) })
	slices.SortFunc(ends, func(a, b *operation) int { return int(a.end - b.end) })
	newest, next := &operation{}, 0
	for _, o := range ops {
		for ; ends[next].end < o.call; next++ {
			if e := ends[next]; e.outcome == done && e.revision > newest.revision {
				newest = e
			}
		}
		reads := o.verb == get || o.verb == list
		switch {
		case o.outcome != done:
		case reads && o.revision < newest.revision:
			c.fail("an old state was read: %v, after %v", o, newest)
		case !reads && o.revision <= newest.revision:
			c.fail("was written in the past: %v, after %v", o, newest)
		case reads && !maps.Equal(o.seen, p.at(o.revision)):
			c.fail("another state was read: %v: %v", o, difference(o.seen, p.at(o.revision)))
		}
	}
}
