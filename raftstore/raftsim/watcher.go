package raftsim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// watcher is a client that keeps a copy of the objects by list and watch, from one
// server after another.
type watcher struct {
	cluster *cluster
	name    string

	copy     map[string]entry
	cursor   uint64 // everything up to here is in the copy
	listed   bool
	sessions []*session
}

// session is what a watcher was told from a list to the next one.
type session struct {
	from, to  uint64
	revisions []uint64
	changes   []change
}

// keep keeps the copy up to date until ctx ends.
func (w *watcher) keep(ctx context.Context) {
	rnd := stream(w.cluster.options.Seed, w.name)
	for ctx.Err() == nil {
		run := w.cluster.any(rnd)
		if run == nil {
			w.cluster.pause(ctx, breakAfter)
			continue
		}
		if w.listed || w.list(ctx, run) {
			w.follow(ctx, run, between(rnd, breakAfter/10, 4*breakAfter))
		}
		w.cluster.pause(ctx, between(rnd, 0, breakAfter/5))
	}
}

// finish brings the copy up to a revision.
func (w *watcher) finish(ctx context.Context, run *run, revision uint64) {
	for ctx.Err() == nil && !(w.listed && w.cursor >= revision) {
		if w.listed || w.list(ctx, run) {
			w.follow(ctx, run, breakAfter)
		}
	}
}

// list makes a new copy. One that is older than the last would be wrong.
func (w *watcher) list(ctx context.Context, run *run) bool {
	view, ok := w.cluster.read(ctx, run, 2*breakAfter)
	if !ok {
		return false
	}
	if view.Revision() < w.cursor {
		w.cluster.fail("%s: listed revision %d from %s after revision %d", w.name, view.Revision(), run.server.id, w.cursor)
	}
	w.copy, w.cursor, w.listed = contents(view), view.Revision(), true
	w.sessions = append(w.sessions, &session{from: w.cursor, to: w.cursor})
	return true
}

// follow watches one server for a while.
func (w *watcher) follow(ctx context.Context, run *run, d time.Duration) {
	ctx, cancel := w.cluster.within(ctx, run, d)
	defer cancel()
	watch, err := run.store.Watch(ctx, w.cursor, raftstore.Filter{Resource: api.ConfigMaps})
	for err == nil {
		var events []raftstore.Event
		events, err = watch.Next(ctx)
		if run.dead.Load() {
			return
		}
		for _, e := range events {
			w.apply(run, e)
		}
		if err == nil {
			w.pairs(run)
		}
		if ctx.Err() != nil { // a bookmark: go on from there
			w.advance(watch.Progress())
			return
		}
	}
	if errors.Is(err, raftstore.ErrCompacted) {
		w.listed = false
	}
}

// apply changes the copy, and checks that the event continues it.
func (w *watcher) apply(run *run, e raftstore.Event) {
	c := changeOf(e)
	s := w.sessions[len(w.sessions)-1]
	s.revisions, s.changes = append(s.revisions, e.Revision), append(s.changes, c)
	old, exists := w.copy[c.name]
	switch {
	case e.Revision <= w.cursor:
		w.cluster.fail("%s: %s told of revision %d after %d", w.name, run.server.id, e.Revision, w.cursor)
	case exists != (c.typ != raftstore.Added):
		w.cluster.fail("%s: %s at revision %d, which is known: %v (%+v)", w.name, c, e.Revision, exists, old)
	}
	w.advance(e.Revision)
	if c.typ == raftstore.Deleted {
		delete(w.copy, c.name)
		return
	}
	w.copy[c.name] = entry{c.value, e.Revision}
}

func (w *watcher) advance(revision uint64) {
	w.cursor = max(w.cursor, revision)
	w.sessions[len(w.sessions)-1].to = w.cursor
}

// pairs checks that what is written together is seen together.
func (w *watcher) pairs(run *run) {
	if broken := brokenPair(w.copy); broken != "" {
		w.cluster.fail("%s: %s told of half a transaction: %s", w.name, run.server.id, broken)
	}
}

// check compares the copy, and everything that led to it, with the history, when
// everything is quiet.
func (w *watcher) check(h *past) {
	if !w.listed || w.cursor < h.revision {
		w.cluster.fail("%s: has come to revision %d of %d", w.name, w.cursor, h.revision)
		return
	}
	if want := h.at(h.revision); !maps.Equal(w.copy, want) {
		w.cluster.fail("%s: has another copy at revision %d: %v", w.name, w.cursor, difference(w.copy, want))
	}
	for _, s := range w.sessions {
		var revisions []uint64
		for r := s.from + 1; r <= s.to; r++ {
			if c, ok := h.changes[r]; ok && c.name != "" {
				revisions = append(revisions, r)
			}
		}
		if !slices.Equal(s.revisions, revisions) {
			w.cluster.fail("%s: listed at revision %d, was told of %v up to %d, not of %v", w.name, s.from, s.revisions, s.to, revisions)
			return
		}
		for i, r := range s.revisions {
			if s.changes[i] != h.changes[r] {
				w.cluster.fail("%s: was told of %s at revision %d, which was %s", w.name, s.changes[i], r, h.changes[r])
			}
		}
	}
}

func difference(got, want map[string]entry) []string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if got[name] != want[name] {
			list = append(list, fmt.Sprintf("%s is %v, not %v", name, got[name], want[name]))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[name]; !ok {
			list = append(list, fmt.Sprintf("%s is %v, not absent", name, got[name]))
		}
	}
	return list
}
