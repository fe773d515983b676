package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

func watch(t testing.TB, s *raftstore.Store, from uint64, f raftstore.Filter) *raftstore.Watch {
	t.Helper()
	w, err := s.Watch(timeout(t), from, f)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// next returns the next batch as text: "ADDED a@3".
func next(t testing.TB, w *raftstore.Watch) (out []string) {
	t.Helper()
	events, err := w.Next(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		out = append(out, fmt.Sprintf("%s %s@%s", e.Type, e.Key.Name, e.Object.GetResourceVersion()))
		if strconv.FormatUint(e.Revision, 10) != e.Object.GetResourceVersion() {
			t.Fatalf("event of revision %d carries %s", e.Revision, e.Object.GetResourceVersion())
		}
	}
	return out
}

func expect(t testing.TB, got []string, want ...string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func TestWatchTypesAreRelativeToTheFilter(t *testing.T) {
	s := open(t, config(t.TempDir()))
	start := s.View().Revision()
	everything := watch(t, s, start, raftstore.Filter{})
	red := watch(t, s, start, raftstore.Filter{Resource: api.ConfigMaps, Namespace: "default", Match: func(o api.Object) bool {
		return o.(*corev1.ConfigMap).Data["value"] == "red"
	}})
	named := watch(t, s, start, raftstore.Filter{Resource: api.ConfigMaps, Name: "b"})
	pods := watch(t, s, start, raftstore.Filter{Resource: api.Pods})

	must(t, s, create(configMap("a", "blue"), configMap("b", "red")))
	must(t, s, update(configMap("a", "red")))
	must(t, s, update(configMap("b", "blue")))
	must(t, s, remove(configMap("a", "")))
	must(t, s, remove(configMap("b", "")))

	expect(t, next(t, everything), "ADDED a@2", "ADDED b@3", "MODIFIED a@4", "MODIFIED b@5", "DELETED a@6", "DELETED b@7")
	expect(t, next(t, red), "ADDED b@3", "ADDED a@4", "DELETED b@5", "DELETED a@6")
	expect(t, next(t, named), "ADDED b@3", "MODIFIED b@5", "DELETED b@7")
	if got := pods.Progress(); got != 7 {
		t.Fatalf("an idle watch has seen everything up to %d, want 7", got)
	}
	ctx, cancel := context.WithCancel(timeout(t))
	cancel()
	if events, err := red.Next(ctx); !errors.Is(err, context.Canceled) || events != nil || red.Progress() != 7 {
		t.Fatalf("got %v, %v, progress %d", events, err, red.Progress())
	}
	must(t, s, create(configMap("c", "red")))
	expect(t, next(t, red), "ADDED c@8") // usable after its context ended
	if resumed := watch(t, s, 5, raftstore.Filter{Resource: api.ConfigMaps}); resumed.Progress() != 5 {
		t.Fatalf("progress %d", resumed.Progress())
	} else {
		expect(t, next(t, resumed), "DELETED a@6", "DELETED b@7", "ADDED c@8")
	}
}

// TestEncodedOnce: watchers share what one of them has made of an event that they see as
// the same type, while it is new.
func TestEncodedOnce(t *testing.T) {
	s := open(t, config(t.TempDir()))
	made := 0
	encoded := func(w *raftstore.Watch) (out []string) {
		t.Helper()
		events, err := w.Next(timeout(t))
		if err != nil {
			t.Fatal(err)
		}
		for i := range events {
			e := &events[i]
			data, err := e.Encoded(func() ([]byte, error) {
				made++
				return fmt.Appendf(nil, "%s %s", e.Type, e.Object.(*corev1.ConfigMap).Data["value"]), nil
			})
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, string(data))
		}
		return out
	}
	start := s.View().Revision()
	red := raftstore.Filter{Match: func(o api.Object) bool { return o.(*corev1.ConfigMap).Data["value"] == "red" }}
	must(t, s, create(configMap("a", "blue")))
	must(t, s, update(configMap("a", "red")))
	must(t, s, update(configMap("a", "blue")))
	all := []string{"ADDED blue", "MODIFIED red", "MODIFIED blue"}
	for range 3 {
		expect(t, encoded(watch(t, s, start, raftstore.Filter{})), all...)
	}
	expect(t, encoded(watch(t, s, start, red)), "ADDED red", "DELETED red")
	if made != 5 {
		t.Errorf("%d encodings were made, want 5", made)
	}
	failed := errors.New("failed")
	must(t, s, update(configMap("a", "green")))
	events, err := watch(t, s, s.View().Revision()-1, raftstore.Filter{}).Next(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []error{failed, nil} { // what failed is not kept
		if _, err := events[0].Encoded(func() ([]byte, error) { return nil, want }); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	// Events that are not new any more are encoded by each who wants them.
	for i := range 12 {
		must(t, s, create(configMap("big"+strconv.Itoa(i), strings.Repeat("x", 500_000))))
	}
	made = 0
	for range 2 {
		if got := encoded(watch(t, s, start, raftstore.Filter{})); fmt.Sprint(got[:3]) != fmt.Sprint(all) {
			t.Errorf("got %q", got[:3])
		}
	}
	if made < 2*len(all)+12 || made > 2*(len(all)+1)+12+8 {
		t.Errorf("%d encodings were made", made)
	}
}

func TestWatchBounds(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.HistoryEvents = 10
	s := open(t, cfg)
	slow := watch(t, s, s.View().Revision(), raftstore.Filter{Resource: api.ConfigMaps})
	for i := range 20 {
		must(t, s, create(configMap("c"+strconv.Itoa(i), "x")))
	}
	now := s.View().Revision()
	if _, err := slow.Next(timeout(t)); !errors.Is(err, raftstore.ErrSlowWatcher) || !errors.Is(err, raftstore.ErrCompacted) {
		t.Fatalf("overtaken: %v", err)
	}
	for from, ok := range map[uint64]bool{now: true, now - 10: true, now - 11: false, now + 1: false, 0: false} {
		if _, err := s.Watch(timeout(t), from, raftstore.Filter{}); (err == nil) != ok || err != nil && !errors.Is(err, raftstore.ErrCompacted) {
			t.Errorf("watch from %d at %d: %v", from, now, err)
		}
	}
}

func TestHistoryIsBoundedInBytes(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.HistoryBytes = 100_000
	s := open(t, cfg)
	for i := range 20 {
		must(t, s, create(configMap("c"+strconv.Itoa(i), string(make([]byte, 20_000)))))
	}
	now := s.View().Revision()
	watch(t, s, now-4, raftstore.Filter{})
	if _, err := s.Watch(timeout(t), now-6, raftstore.Filter{}); !errors.Is(err, raftstore.ErrCompacted) {
		t.Fatalf("got %v", err)
	}
}

// TestCatchingUp reads a history that is longer than one batch.
func TestCatchingUp(t *testing.T) {
	s := open(t, config(t.TempDir()))
	w := watch(t, s, s.View().Revision(), raftstore.Filter{Resource: api.ConfigMaps})
	seen := s.View().Revision()
	for p := range 4 {
		var objects []api.Object
		for i := range 700 {
			objects = append(objects, configMap(fmt.Sprint("c", p, "-", i), "x"))
		}
		must(t, s, create(objects...))
	}
	for calls := 1; seen < s.View().Revision(); calls++ {
		events, err := w.Next(timeout(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if seen++; e.Revision != seen {
				t.Fatalf("call %d: revision %d where %d is next", calls, e.Revision, seen)
			}
		}
		if len(events)%700 != 0 || w.Progress() != seen {
			t.Fatalf("call %d: %d events, progress %d at revision %d", calls, len(events), w.Progress(), seen)
		}
	}
}

// TestViewCanBeWatched takes revisions from views as fast as it can while they change.
func TestViewCanBeWatched(t *testing.T) {
	s := open(t, config(t.TempDir()))
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if _, err := s.Watch(context.Background(), s.View().Revision(), raftstore.Filter{}); err != nil {
				t.Error(err)
				return
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	for i := range 400 {
		must(t, s, create(configMap("c"+strconv.Itoa(i), "x")))
	}
	close(done)
	wg.Wait()
}

func TestWaitChange(t *testing.T) {
	s := open(t, config(t.TempDir()))
	since := s.View().Revision()
	ctx, cancel := context.WithCancel(timeout(t))
	cancel()
	if _, err := s.WaitChange(ctx, since); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for seen := since; seen < since+20; {
			view, err := s.WaitChange(timeout(t), seen)
			if err != nil || view.Revision() <= seen {
				t.Errorf("%v after revision %d", err, seen)
				return
			}
			seen = view.Revision()
		}
	})
	for i := range 20 {
		must(t, s, create(configMap("c"+strconv.Itoa(i), "x")))
	}
	wg.Wait()
}

func TestOneTransactionComesTogether(t *testing.T) {
	s := open(t, config(t.TempDir()))
	w := watch(t, s, s.View().Revision(), raftstore.Filter{Resource: api.ConfigMaps})
	var objects []api.Object
	for i := range 3000 {
		objects = append(objects, configMap("c"+strconv.Itoa(i), "x"))
	}
	must(t, s, create(objects...))
	if got := next(t, w); len(got) != 3000 {
		t.Fatalf("%d of 3000 events", len(got))
	}
}

// TestWatchHasNoGapAndNoDuplicate lets writers and watchers run against each other.
// Every watcher rebuilds the objects from its events, now and then resuming from its
// progress, and must end with what the store has.
func TestWatchHasNoGapAndNoDuplicate(t *testing.T) {
	s := open(t, config(t.TempDir()))
	last := make(chan struct{}) // closed when final is known
	var final uint64
	var watchers, writers sync.WaitGroup
	for i := range 6 {
		filter := raftstore.Filter{}
		if i%2 == 1 {
			filter.Resource = api.ConfigMaps
		}
		base := s.View()
		watchers.Go(func() { follow(t, s, base, filter, last, &final) })
	}
	for p := range 6 {
		writers.Go(func() { write(t, s, p, 60) })
	}
	writers.Wait()
	final = must(t, s, create(configMap("the-end", ""))).Revision
	close(last)
	watchers.Wait()
}

func write(t *testing.T, s *raftstore.Store, p, n int) {
	random := rand.New(rand.NewPCG(uint64(p), 1))
	for i := range n {
		o := configMap("c"+strconv.Itoa(random.IntN(8)), fmt.Sprint(p, i))
		txn := []func(...api.Object) command.Txn{create, func(o ...api.Object) command.Txn { return update(o[0]) }, func(o ...api.Object) command.Txn { return remove(o[0]) }}[random.IntN(3)](o)
		if random.IntN(3) == 0 {
			txn.Mutations = append(txn.Mutations, create(configMap(fmt.Sprintf("new-%d-%d", p, i), "")).Mutations...)
		}
		if _, err := s.Propose(timeout(t), txn); err != nil {
			t.Error(err)
			return
		}
	}
}

// follow checks each event against what the events before it made.
func follow(t *testing.T, s *raftstore.Store, base *state.State, filter raftstore.Filter, last <-chan struct{}, final *uint64) {
	objects := map[string]api.Object{}
	for o := range base.List(api.ConfigMaps, "") {
		objects[o.GetName()] = o
	}
	w, err := s.Watch(timeout(t), base.Revision(), filter)
	if err != nil {
		t.Error(err)
		return
	}
	seen := base.Revision()
	for {
		events, err := w.Next(timeout(t))
		if err != nil {
			t.Error(err)
			return
		}
		for _, e := range events {
			if e.Revision != seen+1 { // only ConfigMaps change here
				t.Errorf("revision %d after %d", e.Revision, seen)
				return
			}
			seen = e.Revision
			if objects[e.Key.Name] != e.Previous {
				t.Errorf("%s at %d: the previous object is not the last one seen", e.Key, e.Revision)
			}
			if e.Type == raftstore.Deleted {
				delete(objects, e.Key.Name)
			} else {
				objects[e.Key.Name] = e.Object
			}
		}
		if s.View().Revision() < seen {
			t.Error("an event came before the state that has it")
		}
		if _, err := s.Watch(timeout(t), s.View().Revision(), filter); err != nil {
			t.Errorf("watch from the revision of a view: %v", err)
		}
		if rand.IntN(4) == 0 {
			if w, err = s.Watch(timeout(t), w.Progress(), filter); err != nil {
				t.Error(err)
				return
			}
		}
		if _, ended := objects["the-end"]; !ended {
			continue
		}
		<-last
		if seen != *final {
			t.Errorf("ended at revision %d, want %d", seen, *final)
		}
		if n := s.View().Len(api.ConfigMaps); len(objects) != n {
			t.Errorf("the events make %d objects, the store has %d", len(objects), n)
		}
		return
	}
}
