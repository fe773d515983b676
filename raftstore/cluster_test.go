package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// cluster is three stores that reach each other through memory.
type cluster struct {
	t       *testing.T
	dirs    []string
	servers []raft.Server
	wires   []*raft.InmemTransport
	stores  []*raftstore.Store // nil where stopped
}

func newCluster(t *testing.T) *cluster {
	c := emptyCluster(t)
	for i := range c.stores {
		c.start(i)
	}
	return c
}

// emptyCluster is one of stores that have not begun.
func emptyCluster(t *testing.T) *cluster {
	c := &cluster{t: t, dirs: make([]string, 3), wires: make([]*raft.InmemTransport, 3), stores: make([]*raftstore.Store, 3)}
	for i := range c.dirs {
		c.dirs[i] = t.TempDir()
		id := fmt.Sprint("s", i)
		c.servers = append(c.servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id)})
	}
	t.Cleanup(func() {
		for i := range c.stores {
			c.stop(i)
		}
	})
	return c
}

func (c *cluster) start(i int) { c.t.Helper(); c.startWith(i, func(*raftstore.Config) {}) }

func (c *cluster) startWith(i int, edit func(*raftstore.Config)) {
	c.t.Helper()
	_, c.wires[i] = raft.NewInmemTransport(c.servers[i].Address)
	for j, other := range c.wires {
		if other != nil {
			other.Connect(c.servers[i].Address, c.wires[i])
			c.wires[i].Connect(c.servers[j].Address, other)
		}
	}
	cfg := raftstore.Config{
		Dir: c.dirs[i], NodeID: string(c.servers[i].ID), Bootstrap: settings(), Servers: c.servers, Transport: c.wires[i],
		HeartbeatTimeout: 150 * time.Millisecond, TrailingLogs: 5,
	}
	edit(&cfg)
	s, err := raftstore.Open(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	c.stores[i] = s
}

func (c *cluster) stop(i int) {
	if c.stores[i] == nil {
		return
	}
	if err := c.stores[i].Close(); err != nil {
		c.t.Error(err)
	}
	c.stores[i] = nil
	for _, other := range c.wires {
		if other != nil {
			other.Disconnect(c.servers[i].Address)
		}
	}
	c.wires[i] = nil
}

// leader waits for a store that can read, and so leads for certain.
func (c *cluster) leader() int {
	c.t.Helper()
	ctx := timeout(c.t)
	for {
		for i, s := range c.stores {
			if s == nil {
				continue
			}
			if _, err := s.Read(ctx); err == nil {
				return i
			}
		}
		if ctx.Err() != nil {
			c.t.Fatal("no leader")
		}
	}
}

// agree waits until every running store has a revision, and compares their states.
func (c *cluster) agree(revision uint64) {
	c.t.Helper()
	hashes := map[string]bool{}
	for _, s := range c.stores {
		if s == nil {
			continue
		}
		if err := s.WaitReady(timeout(c.t)); err != nil {
			c.t.Fatal(err)
		}
		arrive(c.t, s, revision)
		hashes[s.View().Hash()] = true
	}
	if len(hashes) != 1 {
		c.t.Fatalf("%d different states", len(hashes))
	}
}

// arrive waits until s has a revision.
func arrive(t *testing.T, s *raftstore.Store, revision uint64) {
	t.Helper()
	ctx := timeout(t)
	for s.View().Revision() < revision {
		w, err := s.Watch(ctx, s.View().Revision(), raftstore.Filter{})
		if err == nil {
			_, err = w.Next(ctx)
		}
		if err != nil && !errors.Is(err, raftstore.ErrCompacted) { // a snapshot may come in between
			t.Fatal(err)
		}
	}
}

func TestThreeServers(t *testing.T) {
	c := newCluster(t)
	lead := c.leader()
	if err := c.stores[lead].WaitReady(timeout(t)); err != nil {
		t.Fatal(err)
	}
	var last uint64
	for i := range 30 {
		last = must(t, c.stores[lead], create(configMap("c"+strconv.Itoa(i), "x"))).Revision
	}
	c.agree(last)
	if id := c.stores[0].ClusterID(); id == "" || id != c.stores[1].ClusterID() || id != c.stores[2].ClusterID() {
		t.Fatal("different cluster ids")
	}
	follower := (lead + 1) % 3
	if _, err := c.stores[follower].Propose(timeout(t), create(configMap("z", "x"))); !errors.Is(err, raftstore.ErrNotLeader) {
		t.Fatalf("propose to a follower: %v", err)
	}
	if _, err := c.stores[follower].Read(timeout(t)); !errors.Is(err, raftstore.ErrNotLeader) {
		t.Fatalf("read from a follower: %v", err)
	}
	if id, _ := c.stores[follower].Leader(); id != fmt.Sprint("s", lead) {
		t.Fatalf("the follower takes %q for the leader", id)
	}

	c.stop(lead)
	next := c.leader()
	if next == lead || c.stores[next].View().Len(api.ConfigMaps) != 30 {
		t.Fatal("the new leader lacks what was acknowledged")
	}
	for i := range 30 {
		last = must(t, c.stores[next], create(configMap("d"+strconv.Itoa(i), "x"))).Revision
	}
	// The log is cut, so that the one that comes back needs a snapshot.
	if err := c.stores[next].Snapshot(); err != nil {
		t.Fatal(err)
	}
	c.start(lead)
	c.agree(last)
}

// TestDeposedLeaderDoesNotRead cuts the leader off: it must not answer reads, nor
// acknowledge proposals.
func TestDeposedLeaderDoesNotRead(t *testing.T) {
	c := newCluster(t)
	lead := c.leader()
	s := c.stores[lead]
	if err := s.WaitReady(timeout(t)); err != nil {
		t.Fatal(err)
	}
	must(t, s, create(configMap("a", "1")))
	c.wires[lead].DisconnectAll()
	for i, wire := range c.wires {
		if i != lead {
			wire.Disconnect(c.servers[lead].Address)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := s.Propose(ctx, create(configMap("b", "1"))); err == nil {
		t.Fatal("a leader without followers acknowledged a proposal")
	}
	c.stores[lead] = nil // not asked any more
	defer func() { c.stores[lead] = s }()
	must(t, c.stores[c.leader()], create(configMap("b", "2")))
	if _, err := s.Read(ctx); err == nil {
		t.Fatal("a deposed leader answered a read that lacks an acknowledged change")
	}
	if _, ok := s.View().Get(api.KeyOf(configMap("b", ""))); ok {
		t.Fatal("an entry was applied without a quorum")
	}
}
