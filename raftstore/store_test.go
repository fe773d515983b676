package raftstore_test

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) {
	if childMain() {
		return
	}
	goleak.VerifyTestMain(m)
}

func settings() *command.Bootstrap {
	return &command.Bootstrap{
		ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"),
		PodCIDR:     netip.MustParsePrefix("10.98.0.0/16"),
		NodeMask:    24,
		DNS:         netip.MustParseAddr("10.97.0.10"),
	}
}

func config(dir string) raftstore.Config {
	return raftstore.Config{Dir: dir, NodeID: "one", Bootstrap: settings()}
}

// open opens a store that is ready, and closes it with the test.
func open(t testing.TB, cfg raftstore.Config) *raftstore.Store {
	t.Helper()
	s, err := raftstore.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.WaitReady(timeout(t)); err != nil {
		t.Fatal(err)
	}
	return s
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func configMap(name, value string) *corev1.ConfigMap {
	o := &corev1.ConfigMap{}
	o.Kind, o.APIVersion = "ConfigMap", "v1"
	o.Namespace, o.Name = "default", name
	o.Data = map[string]string{"value": value}
	return o
}

func create(objects ...api.Object) command.Txn {
	t := command.Txn{Actor: "user/test"}
	for _, o := range objects {
		t.Mutations = append(t.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	return t
}

func update(o api.Object) command.Txn {
	return command.Txn{Actor: "user/test", Mutations: []api.Mutation{{Verb: api.Update, Key: api.KeyOf(o), Object: o}}}
}

func remove(o api.Object) command.Txn {
	return command.Txn{Actor: "user/test", Mutations: []api.Mutation{{Verb: api.Delete, Key: api.KeyOf(o)}}}
}

// must proposes a transaction that has to be applied.
func must(t testing.TB, s *raftstore.Store, txn command.Txn) command.Result {
	t.Helper()
	r, err := s.Propose(timeout(t), txn)
	if err == nil {
		err = r.Err()
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestOpenProposeView(t *testing.T) {
	start := time.Now()
	s := open(t, config(t.TempDir()))
	t.Logf("ready after %v", time.Since(start))
	if !s.IsLeader() || s.ClusterID() == "" {
		t.Fatalf("leader %v, cluster %q", s.IsLeader(), s.ClusterID())
	}
	r := must(t, s, create(configMap("a", "1"), configMap("b", "2")))
	view := s.View()
	if view.Revision() != r.Revision || r.Revision != 3 {
		t.Fatalf("revision %d after a result of %d, want 3", view.Revision(), r.Revision)
	}
	o, ok := api.Get[*corev1.ConfigMap](view, "default", "b")
	if !ok || o.Data["value"] != "2" || o.UID == "" || o.CreationTimestamp.IsZero() || o.ResourceVersion != "3" {
		t.Fatalf("got %+v", o)
	}
	read, err := s.Read(timeout(t))
	if err != nil || read.Revision() != 3 {
		t.Fatalf("read: revision %d, %v", read.Revision(), err)
	}
}

func TestRejectionIsAResult(t *testing.T) {
	s := open(t, config(t.TempDir()))
	must(t, s, create(configMap("a", "1")))
	before := s.View()
	r, err := s.Propose(timeout(t), create(configMap("b", "1"), configMap("a", "1")))
	if err != nil {
		t.Fatal(err)
	}
	var rejection *command.Rejection
	if !errors.As(r.Err(), &rejection) || rejection.Code != command.Exists {
		t.Fatalf("got %v", r.Err())
	}
	if s.View().Hash() != before.Hash() {
		t.Fatal("a rejected transaction changed the state")
	}
}

func TestIdempotentRetry(t *testing.T) {
	s := open(t, config(t.TempDir()))
	txn := create(configMap("a", "1"))
	txn.Key = "k1"
	first := must(t, s, txn)
	must(t, s, create(configMap("b", "1")))
	if again := must(t, s, txn); again != first {
		t.Fatalf("retry gave %+v, first was %+v", again, first)
	}
}

func TestConcurrentProposals(t *testing.T) {
	s := open(t, config(t.TempDir()))
	var wg sync.WaitGroup
	const proposers, each = 32, 20
	for p := range proposers {
		wg.Go(func() {
			for i := range each {
				r, err := s.Propose(timeout(t), create(configMap("p"+strconv.Itoa(p)+"-"+strconv.Itoa(i), "x")))
				if err != nil || r.Err() != nil {
					t.Error(err, r.Err())
				}
			}
		})
	}
	wg.Wait()
	if n := s.View().Len(api.ConfigMaps); n != proposers*each {
		t.Fatalf("%d objects, want %d", n, proposers*each)
	}
}

func TestTooLarge(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.HistoryBytes = 64 << 20
	s := open(t, cfg)
	_, err := s.Propose(timeout(t), create(configMap("a", string(make([]byte, command.MaxObject+1)))))
	if !errors.Is(err, command.ErrTooLarge) {
		t.Fatalf("got %v", err)
	}
	var many []api.Object
	for i := range 5 {
		many = append(many, configMap("m"+strconv.Itoa(i), string(make([]byte, command.MaxObject-1000))))
	}
	// More than one entry holds: it travels in pieces, and nobody sees a part of it.
	w := watch(t, s, s.View().Revision(), raftstore.Filter{Resource: api.ConfigMaps})
	must(t, s, create(many...))
	events, err := w.Next(timeout(t))
	if err != nil || len(events) != len(many) {
		t.Fatalf("%d events at once, want %d: %v", len(events), len(many), err)
	}
	endless := command.Txn{Actor: "test", Mutations: make([]api.Mutation, command.MaxMutations+1)}
	for i := range endless.Mutations {
		endless.Mutations[i] = api.Mutation{Verb: api.Delete, Key: api.KeyOf(many[0])}
	}
	if _, err := s.Propose(timeout(t), endless); !errors.Is(err, command.ErrTooLarge) {
		t.Fatalf("got %v", err)
	}
}

// TestLargeCommit: ten thousand objects, thirty megabytes, one revision.
func TestLargeCommit(t *testing.T) {
	s := open(t, config(t.TempDir()))
	var many []api.Object
	for i := range 10_000 {
		many = append(many, configMap("c"+strconv.Itoa(i), strings.Repeat("x", 3000)))
	}
	w := watch(t, s, s.View().Revision(), raftstore.Filter{Resource: api.ConfigMaps})
	r := must(t, s, create(many...))
	events, err := w.Next(timeout(t))
	if err != nil || len(events) != len(many) || events[len(many)-1].Revision != r.Revision {
		t.Fatalf("%d events at once, want %d: %v", len(events), len(many), err)
	}
}

func TestClosed(t *testing.T) {
	s := open(t, config(t.TempDir()))
	w, err := s.Watch(timeout(t), s.View().Revision(), raftstore.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Propose(timeout(t), create(configMap("a", "1"))); !errors.Is(err, raftstore.ErrClosed) {
		t.Errorf("propose: %v", err)
	}
	if _, err := s.Read(timeout(t)); err == nil {
		t.Error("read after close")
	}
	if _, err := w.Next(timeout(t)); !errors.Is(err, raftstore.ErrClosed) {
		t.Errorf("watch: %v", err)
	}
}

func TestMetricsComeAndGo(t *testing.T) {
	registry := prometheus.NewRegistry()
	cfg := config(filepath.Join(t.TempDir(), "new", "folder"))
	cfg.Metrics = registry
	for range 2 {
		s := open(t, cfg)
		families, err := registry.Gather()
		if err != nil || len(families) < 7 {
			t.Fatalf("%d families, %v", len(families), err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
