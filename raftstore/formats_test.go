package raftstore_test

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// TestTooOldServerIsNotAdded: what was written decides who can still join, and a server
// finds it again in its log and in its snapshot.
func TestTooOldServerIsNotAdded(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.WholeBytes, cfg.PartBytes = 1000, 500
	// One that has said nothing is taken for one of the oldest version.
	add := func(s *raftstore.Store) error {
		return s.SetMember(timeout(t), raftstore.Member{ID: "old", Address: "old:1"})
	}
	refuses := func(s *raftstore.Store) {
		t.Helper()
		err := add(s)
		var tooOld *raftstore.TooOldError
		switch {
		case !errors.As(err, &tooOld) || tooOld.ID != "old" || tooOld.Knows != command.Oldest || tooOld.Used != command.FormatOfParts:
			t.Fatalf("a server that knows format 1 only: %v", err)
		case !strings.Contains(err.Error(), "stop for good") || !strings.Contains(err.Error(), "decree members"):
			t.Errorf("it is not told why, or what to do: %v", err)
		case len(s.Members()) != 1:
			t.Errorf("members %+v", s.Members())
		}
		if err := s.CheckFormat("new", command.FormatOfParts); err != nil {
			t.Error(err)
		}
	}
	s := open(t, cfg)
	must(t, s, create(configMap("small", "x")))
	if err := s.CheckFormat("old", command.Oldest); err != nil {
		t.Fatal(err)
	}
	must(t, s, create(configMap("large", strings.Repeat("x", 2000))))
	refuses(s)
	reopen := func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, cfg)
	}
	reopen() // it reads its log
	refuses(s)
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	reopen() // the state has no part any more, and who is new is not sent the log before it
	if err := s.CheckFormat("old", command.Oldest); err != nil {
		t.Fatal(err)
	}
	whole := create(configMap("half", strings.Repeat("x", 2000)))
	data, err := command.EncodeTxn(&whole)
	if err != nil {
		t.Fatal(err)
	}
	parts, err := command.Split(data, 500)
	if err != nil {
		t.Fatal(err)
	}
	parts[0].Actor = whole.Actor
	must(t, s, parts[0])
	must(t, s, create(configMap("after", "x")))
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	reopen() // the state has a part
	refuses(s)
}

// TestNewLeaderFormat: who has just begun to lead, and is asked at once, writes what all servers
// understand.
func TestNewLeaderFormat(t *testing.T) {
	c := emptyCluster(t)
	for i, m := range c.servers {
		c.startWith(i, func(cfg *raftstore.Config) {
			cfg.WholeBytes, cfg.PartBytes = 1000, 500
			if cfg.Servers = c.servers[:1]; i > 0 { // it is let in
				cfg.Servers, cfg.Bootstrap = nil, nil
			}
		})
		now := c.stores[c.leader()]
		if err := now.WaitReady(timeout(t)); err != nil {
			t.Fatal(err)
		}
		o := &api.Server{ObjectMeta: metav1.ObjectMeta{Name: string(m.ID)}, Status: api.ServerStatus{Format: command.Newest}}
		o.GetObjectKind().SetGroupVersionKind(api.GroupVersion.WithKind("Server"))
		note := create(o)
		note.Actor = "server/" + string(m.ID)
		must(t, now, note)
		if err := now.SetMember(timeout(t), raftstore.Member{ID: string(m.ID), Address: string(m.Address), Voter: true}); err != nil {
			t.Fatal(err)
		}
	}
	now := c.leader()
	for i := range 30 {
		if err := c.stores[now].TransferLeadership(timeout(t), ""); err != nil {
			t.Fatal(err)
		}
		var all errgroup.Group
		var written atomic.Bool
		for j, s := range c.stores {
			all.Go(func() error {
				for k := 0; !written.Load(); k++ {
					large := create(configMap(fmt.Sprintf("large-%d-%d-%d", i, j, k), strings.Repeat("x", 2000)))
					_, err := s.Propose(timeout(t), large)
					if errors.Is(err, command.ErrFormat) {
						return err
					}
					if err == nil {
						written.Store(true)
					}
				}
				return nil
			})
		}
		if err := all.Wait(); err != nil {
			t.Fatalf("handed over %d times: %v", i, err)
		}
		now = c.leader()
	}
}
