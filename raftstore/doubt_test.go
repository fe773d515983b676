package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
)

// silentPeers lose the first proposal, and then reach nobody.
type silentPeers struct{ asked int }

func (p *silentPeers) Propose(context.Context, string, []byte) (command.Result, error) {
	p.asked++
	if p.asked == 1 {
		return command.Result{}, fmt.Errorf("%w: the connection broke", raftstore.ErrLeadershipLost)
	}
	return command.Result{}, fmt.Errorf("%w: no connection", raftstore.ErrNotLeader)
}

func (p *silentPeers) ReadIndex(context.Context, string) (uint64, error) {
	return 0, raftstore.ErrNotLeader
}

// TestDoubtRemains makes an attempt whose outcome is unknown and then ones that did
// nothing: the whole must not pass for something that did nothing.
func TestDoubtRemains(t *testing.T) {
	c := newCluster(t)
	lead := c.leader()
	follower := (lead + 1) % 3
	c.stop(follower)
	peers := &silentPeers{}
	c.startWith(follower, func(cfg *raftstore.Config) { cfg.Peers = peers })
	if err := c.stores[follower].WaitReady(timeout(t)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	txn := create(configMap("a", "1"))
	txn.Key = "k"
	_, err := c.stores[follower].Propose(ctx, txn)
	if peers.asked < 2 || !errors.Is(err, raftstore.ErrLeadershipLost) || errors.Is(err, raftstore.ErrNotLeader) {
		t.Fatalf("after %d attempts: %v", peers.asked, err)
	}
}

// TestLeaderWithoutVoteFollows takes the vote of the leader, which must go on as a
// follower, and can get the vote back.
func TestLeaderWithoutVoteFollows(t *testing.T) {
	c := newCluster(t)
	lead := c.leader()
	me := raftstore.Member{ID: string(c.servers[lead].ID), Address: string(c.servers[lead].Address)}
	if err := c.stores[lead].SetMember(timeout(t), me); err != nil {
		t.Fatal(err)
	}
	s := c.stores[lead]
	var next int
	for next = c.leader(); next == lead; next = c.leader() {
		<-s.LeaderChange()
	}
	arrive(t, s, must(t, c.stores[next], create(configMap("a", "1"))).Revision)
	me.Voter = true
	if err := c.stores[next].SetMember(timeout(t), me); err != nil {
		t.Fatal(err)
	}
}

// TestOldSnapshotIsRefused offers a server a snapshot from before its own.
func TestOldSnapshotIsRefused(t *testing.T) {
	t.Run("of another state", func(t *testing.T) {
		offerOldSnapshot(t, func(s *raftstore.Store) { must(t, s, create(configMap("b", "1"))) })
	})
	t.Run("of the same state", func(t *testing.T) { // but not of the same log
		offerOldSnapshot(t, func(s *raftstore.Store) {
			if r, err := s.Propose(timeout(t), create(configMap("a", "1"))); err != nil || r.Rejected == nil {
				t.Fatal(r, err)
			}
		})
	})
}

func offerOldSnapshot(t *testing.T, change func(*raftstore.Store)) {
	dir := t.TempDir()
	var store raft.SnapshotStore
	cfg := config(dir)
	cfg.Storage = func(dir string) (raftstore.Storage, error) {
		s, err := raftstore.OpenStorage(dir, "")
		store = s.Snapshots
		return s, err
	}
	_, wire := raft.NewInmemTransport("one")
	wire.Connect("one", wire)
	cfg.Transport = wire
	s := open(t, cfg)
	must(t, s, create(configMap("a", "1")))
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	old, err := store.List()
	if err != nil || len(old) != 1 {
		t.Fatal(old, err)
	}
	change(s)
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	before := s.View().Hash()
	meta, data, err := store.Open(old[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	request := raft.InstallSnapshotRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("two"), Addr: []byte("two")},
		Term:      s.Progress().Term + 1, LastLogIndex: meta.Index, LastLogTerm: meta.Term, Size: meta.Size,
		Configuration: raft.EncodeConfiguration(meta.Configuration), ConfigurationIndex: meta.ConfigurationIndex,
		SnapshotVersion: meta.Version,
	}
	var response raft.InstallSnapshotResponse
	err = wire.InstallSnapshot("one", "one", &request, &response, io.Reader(data))
	if err == nil || response.Success {
		t.Fatalf("an old snapshot was installed: %+v", response)
	}
	if s.View().Hash() != before {
		t.Fatal("the state went back")
	}
}
