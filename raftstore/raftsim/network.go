package raftsim

import (
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// network carries messages between servers: late, in another order, twice or never.
type network struct {
	trace *trace

	mu    sync.Mutex
	rnd   *rand.Rand
	usual weather
	links map[route]*link
	wires map[raft.ServerAddress]*wire // of the servers that run
}

type route struct{ from, to raft.ServerAddress }

// weather is what a link does to messages.
type weather struct {
	low, high           time.Duration // latency
	loss, twice, detour float64       // probabilities
}

// detourDelay is how much later than others a message on a detour may come.
const detourDelay = 80 * time.Millisecond

// link is one direction between two servers.
type link struct {
	weather
	cut  bool
	last time.Time // when the newest message in order arrives
}

func newNetwork(rnd *rand.Rand, t *trace) *network {
	n := &network{trace: t, rnd: rnd, links: map[route]*link{}, wires: map[raft.ServerAddress]*wire{}}
	n.usual = weather{low: 100 * time.Microsecond, high: between(rnd, 500*time.Microsecond, 8*time.Millisecond)}
	if chance(rnd, 0.5) {
		n.usual.loss, n.usual.twice, n.usual.detour = 0.03*rnd.Float64(), 0.05*rnd.Float64(), 0.05*rnd.Float64()
	}
	return n
}

// link must be called with mu held.
func (n *network) link(from, to raft.ServerAddress) *link {
	l := n.links[route{from, to}]
	if l == nil {
		l = &link{weather: n.usual}
		n.links[route{from, to}] = l
	}
	return l
}

// cut cuts or mends one direction.
func (n *network) cut(from, to raft.ServerAddress, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.link(from, to).cut = cut
}

// heal mends everything, and lets nothing get lost any more.
func (n *network) heal(calm bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if calm {
		n.usual = weather{low: 100 * time.Microsecond, high: time.Millisecond}
	}
	for _, l := range n.links {
		l.cut, l.weather = false, n.usual
	}
}

// storm makes one direction bad.
func (n *network) storm(from, to raft.ServerAddress, w weather) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.link(from, to).weather = w
}

// reaches reports whether a message would get through now.
func (n *network) reaches(from, to raft.ServerAddress) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.link(from, to).cut && n.wires[to] != nil
}

// carry brings a message to where to is when it arrives. twice says whether the message
// is of a kind that may come twice. arrive runs on a goroutine of its own, if at all.
func (n *network) carry(from, to raft.ServerAddress, what string, twice bool, arrive func(*wire)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.link(from, to)
	if l.cut || chance(n.rnd, l.loss) {
		n.trace.add("%s>%s %s lost", from, to, what)
		return
	}
	n.deliver(l, from, to, what, arrive)
	if twice && chance(n.rnd, l.twice) {
		n.deliver(l, from, to, what+" again", arrive)
	}
}

// deliver must be called with mu held.
func (n *network) deliver(l *link, from, to raft.ServerAddress, what string, arrive func(*wire)) {
	now := time.Now()
	at := now.Add(between(n.rnd, l.low, l.high))
	if chance(n.rnd, l.detour) {
		at = at.Add(between(n.rnd, 0, detourDelay))
	} else if at.Before(l.last) {
		at = l.last.Add(time.Microsecond)
		l.last = at
	} else {
		l.last = at
	}
	time.AfterFunc(at.Sub(now), func() {
		n.mu.Lock()
		target, cut := n.wires[to], l.cut
		n.mu.Unlock()
		if target == nil || cut {
			n.trace.add("%s>%s %s lost on the way", from, to, what)
			return
		}
		n.trace.add("%s>%s %s", from, to, what)
		arrive(target)
	})
}

var (
	errTimeout = errors.New("no answer in time")
	errCut     = errors.New("cannot be reached")
)

// patience is when a connection breaks: what was asked over it may still arrive.
func (n *network) patience() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return between(n.rnd, breakAfter/10, breakAfter)
}

// plug makes a server reachable, or takes it away when w is nil.
func (n *network) plug(at raft.ServerAddress, w *wire) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w == nil {
		delete(n.wires, at)
		return
	}
	n.wires[at] = w
}
