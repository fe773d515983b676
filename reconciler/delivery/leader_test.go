package delivery_test

import (
	"sync"
	"sync/atomic"
	"testing"

	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// A new leader has no mirror of its own yet. It takes nothing for a rewind that is
// none, and sees one that is.
func TestNewLeaderWithEmptyMirror(t *testing.T) {
	w := newWorld(t)
	old := w.lead("mirror-one", w.pipeline)
	dir, _ := w.repository("shop")
	second := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	w.external("shop", dir)
	w.awaitApplied("shop", second)
	old.stop()

	revision := w.store.View().Revision()
	now := w.lead("mirror-two", w.pipeline)
	<-now.fetcher.polled
	now.sync("shop") // the first poll is through by then
	if got := w.store.View().Revision(); got != revision {
		t.Errorf("a new leader moved the state from %d to %d: %+v", revision, got, condition(w.store.View(), "shop"))
	}
	third := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "3"))
	now.sync("shop")
	w.awaitApplied("shop", third)
	now.stop()

	mustGit(t, nil, dir, "reset", "-q", "--hard", second)
	last := w.lead("mirror-three", w.pipeline)
	c := w.awaitReason("shop", delivery.ReasonRewound)
	contains(t, c.Message, second[:7], third[:7])
	if got := w.source("shop").Status.Applied; got != third {
		t.Errorf("%s is in force, want %s", got, third)
	}
	last.stop()

	// A leader from before, whose mirror knows less, is no better and no worse.
	mustGit(t, nil, dir, "reset", "-q", "--hard", third)
	w.lead("mirror-one", w.pipeline)
	w.awaitApplied("shop", third)
}

// behind is a store whose local view stands still until it is let go.
type behind struct {
	*gate
	view api.Reader
	free atomic.Bool
}

func (b *behind) View() api.Reader {
	if b.free.Load() {
		return b.gate.View()
	}
	return b.view
}

// A server whose view is behind when it begins to lead judges by what is in force,
// not by what it has seen.
func TestLeaderWhoseViewIsBehind(t *testing.T) {
	w := newWorld(t)
	old := w.follow()
	dir, _ := w.repository("shop")
	second := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	w.external("shop", dir)
	w.awaitApplied("shop", second)
	store := &behind{gate: w.store, view: w.store.View()}
	mustGit(t, nil, dir, "reset", "-q", "--hard", "HEAD^")
	rewritten := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "3"))
	w.respec("shop", func(s *api.SourceSpec) { s.Commit = rewritten })
	w.awaitApplied("shop", rewritten)
	w.respec("shop", func(s *api.SourceSpec) { s.Commit = "" })
	w.awaitApplied("shop", rewritten)
	old.stop()

	p := *w.pipeline
	p.Store = store
	revision := w.store.View().Revision()
	now := w.lead("mirror-two", &p)
	mirror := now.fetcher.Fetcher
	now.fetcher.answer(func(int) (*gitsource.Fetched, error) {
		store.free.Store(true)
		now.fetcher.mu.Lock()
		r := now.fetcher.remote
		now.fetcher.mu.Unlock()
		return mirror.Fetch(w.ctx(), r)
	})
	<-now.fetcher.polled
	now.sync("shop")
	if got := w.store.View().Revision(); got != revision {
		t.Errorf("the state moved from %d to %d: %+v", revision, got, condition(w.store.View(), "shop"))
	}
}

// A leader that does not know yet that it leads no more has fetched what is old by now.
func TestDeposedLeaderBringsNothingBack(t *testing.T) {
	w := newWorld(t)
	old := w.lead("mirror-one", w.pipeline)
	dir, first := w.repository("shop")
	w.external("shop", dir)
	w.awaitApplied("shop", first)
	second := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	fetched, proceed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	mirror := old.fetcher.Fetcher
	old.fetcher.answer(func(int) (*gitsource.Fetched, error) {
		old.fetcher.mu.Lock()
		r := old.fetcher.remote
		old.fetcher.mu.Unlock()
		f, err := mirror.Fetch(w.ctx(), r)
		once.Do(func() { close(fetched); <-proceed })
		return f, err
	})
	if err := old.follower.Sync("shop"); err != nil {
		t.Fatal(err)
	}
	<-fetched // the second commit
	third := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "3"))
	w.lead("mirror-two", w.pipeline)
	w.await("the status names the third", func(r api.Reader) bool { return condition(r, "shop").Message == "at "+third })
	revision := w.store.View().Revision()
	close(proceed)
	old.sync("shop")
	old.sync("shop") // by now, what was held up is through
	old.stop()
	if got := w.source("shop").Status.Applied; got != third {
		t.Errorf("%s is in force, want %s; the old one is %s", got, third, second)
	}
	if got := w.store.View().Revision(); got != revision {
		t.Errorf("the state moved from %d to %d: %+v", revision, got, condition(w.store.View(), "shop"))
	}
}
