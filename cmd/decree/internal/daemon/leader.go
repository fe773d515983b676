package daemon

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/reconciler"
	"decree.dev/decree/reconciler/control"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
)

// lead does what only the leader does, whenever this server leads.
func (s *server) lead(ctx context.Context) error {
	whileLeading(ctx, s.store, s.tenure, func(err error) { s.cfg.Log.Warn("leading", "error", err) })
	return nil
}

// leadership says whether this server leads.
type leadership interface {
	Leads() bool
	// LeaderChange returns a channel that is closed when the answer may be another one.
	LeaderChange() <-chan struct{}
}

// whileLeading runs tenure whenever this server leads, until ctx ends. A tenure that
// fails is told of and begun again, after a wait that grows until one has called begun.
func whileLeading(ctx context.Context, who leadership, tenure func(ctx context.Context, begun func()) error, failed func(error)) {
	for failures := 0; ctx.Err() == nil; {
		changed := who.LeaderChange()
		var again <-chan time.Time
		if who.Leads() {
			failures++
			if err := tenure(ctx, func() { failures = 1 }); err != nil && ctx.Err() == nil {
				failed(err)
			}
			again = time.After(leadAgain.Wait(failures))
		}
		select {
		case <-changed:
		case <-again:
		case <-ctx.Done():
		}
	}
}

// leadAgain is the wait before a leader that failed to begin begins again.
var leadAgain = reconciler.Backoff{Min: 50 * time.Millisecond, Max: 5 * time.Second}

// tenure leads until another server does, and calls begun when all parts run.
func (s *server) tenure(ctx context.Context, begun func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() {
		defer cancel()
		for {
			changed := s.store.LeaderChange()
			if !s.store.Leads() {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	})
	s.contacts.begin(time.Now())
	for _, step := range []func(context.Context) error{s.bootstrap, s.settleAuthority, func(ctx context.Context) error { return s.members.AdmitHere(ctx, s.self()) }} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	g := newGroup(ctx)
	controllers := &control.Controllers{Store: replicated.Store{Store: s.store}, Contacts: s.contacts, Log: s.cfg.Log.With("part", "control")}
	g.start("servers", s.members.Lead)
	g.start("controllers", controllers.Run)
	g.start("sources", s.follower.Run)
	g.start("upkeep", s.upkeep)
	if s.backups != nil {
		g.start("snapshots", s.backups.Run)
	}
	begun()
	return g.wait()
}

// upkeepEvery is the time between two looks at what comes due by the clock.
const upkeepEvery = 5 * time.Second

// upkeep advances the rotation of the CA and removes expired tokens.
func (s *server) upkeep(ctx context.Context) error {
	tick := time.NewTicker(upkeepEvery)
	defer tick.Stop()
	for {
		for name, step := range map[string]func(context.Context) error{"rotate the CA": s.rotateCA, "remove expired tokens": s.sweep} {
			if err := step(ctx); err != nil && ctx.Err() == nil {
				s.cfg.Log.Warn(name, "error", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// bootstrap makes what every cluster has before its first commit.
func (s *server) bootstrap(ctx context.Context) error {
	view := s.store.View()
	var ms []api.Mutation
	for _, o := range []api.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: delivery.SystemNamespace}},
		&api.Source{ObjectMeta: metav1.ObjectMeta{Name: BuiltIn}},
	} {
		if _, ok := view.Get(api.KeyOf(o)); ok {
			continue
		}
		if d := api.KindOf(o).Default; d != nil {
			d(o)
		}
		ms = append(ms, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	if len(ms) == 0 {
		return nil
	}
	res, err := s.store.Propose(ctx, command.Txn{Time: time.Now().UnixMilli(), Actor: "system", Reason: "bootstrap", Mutations: ms})
	if err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	return res.Err()
}

// contacts says when nodes were last heard of, by any server. It is kept in memory:
// the leader's counts, the others tell it once a second.
type contacts struct {
	mu    sync.Mutex
	since time.Time // since when this server counts
	last  map[string]time.Time
	nodes func() []string
}

// begin starts to count: a node that was not heard of since is given its time from
// then on.
func (c *contacts) begin(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.since = now
}

// heard notes that a node was heard of.
func (c *contacts) heard(node string, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last == nil {
		c.last = map[string]time.Time{}
	}
	if at.After(c.last[node]) {
		c.last[node] = at
	}
}

// LastContacts implements control.Contacts.
func (c *contacts) LastContacts() map[string]time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := map[string]time.Time{}
	for _, n := range c.nodes() {
		m[n] = c.since
		if t := c.last[n]; t.After(c.since) {
			m[n] = t
		}
	}
	return m
}

// news returns how many milliseconds ago each node was heard of since a moment.
func (c *contacts) news(since, now time.Time) map[string]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := map[string]int64{}
	for n, t := range c.last {
		if t.After(since) {
			m[n] = now.Sub(t).Milliseconds()
		}
	}
	return m
}

// The names of calls between servers, beside those of membership.
const (
	callContacts = "contacts"
	callSync     = "sync"
	callGitPull  = "git-pull"
)

// tellEvery is how often a server tells the leader which nodes it has heard of.
const tellEvery = time.Second

// tell passes on to the leader which nodes were heard of here.
func (s *server) tell(ctx context.Context) error {
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	told := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			news := s.contacts.news(told, now)
			_, leader := s.store.Leader()
			if len(news) == 0 || leader == "" || s.store.IsLeader() {
				continue
			}
			call, cancel := context.WithTimeout(ctx, 2*time.Second)
			err := s.peers.Call(call, leader, callContacts, news, nil)
			cancel()
			if err == nil {
				told = now
			}
		}
	}
}

// calls are what this server answers to others, beside what membership does.
func (s *server) calls() map[string]peer.Handler {
	h := s.members.Handlers()
	h[callContacts] = peer.On(func(_ context.Context, _ peer.Identity, news map[string]int64) (any, error) {
		now := time.Now()
		for node, ago := range news {
			s.contacts.heard(node, now.Add(-time.Duration(ago)*time.Millisecond))
		}
		return struct{}{}, nil
	})
	h[callGitPull] = peer.On(s.pull)
	h[callSync] = peer.On(func(_ context.Context, _ peer.Identity, source string) (any, error) {
		return struct{}{}, s.follower.Sync(source)
	})
	return h
}
