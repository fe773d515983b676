package raftsim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/state"
)

// cluster is everything that a seed makes.
type cluster struct {
	options Options
	size    int // servers at the beginning; one more waits to be joined
	rnd     *rand.Rand
	trace   *trace
	net     *network
	servers []*server

	snapshotThreshold, trailingLogs uint64
	historyEvents                   int
	policy                          membership.Policy

	recorder  *recorder
	autopilot *autopilot
	history   *history
	watchers  []*watcher
	nemesis   *nemesis
	final     final

	ctx  context.Context
	end  context.CancelFunc
	work sync.WaitGroup // goroutines that end with ctx
	tick atomic.Int64   // orders the beginnings and ends of operations

	mu       sync.Mutex
	failures []string
}

func newCluster(o Options) *cluster {
	rnd := stream(o.Seed, "cluster")
	c := &cluster{options: o, size: 3 + 2*rnd.IntN(2), rnd: rnd, trace: newTrace(o.Trace)}
	c.net = newNetwork(stream(o.Seed, "network"), c.trace)
	c.ctx, c.end = context.WithCancel(context.Background())
	// With fewer entries left than are under way at a time, hashicorp/raft 1.7.3 sends
	// snapshots for ever to a follower that has just made one.
	c.snapshotThreshold, c.trailingLogs = uint64(10+rnd.IntN(50)), uint64(150+rnd.IntN(100))
	c.historyEvents = 40 + rnd.IntN(200)
	c.policy = membership.Policy{Stable: 200 * time.Millisecond, Lag: 20, Grace: between(rnd, membership.Alive, membership.Alive+2*time.Second)}
	c.recorder, c.autopilot, c.history = newRecorder(c), newAutopilot(c), &history{}
	c.nemesis = newNemesis(c)
	for i := range c.size + 1 {
		id := fmt.Sprint("s", i)
		s := &server{cluster: c, id: id, first: i == 0, disk: c.newDisk(id, id)}
		s.disk.lies = o.LyingDisks
		s.format.Store(command.Newest)
		if o.Upgrade {
			s.format.Store(command.Newest - 1)
		}
		c.servers = append(c.servers, s)
	}
	return c
}

// newDisk makes an empty disk for a member on a server.
func (c *cluster) newDisk(server, member string) *disk {
	d := newDisk(server, stream(c.options.Seed, "disk "+member), c.trace)
	d.configured = func(at logPlace, before, after raft.Configuration) { c.autopilot.configure(server, at, before, after) }
	return d
}

// fail notes that a check did not hold.
func (c *cluster) fail(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	c.trace.add("FAILURE %s", text)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.failures) < 20 && !slices.Contains(c.failures, text) {
		c.failures = append(c.failures, text)
	}
}

// logger puts what a server says into the trace, when somebody reads that.
func (c *cluster) logger(id string) *slog.Logger {
	if c.options.Trace == nil {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(logLines{c.options.Trace}, &slog.HandlerOptions{Level: slog.LevelDebug})).With("server", id)
}

type logLines struct {
	tell func([]byte)
}

func (l logLines) Write(b []byte) (int, error) {
	l.tell(b)
	return len(b), nil
}

// run is a whole run: work under faults, then peace, then the checks.
func (c *cluster) run() {
	if !c.prepare() {
		return
	}
	working, stop := context.WithTimeout(c.ctx, c.options.Faults)
	defer stop()
	watching, quiet := context.WithCancel(c.ctx)
	defer quiet()
	var clients, rest sync.WaitGroup
	for i := range 4 + c.rnd.IntN(4) {
		clients.Go(func() { newClient(c, i).work(working) })
	}
	for i := range 3 {
		w := &watcher{cluster: c, name: fmt.Sprint("watcher ", i)}
		c.watchers = append(c.watchers, w)
		rest.Go(func() { w.keep(watching) })
	}
	rest.Go(func() { c.sample(watching) })
	c.nemesis.work(working)
	clients.Wait()
	c.nemesis.heal()
	quiet()
	rest.Wait()
	if c.settle() {
		c.check()
	}
}

// sample compares the servers' states while they change.
func (c *cluster) sample(ctx context.Context) {
	for ctx.Err() == nil {
		for _, s := range c.servers {
			if r := s.current(); r != nil {
				c.recorder.compare(r)
			}
		}
		c.pause(ctx, 200*time.Millisecond)
	}
}

// pause waits.
func (c *cluster) pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// within is ctx, but ends with the run and after d.
func (c *cluster) within(ctx context.Context, r *run, d time.Duration) (context.Context, context.CancelFunc) {
	both, cancel := context.WithTimeout(ctx, d)
	stop := context.AfterFunc(r.ctx, cancel)
	return both, func() { stop(); cancel() }
}

// any returns a server that runs, nil if none does.
func (c *cluster) any(rnd *rand.Rand) *run {
	var list []*run
	for _, s := range c.servers {
		if r := s.current(); r != nil {
			list = append(list, r)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return list[rnd.IntN(len(list))]
}

// read reads from a server. ok is false if it did not answer before it crashed.
func (c *cluster) read(ctx context.Context, r *run, d time.Duration) (_ *state.State, ok bool) {
	ctx, cancel := c.within(ctx, r, d)
	defer cancel()
	if c.options.DirtyReads {
		view := r.store.View()
		return view, view.Settings() != nil
	}
	view, err := r.store.Read(ctx)
	if err != nil && !expected(err) {
		c.fail("read from %s: %v", r.server.id, err)
	}
	return view, err == nil && !r.dead.Load()
}

// expected reports whether an error is one that a store documents for such times.
func expected(err error) bool {
	for _, e := range []error{
		raftstore.ErrNotLeader, raftstore.ErrLeadershipLost, raftstore.ErrClosed, context.Canceled, context.DeadlineExceeded, errCrashed,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return membership.IsRemoved(err)
}

// members are the servers of the configuration that the leader knows, by id; nil while
// nobody leads.
func (c *cluster) members() (*run, map[string]raftstore.Member) {
	for _, s := range c.servers {
		if r := s.current(); r != nil && r.store.Leads() {
			found := map[string]raftstore.Member{}
			for _, m := range r.store.Members() {
				found[m.ID] = m
			}
			return r, found
		}
	}
	return nil, nil
}
