package raftsim

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"decree.dev/decree/raftstore/command"
)

// nemesis makes the faults.
type nemesis struct {
	cluster *cluster
	rnd     *rand.Rand
	faults  []fault
	mu      sync.Mutex
	counts  map[string]int
	calls   sync.WaitGroup // of membership and the like, which take their time
	changes atomic.Int64   // of the membership, that are under way
}

// fault is one kind of trouble.
type fault struct {
	name string
	make func(ctx context.Context)
}

func newNemesis(c *cluster) *nemesis {
	n := &nemesis{cluster: c, rnd: stream(c.options.Seed, "nemesis"), counts: map[string]int{}}
	all := []fault{
		{"partition", n.partition}, {"one-way cut", n.oneWay}, {"isolated leader", n.isolateLeader}, {"mend", n.mend}, {"storm", n.storm},
		{"crash", n.crash}, {"leader crash", n.crashLeader}, {"crash of all", n.crashAll}, {"restart", n.restart},
		{"slow disk", n.slowDisk}, {"full disk", n.fullDisk}, {"clock step", n.clockStep},
		{"snapshot", n.snapshot}, {"transfer", n.transfer}, {"join", n.join}, {"remove", n.remove}, {"long crash", n.longCrash}, {"lost disk", n.loseDisk},
	}
	// Each seed has a taste: what happens together matters more than that all happens.
	for _, f := range all {
		for range n.rnd.IntN(4) {
			n.faults = append(n.faults, f)
		}
	}
	n.faults = append(n.faults, fault{"mend", n.mend})
	if c.options.Upgrade {
		n.faults = append(n.faults, slices.Repeat([]fault{{"upgrade", n.upgrade}}, 2+len(n.faults)/3)...)
	}
	return n
}

// work makes faults until ctx ends.
func (n *nemesis) work(ctx context.Context) {
	for {
		n.cluster.pause(ctx, between(n.rnd, 50*time.Millisecond, 700*time.Millisecond))
		if ctx.Err() != nil {
			return
		}
		f := n.faults[n.rnd.IntN(len(n.faults))]
		n.count(f.name)
		f.make(ctx)
	}
}

// count notes that something happened to a cluster.
func (n *nemesis) count(what string) {
	n.cluster.trace.add("fault %s", what)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.counts[what]++
}

// heal ends all faults and starts all servers.
func (n *nemesis) heal() {
	n.calls.Wait()
	c := n.cluster
	c.net.heal(true)
	c.autopilot.calm()
	for _, s := range c.servers {
		s.setDisk(false, 0)
		s.format.Store(command.Newest)
		// A disk that was full may have left hashicorp/raft with a wrong idea of its log.
		if r := s.current(); r != nil && (r.format != command.Newest || s.wasFull.Load()) {
			s.restart()
		}
		if err := s.start(); err != nil {
			c.fail("%v", err)
		}
	}
	c.trace.add("healed")
}

func (n *nemesis) server() *server { return n.cluster.servers[n.rnd.IntN(len(n.cluster.servers))] }

// leader is the server that others take for the leader.
func (n *nemesis) leader() *server {
	for _, s := range n.cluster.servers {
		if r := s.current(); r != nil && r.store.IsLeader() {
			return s
		}
	}
	return n.server()
}

// later runs f after a while, in spite of everything else.
func (n *nemesis) later(ctx context.Context, high time.Duration, f func()) {
	d := between(n.rnd, high/20, high)
	n.calls.Go(func() { n.cluster.pause(ctx, d); f() })
}

func (n *nemesis) partition(context.Context) {
	side := map[*server]bool{}
	for _, s := range n.cluster.servers {
		side[s] = chance(n.rnd, 0.5)
	}
	for _, a := range n.cluster.servers {
		for _, b := range n.cluster.servers {
			n.cluster.net.cut(a.address(), b.address(), side[a] != side[b])
		}
	}
}

func (n *nemesis) oneWay(context.Context) {
	n.cluster.net.cut(n.server().address(), n.server().address(), true)
}

func (n *nemesis) isolateLeader(context.Context) {
	lead := n.leader()
	deaf := n.rnd.IntN(3) // cannot hear, cannot speak, or neither
	for _, s := range n.cluster.servers {
		if s != lead {
			n.cluster.net.cut(s.address(), lead.address(), deaf != 0)
			n.cluster.net.cut(lead.address(), s.address(), deaf != 1)
		}
	}
}

func (n *nemesis) mend(context.Context) { n.cluster.net.heal(false) }

func (n *nemesis) storm(context.Context) {
	w := weather{low: time.Millisecond, high: between(n.rnd, 2*time.Millisecond, 150*time.Millisecond), loss: 0.3 * n.rnd.Float64(), twice: 0.3, detour: 0.3}
	s := n.server()
	for _, other := range n.cluster.servers {
		n.cluster.net.storm(s.address(), other.address(), w)
		n.cluster.net.storm(other.address(), s.address(), w)
	}
}

func (n *nemesis) down(ctx context.Context, s *server, stop func()) {
	n.downFor(ctx, 2*time.Second, s, stop)
}

func (n *nemesis) downFor(ctx context.Context, high time.Duration, s *server, stop func()) {
	stop()
	n.later(ctx, high, func() {
		if err := s.start(); err != nil {
			n.cluster.fail("%v", err)
		}
	})
}

func (n *nemesis) crash(ctx context.Context) {
	s := n.server()
	n.down(ctx, s, s.crash)
}

func (n *nemesis) crashLeader(ctx context.Context) {
	s := n.leader()
	n.down(ctx, s, s.crash)
}

func (n *nemesis) crashAll(ctx context.Context) {
	for _, s := range n.cluster.servers {
		n.down(ctx, s, s.crash)
	}
}

// longCrash keeps a server down for so long that it may be removed.
func (n *nemesis) longCrash(ctx context.Context) {
	s := n.server()
	n.downFor(ctx, 8*time.Second, s, s.crash)
}

// loseDisk has a server crash and come back with an empty disk, if all are well: of what
// was acknowledged, one copy is lost. The version that is then installed may be too old.
func (n *nemesis) loseDisk(ctx context.Context) {
	s := n.server()
	if voters, well := n.cluster.voters(); !well || voters < 3 || n.changes.Load() > 0 {
		return
	}
	older := n.cluster.options.Upgrade && chance(n.rnd, 0.5)
	n.down(ctx, s, func() {
		s.crash()
		if s.reinstall() && older {
			s.format.Store(command.Newest - 1)
		}
	})
}

func (n *nemesis) restart(context.Context) {
	n.calls.Go(n.server().restart)
}

// upgrade restarts a server as the next version, if there is one left to upgrade. One
// that waits to join is forgotten.
func (n *nemesis) upgrade(context.Context) {
	for _, s := range n.cluster.servers {
		if s.hasRun() && s.format.Swap(command.Newest) != command.Newest {
			n.calls.Go(s.restart)
			return
		}
	}
}

func (n *nemesis) slowDisk(ctx context.Context) {
	s := n.server()
	s.setDisk(s.diskFull(), between(n.rnd, 5*time.Millisecond, 400*time.Millisecond))
	n.later(ctx, 2*time.Second, func() { s.setDisk(s.diskFull(), 0) })
}

func (n *nemesis) fullDisk(ctx context.Context) {
	s := n.server()
	s.wasFull.Store(true)
	s.setDisk(true, 0)
	n.later(ctx, 2*time.Second, func() { s.setDisk(false, 0) })
}

func (n *nemesis) clockStep(context.Context) {
	n.server().clock.Store(int64(between(n.rnd, -2*time.Hour, 2*time.Hour)))
}

func (n *nemesis) snapshot(context.Context) {
	if r := n.server().current(); r != nil {
		n.calls.Go(func() {
			err := r.store.Snapshot() // may fail in a thousand ways, and must do no harm
			n.cluster.trace.add("%s snapshot: %v", r.server.id, err)
		})
	}
}

func (n *nemesis) transfer(ctx context.Context) {
	to := ""
	if chance(n.rnd, 0.5) {
		to = n.server().member()
	}
	n.onLeader(ctx, "transfer to "+to, func(ctx context.Context, lead *run) error { return lead.keeper.Transfer(ctx, to) })
}

// join has a server announce itself, and so join the cluster if it is no member: with a
// vote that it wants, or without.
func (n *nemesis) join(ctx context.Context) {
	s := n.server()
	if _, well := n.cluster.voters(); well {
		s.nonVoter.Store(chance(n.rnd, 0.3))
	}
	n.calls.Go(func() { s.enter(ctx) })
}

// remove takes a server out, as long as three stay.
func (n *nemesis) remove(ctx context.Context) {
	s := n.server()
	_, members := n.cluster.members()
	if _, well := n.cluster.voters(); !well || len(members) <= 3 {
		return
	}
	id := s.member()
	n.cluster.autopilot.excuse(id)
	n.onLeader(ctx, "remove "+id, func(ctx context.Context, lead *run) error { return lead.keeper.Remove(ctx, id, "a fault") })
	if lead := n.leader().current(); lead != nil && chance(n.rnd, 0.3) {
		n.cluster.autopilot.halfway(id, func() { lead.server.crashRun(lead) })
		n.down(ctx, lead.server, func() {})
	}
}

// onLeader asks the leader for something that may take its time.
func (n *nemesis) onLeader(ctx context.Context, what string, f func(context.Context, *run) error) {
	r := n.leader().current()
	if r == nil {
		return
	}
	n.changes.Add(1)
	n.calls.Go(func() {
		defer n.changes.Add(-1)
		ctx, cancel := n.cluster.within(ctx, r, 2*time.Second)
		defer cancel()
		n.cluster.trace.add("%s %s: %v", r.server.id, what, f(ctx, r))
	})
}

func (s *server) setDisk(full bool, slow time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disk.set(full, slow)
}

func (s *server) diskFull() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	return s.disk.full
}
