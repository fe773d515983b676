package delivery_test

import (
	"errors"
	"strings"
	"testing"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

func TestReferencesAreComparedAndSet(t *testing.T) {
	w := newWorld(t)
	r := &delivery.Receiver{Pipeline: w.pipeline}
	one, two := strings.Repeat("1", 40), strings.Repeat("2", 40)
	check := func(want string) {
		t.Helper()
		if got, err := r.Table(w.ctx(), "decree"); err != nil || got != want {
			t.Errorf("table %q, %v; want %q", got, err, want)
		}
	}
	check("")
	if err := r.Replace(w.ctx(), "decree", "", one, "ann"); err != nil {
		t.Fatal(err)
	}
	check(one)
	if err := r.Replace(w.ctx(), "decree", "", two, "ann"); !errors.Is(err, gitsource.ErrMoved) {
		t.Errorf("from an old table: %v", err)
	}
	check(one)
	if err := r.Replace(w.ctx(), "decree", "", one, "ann"); err != nil {
		t.Errorf("an answer that was lost: %v", err)
	}
	// The status changes for another reason in between.
	changed := false
	w.store.onPropose(func(command.Txn) error {
		if !changed {
			changed = true
			src := api.Clone(w.source("decree"))
			src.Status.Fetched = two
			w.mutate(api.Guarded(api.UpdateStatus, src))
		}
		return nil
	})
	if err := r.Replace(w.ctx(), "decree", one, two, "ann"); err != nil {
		t.Fatal(err)
	}
	check(two)
	if src := w.source("decree"); src.Status.Fetched != two {
		t.Error("the other change is lost")
	}
	// A commit that comes into force leaves them as they are.
	w.applied(commit("first", tree(configMap("a", "1"))))
	check(two)
	if _, err := r.Table(w.ctx(), "nothing"); !errors.Is(err, delivery.ErrNoSource) {
		t.Errorf("a source that is not there: %v", err)
	}
}
