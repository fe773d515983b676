package membership_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is servers on loopback that speak mutual TLS.
type cluster struct {
	t  testing.TB
	ca *pki.Authority
}

func newCluster(t testing.TB) *cluster {
	ca, err := pki.Open(t.TempDir(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{t: t, ca: ca}
}

// config is the TLS of a server called node.
func (c *cluster) config(node string) *tls.Config {
	c.t.Helper()
	pair, err := c.ca.Issue(pki.Request{Name: pki.ServerPrefix + node, Groups: []string{pki.GroupServers}, Hosts: []string{"decree-server"}}, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := pair.TLS()
	if err != nil {
		c.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.ca.CertPEM())
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: pool, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert, ServerName: "decree-server",
	}
}

// server is one of them.
type server struct {
	t       testing.TB
	node    string
	id      string
	address string
	store   *raftstore.Store
	peers   *peer.Client
	keeper  *membership.Keeper
	stop    func()
}

// options change how a server is started.
type options struct {
	dir    string // empty: a new one
	id     string // empty: the node's name
	first  bool   // makes the cluster
	policy membership.Policy
	format int // that it understands, by its own account; 0: 2
	l      net.Listener
}

func (c *cluster) start(node string, o options) *server {
	c.t.Helper()
	if o.dir == "" {
		o.dir = c.t.TempDir()
	}
	if o.id == "" {
		o.id = node
	}
	if o.policy == (membership.Policy{}) {
		o.policy = membership.DefaultPolicy
	}
	if o.format == 0 {
		o.format = 2
	}
	if o.l == nil {
		var err error
		if o.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			c.t.Fatal(err)
		}
	}
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil)).With("at", o.id)
	}
	s := &server{t: c.t, node: node, id: o.id, address: o.l.Addr().String()}
	config := c.config(node)
	mux := peer.NewMux(o.l, peer.MuxConfig{TLS: config, Log: log})
	transport := peer.NewRaftTransport(peer.RaftConfig{
		Listener: mux.Listen(peer.ProtocolRaft), Address: s.address, TLS: func() *tls.Config { return config }, Log: log,
		Ended: func(who peer.Identity) { s.keeper.ConnectionEnded(who) },
	})
	s.peers = peer.NewClient(func() *tls.Config { return config })
	cfg := raftstore.Config{
		Dir: o.dir, NodeID: o.id, Transport: transport, Peers: s.peers, Logger: log, HeartbeatTimeout: 200 * time.Millisecond, TrailingLogs: 50,
	}
	if o.first {
		cfg.Bootstrap = &command.Bootstrap{
			ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"), PodCIDR: netip.MustParsePrefix("10.244.0.0/16"), NodeMask: 24, DNS: netip.MustParseAddr("10.96.0.10"),
		}
	}
	var err error
	if s.store, err = raftstore.Open(cfg); err != nil {
		c.t.Fatal(err)
	}
	s.keeper = &membership.Keeper{
		Store: s.store, Peers: s.peers, Policy: o.policy, Log: log,
		Self: func() membership.Self {
			return membership.Self{ID: o.id, ServerSpec: api.ServerSpec{Node: node, Address: s.address}, ServerStatus: api.ServerStatus{Version: "test", Format: o.format}}
		},
	}
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	rpc := &peer.Server{Store: s.store, Handlers: s.keeper.Handlers(), Log: log}
	calls := mux.Listen(peer.ProtocolPeer)
	parts.Go(func() { mux.Serve(ctx) })
	parts.Go(func() { rpc.Serve(ctx, calls) })
	parts.Go(func() { s.lead(ctx) })
	s.stop = sync.OnceFunc(func() {
		if err := s.store.Close(); err != nil {
			c.t.Error(err)
		}
		s.peers.Close()
		cancel()
		parts.Wait()
	})
	c.t.Cleanup(s.stop)
	return s
}

// lead runs the keeper while the server leads.
func (s *server) lead(ctx context.Context) {
	for ctx.Err() == nil {
		changed := s.store.LeaderChange()
		if s.store.Leads() {
			tenure, cancel := context.WithCancel(ctx)
			context.AfterFunc(tenure, cancel)
			done := make(chan struct{})
			go func() { defer close(done); s.keeper.Lead(tenure) }()
			for s.store.Leads() && ctx.Err() == nil {
				select {
				case <-changed:
				case <-ctx.Done():
				}
				changed = s.store.LeaderChange()
			}
			cancel()
			<-done
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

func (s *server) join(to ...*server) {
	s.t.Helper()
	var addresses []string
	for _, other := range to {
		addresses = append(addresses, other.address)
	}
	if err := s.keeper.Announce(deadline(s.t), addresses); err != nil {
		s.t.Fatal(err)
	}
}

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// until waits for a condition about the membership.
func until(t testing.TB, what string, s *server, ok func([]membership.Server) bool) {
	t.Helper()
	ctx := deadline(t)
	var list []membership.Server
	var err error
	for ctx.Err() == nil {
		if list, err = s.keeper.List(ctx); err == nil && ok(list) {
			return
		}
		time.Sleep(10 * time.Millisecond) // what another server thinks brings no event here
	}
	t.Fatalf("waiting until %s: %+v, %v", what, list, err)
}

func voters(n int) func([]membership.Server) bool {
	return func(list []membership.Server) bool {
		have := 0
		for _, s := range list {
			if (s.Role == "voter" || s.Role == "leader") && s.State == "healthy" {
				have++
			}
		}
		return have == n && len(list) == n
	}
}

func configMap(name, value string) *corev1.ConfigMap {
	o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Data: map[string]string{"v": value}}
	o.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMap"))
	return o
}

func put(t testing.TB, s *server, key, name string) command.Result {
	t.Helper()
	o := configMap(name, "x")
	r, err := s.store.Propose(deadline(t), command.Txn{Key: key, Actor: "test", Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(o), Object: o}}})
	if err != nil || r.Err() != nil {
		t.Fatal(err, r.Err())
	}
	return r
}

func three(t testing.TB) (*cluster, []*server) {
	c := newCluster(t)
	a := c.start("a", options{first: true})
	if err := a.store.WaitReady(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if err := a.keeper.AdmitHere(deadline(t), a.keeper.Self()); err != nil {
		t.Fatal(err)
	}
	b, d := c.start("b", options{}), c.start("c", options{})
	b.join(a)
	d.join(a, b)
	until(t, "three servers vote", a, voters(3))
	return c, []*server{a, b, d}
}

// TestAnnouncedTwice: announcements of one server that arrive at the same time are
// all heard. A server that has just become the leader sends one and makes one.
func TestAnnouncedTwice(t *testing.T) {
	c := newCluster(t)
	a := c.start("a", options{first: true})
	if err := a.store.WaitReady(deadline(t)); err != nil {
		t.Fatal(err)
	}
	var calls errgroup.Group
	for range 16 {
		calls.Go(func() error { return a.keeper.AdmitHere(deadline(t), a.keeper.Self()) })
	}
	if err := calls.Wait(); err != nil {
		t.Fatal(err)
	}
	until(t, "one server votes", a, voters(1))
}

// TestEveryServerServes: proposals and linearizable reads work on followers.
func TestEveryServerServes(t *testing.T) {
	_, servers := three(t)
	for i := range 30 {
		at, other := servers[i%3], servers[(i+1)%3]
		r := put(t, at, "", "m"+strconv.Itoa(i))
		if at.store.View().Revision() < r.Revision {
			t.Fatal("the outcome is not seen where it was proposed")
		}
		view, err := other.store.Read(deadline(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := view.Get(api.KeyOf(configMap("m"+strconv.Itoa(i), ""))); !ok {
			t.Fatalf("a read on %s lacks what %s acknowledged", other.id, at.id)
		}
	}
	o := configMap("m0", "x")
	r, err := servers[1].store.Propose(deadline(t), command.Txn{Actor: "test", Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(o), Object: o}}})
	if err != nil || r.Rejected == nil || r.Rejected.Code != command.Exists || r.Rejected.Key != api.KeyOf(o) {
		t.Fatalf("a rejection through a follower: %+v, %v", r, err)
	}
}

// TestFailover kills the leader's connections and process state: the others go on, and
// proposals with keys are answered without the caller's help.
func TestFailover(t *testing.T) {
	_, servers := three(t)
	var wg sync.WaitGroup
	var acknowledged [2][]string
	ctx, cancel := context.WithCancel(context.Background())
	for i, s := range servers[1:] {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("f-%d-%d", i, n)
				put(t, s, name, name)
				acknowledged[i] = append(acknowledged[i], name)
			}
		})
	}
	for len(servers[1].store.View().Settings().ClusterID) == 0 {
		t.Fatal("no settings")
	}
	before := servers[1].store.View().Revision()
	if _, err := servers[1].store.AwaitRevision(deadline(t), before+50); err != nil {
		t.Fatal(err)
	}
	servers[0].stop()
	after := servers[1].store.View().Revision()
	if _, err := servers[1].store.AwaitRevision(deadline(t), after+50); err != nil {
		t.Fatal(err)
	}
	cancel()
	wg.Wait()
	view, err := servers[2].store.Read(deadline(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range acknowledged {
		for _, name := range list {
			if _, ok := view.Get(api.KeyOf(configMap(name, ""))); !ok {
				t.Fatalf("%s was acknowledged and is lost", name)
			}
		}
	}
}

// TestReplace: a machine comes back with an empty disk, under a new id, and takes the
// place of its former self.
func TestReplace(t *testing.T) {
	c, servers := three(t)
	put(t, servers[0], "", "one")
	servers[2].stop()
	again := c.start("c", options{id: "c-2"})
	again.join(servers[1])
	until(t, "the new one votes", servers[0], voters(3))
	if _, ok := api.Get[*api.Server](servers[0].store.View(), "", "c"); ok {
		t.Fatal("the former server is still there")
	}
	if _, ok := again.store.View().Get(api.KeyOf(configMap("one", ""))); !ok {
		t.Fatal("the new server lacks the state")
	}
}

// TestTooOld: a server of a version that cannot read what the cluster has written is not
// let in, whoever it asks, and the server that it would replace stays.
func TestTooOld(t *testing.T) {
	c, servers := three(t) // in the log are Servers, which format 2 brought
	servers[2].stop()
	old := c.start("c", options{id: "c-2", format: 1})
	for _, s := range servers[:2] {
		err := old.keeper.Announce(deadline(t), []string{s.address})
		if !membership.IsTooOld(err) || membership.IsRemoved(err) || !strings.Contains(err.Error(), "server c-2 understands log formats up to 1") {
			t.Fatalf("%s: a server of an old version: %v", s.id, err)
		}
	}
	for _, m := range servers[0].store.Members() {
		if m.ID == "c-2" {
			t.Error("it was let in")
		}
	}
	if _, ok := api.Get[*api.Server](servers[0].store.View(), "", "c"); !ok || len(servers[0].store.Members()) != 3 {
		t.Error("the server that it would have replaced is gone")
	}
	c.start("c", options{id: "c-3"}).join(servers[1])
	until(t, "one of this version votes in its place", servers[0], voters(3))
}

// TestRemoved: a server that was taken out cannot come back by itself.
func TestRemoved(t *testing.T) {
	c, servers := three(t)
	if err := servers[1].keeper.Remove(deadline(t), "c", "a test"); err != nil {
		t.Fatal(err)
	}
	until(t, "two are left", servers[0], voters(2))
	err := servers[2].keeper.Announce(deadline(t), []string{servers[0].address})
	if !membership.IsRemoved(err) {
		t.Fatalf("a removed server came back: %v", err)
	}
	servers[2].stop()
	again := c.start("c", options{id: "c-2"})
	if err := again.keeper.Announce(deadline(t), []string{servers[0].address}); !membership.IsRemoved(err) {
		t.Fatal("a removed machine came back with its certificate alone")
	}
	if err := servers[0].keeper.Remove(deadline(t), "b", "a test"); err != nil {
		t.Fatal(err)
	}
	if err := servers[0].keeper.Remove(deadline(t), "a", "a test"); err == nil {
		t.Fatal("the last server removed itself")
	}
}

// TestLeaderRemovesItself: a leader that is to go hands over first, and the next one
// removes it: for who is noted as removed others do nothing more.
func TestLeaderRemovesItself(t *testing.T) {
	_, servers := three(t)
	for left := 2; left > 0; left-- {
		i := slices.IndexFunc(servers, func(s *server) bool { return s.store.Leads() })
		if i < 0 {
			t.Fatal("nobody leads")
		}
		gone := servers[i]
		if err := gone.keeper.Remove(deadline(t), gone.id, "a test"); err != nil {
			t.Fatal(err)
		}
		servers = slices.Delete(servers, i, i+1)
		until(t, "the others are left", servers[0], voters(left))
		var note *api.Server
		for note == nil || note.Status.Removed == nil { // a follower hears of it
			if note, _ = api.Get[*api.Server](servers[0].store.View(), "", gone.id); deadline(t).Err() != nil {
				t.Fatal("the removal is not noted")
			}
		}
		if gone.store.Leads() {
			t.Error("a removed server leads")
		}
		gone.stop()
	}
}

// TestAutopilot: a dead server is removed after the grace, and the cluster that is
// left needs it no more.
func TestAutopilot(t *testing.T) {
	c := newCluster(t)
	policy := membership.DefaultPolicy
	policy.Grace = 4 * time.Second
	a := c.start("a", options{first: true, policy: policy})
	if err := a.store.WaitReady(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if err := a.keeper.AdmitHere(deadline(t), a.keeper.Self()); err != nil {
		t.Fatal(err)
	}
	b, d := c.start("b", options{policy: policy}), c.start("c", options{policy: policy})
	b.join(a)
	d.join(a)
	until(t, "three servers vote", a, voters(3))
	d.stop()
	until(t, "the dead one is removed", a, voters(2))
	b.stop()
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if n := len(a.store.Members()); n != 2 {
			t.Fatalf("%d members: the last majority was given up", n)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func TestTransfer(t *testing.T) {
	_, servers := three(t)
	for _, to := range []string{"b", "c", "a"} {
		if err := servers[0].keeper.Transfer(deadline(t), to); err != nil {
			t.Fatal(err)
		}
		until(t, to+" leads", servers[1], func(list []membership.Server) bool {
			for _, s := range list {
				if s.Node == to && s.Role == "leader" {
					return true
				}
			}
			return false
		})
	}
	if err := servers[0].keeper.Transfer(deadline(t), "nobody"); err == nil {
		t.Fatal("the lead went to nobody")
	}
}

// TestCallsWait: who calls for the leader while there is none waits for the next one.
func TestCallsWait(t *testing.T) {
	_, servers := three(t)
	servers[0].stop()
	if list, err := servers[1].keeper.List(deadline(t)); err != nil || len(list) != 3 {
		t.Fatalf("no list right after the leader stopped: %v, %v", list, err)
	}
	servers[2].stop()
	ctx := deadline(t)
	for { // a leader believes that it leads for as long as its lease
		changed := servers[1].store.LeaderChange()
		_, err := servers[1].keeper.List(ctx)
		if err != nil {
			if !errors.Is(err, raftstore.ErrNotLeader) || !strings.Contains(err.Error(), "no quorum") {
				t.Fatalf("a list without a quorum: %v", err)
			}
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatal("there is a list without a quorum")
		}
	}
}

// TestForeignPeer: who has no certificate of this cluster's CA is no server.
func TestForeignPeer(t *testing.T) {
	c := newCluster(t)
	a := c.start("a", options{first: true})
	if err := a.store.WaitReady(deadline(t)); err != nil {
		t.Fatal(err)
	}
	foreign := newCluster(t).config("x")
	foreign.InsecureSkipVerify = true
	client := peer.NewClient(func() *tls.Config { return foreign })
	defer client.Close()
	if _, err := client.ReadIndex(deadline(t), a.address); !errors.Is(err, raftstore.ErrNotLeader) && !errors.Is(err, raftstore.ErrLeadershipLost) {
		t.Fatalf("a foreign server was answered: %v", err)
	}
}
