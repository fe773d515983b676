package raftsim

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// entry is what a watcher or a reader sees of one object: its value, and the revision
// that it has had since.
type entry struct {
	value    string
	revision uint64
}

// change is one event of the cluster's history.
type change struct {
	typ   raftstore.EventType
	name  string
	value string
}

func (c change) String() string { return fmt.Sprintf("%s %s=%s", c.typ, c.name, c.value) }

// changeOf reduces an event to what is compared.
func changeOf(e raftstore.Event) change {
	if e.Key.Resource != api.ConfigMaps { // no client's
		return change{typ: e.Type, value: e.Key.String()}
	}
	return change{typ: e.Type, name: e.Key.Name, value: valueOf(e.Object)}
}

func valueOf(o api.Object) string {
	if m, ok := o.(*corev1.ConfigMap); ok {
		return m.Data["value"]
	}
	return ""
}

// contents are the objects of a state that clients write.
func contents(view *state.State) map[string]entry {
	found := map[string]entry{}
	for o := range view.List(api.ConfigMaps, "") {
		revision, _ := strconv.ParseUint(o.GetResourceVersion(), 10, 64) // zero is never right
		found[o.GetName()] = entry{valueOf(o), revision}
	}
	return found
}

// recorder knows the one history that all servers must have gone through: what any of
// them ever told its watchers, and the hashes of their states.
type recorder struct {
	cluster *cluster

	mu      sync.Mutex
	changes map[uint64]change
	hashes  map[place]string
}

// place names a state: everything that two states with the same place hold must be the
// same.
type place struct{ index, revision uint64 }

func newRecorder(c *cluster) *recorder {
	return &recorder{cluster: c, changes: map[uint64]change{}, hashes: map[place]string{}}
}

// follow takes down what a run tells its watchers, until it ends.
func (r *recorder) follow(run *run) {
	if _, err := run.store.WaitChange(run.ctx, 0); err != nil { // no event leads to the first revision
		return
	}
	for cursor := uint64(1); run.ctx.Err() == nil; {
		w, err := run.store.Watch(run.ctx, cursor, raftstore.Filter{})
		if errors.Is(err, raftstore.ErrCompacted) && cursor < run.store.View().Revision() {
			cursor++ // as much of the history as there is
			continue
		}
		if errors.Is(err, raftstore.ErrCompacted) && cursor > run.store.View().Revision() {
			r.cluster.fail("%s went back to revision %d from %d", run.server.id, run.store.View().Revision(), cursor)
			return
		}
		for err == nil {
			var events []raftstore.Event
			if events, err = w.Next(run.ctx); err == nil {
				r.note(run, events)
				cursor = events[len(events)-1].Revision
			}
		}
		if errors.Is(err, raftstore.ErrClosed) {
			return
		}
		if !errors.Is(err, raftstore.ErrCompacted) && run.ctx.Err() == nil {
			r.cluster.fail("%s: watch: %v", run.server.id, err)
			return
		}
	}
}

func (r *recorder) note(run *run, events []raftstore.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if run.dead.Load() {
		return
	}
	run.told = max(run.told, events[len(events)-1].Revision)
	for _, e := range events {
		c := changeOf(e)
		if old, ok := r.changes[e.Revision]; ok && old != c {
			r.cluster.fail("revision %d is %q on %s, and was %q before", e.Revision, c, run.server.id, old)
		}
		r.changes[e.Revision] = c
		if o, ok := e.Object.(*api.Server); ok {
			r.cluster.autopilot.told(o)
		}
	}
	r.cluster.trace.add("%s at revision %d", run.server.id, events[len(events)-1].Revision)
}

// drain takes down what a run has applied and not told yet: it is about to crash.
func (r *recorder) drain(run *run) {
	ctx, cancel := context.WithCancel(run.ctx)
	cancel()
	r.mu.Lock()
	told := max(1, run.told)
	r.mu.Unlock()
	w, err := run.store.Watch(ctx, told, raftstore.Filter{})
	for err == nil {
		var events []raftstore.Event
		if events, err = w.Next(ctx); err == nil {
			r.note(run, events)
		}
	}
}

// compare hashes the state of a run, and compares it with others of the same place.
func (r *recorder) compare(run *run) {
	view := run.store.View()
	hash := view.Hash()
	r.mu.Lock()
	defer r.mu.Unlock()
	if run.dead.Load() {
		return
	}
	at := place{view.Index(), view.Revision()}
	r.cluster.trace.add("%s state %d %d %.12s", run.server.id, at.index, at.revision, hash)
	if old, ok := r.hashes[at]; ok && old != hash {
		r.cluster.fail("%s has another state than others at index %d, revision %d", run.server.id, at.index, at.revision)
	}
	r.hashes[at] = hash
}
