package agent

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"decree.dev/decree/schemas/api"
)

const (
	reportBatch   = 256
	reportTimeout = 10 * time.Second
	reportTries   = 4 // of one event that is refused
	// reportQueue bounds the keys that wait while the control plane is gone; events
	// beyond it are dropped, the state of pods is not.
	reportQueue = 4096
)

// reporter sends mutations to the control plane: batched, in order of first
// arrival, the latest per object wins, retried until sent.
type reporter struct {
	plane ControlPlane
	log   *slog.Logger
	wake  chan struct{}

	mu    sync.Mutex
	order []api.Key
	items map[api.Key]*reportItem
	due   bool // a report is wanted even without mutations
}

type reportItem struct {
	m     api.Mutation
	tries int
	// refused is told when the control plane did not want the mutation.
	refused func(error)
}

func newReporter(p ControlPlane, log *slog.Logger) *reporter {
	return &reporter{plane: p, log: log, wake: make(chan struct{}, 1), items: map[api.Key]*reportItem{}}
}

// put hands over a mutation; it replaces a waiting one of the same object.
// refused may be nil; it must not block.
func (r *reporter) put(m api.Mutation, refused func(error)) {
	r.mu.Lock()
	old, waiting := r.items[m.Key]
	if !waiting && m.Key.Resource == api.Events && len(r.items) >= reportQueue {
		r.mu.Unlock()
		return
	}
	if !waiting {
		r.order = append(r.order, m.Key)
	} else if old.m.Verb == api.Create && m.Verb != api.Delete {
		m.Verb = api.Create // what was never sent cannot be updated
	}
	r.items[m.Key] = &reportItem{m: m, refused: refused}
	r.mu.Unlock()
	r.signal()
}

// beat asks for a report that says no more than that the node lives.
func (r *reporter) beat() {
	r.mu.Lock()
	r.due = true
	r.mu.Unlock()
	r.signal()
}

func (r *reporter) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run sends until ctx ends.
func (r *reporter) run(ctx context.Context) {
	for failures := 0; ; {
		if failures == 0 {
			select {
			case <-ctx.Done():
				return
			case <-r.wake:
			}
		} else {
			select {
			case <-ctx.Done():
				return
			case <-time.After(min(50*time.Millisecond<<min(failures-1, 10), 5*time.Second)):
			}
		}
		sent, err := r.flush(ctx)
		switch {
		case err != nil:
			if failures++; failures == 1 {
				r.log.Warn("report to the control plane", "err", err)
			}
		case failures > 0:
			r.log.Info("report to the control plane works again")
			failures = 0
			r.signal()
		case sent == reportBatch:
			r.signal()
		}
	}
}

// flush sends one batch. It returns an error when the control plane could not be
// asked. What it refuses is told to whoever put it.
func (r *reporter) flush(ctx context.Context) (int, error) {
	keys, items, due := r.take()
	if len(keys) == 0 && !due {
		return 0, nil
	}
	ms := make([]api.Mutation, len(items))
	for i, it := range items {
		ms[i] = it.m
	}
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	errs, err := r.plane.Report(ctx, ms)
	if err != nil {
		r.putBack(keys, items)
		if due {
			r.beat()
		}
		return 0, err
	}
	for i, e := range errs {
		if e == nil {
			continue
		}
		it := items[i]
		if it.tries++; keys[i].Resource == api.Events && it.tries < reportTries {
			// An earlier try may have been applied without our hearing of it, or
			// the event was removed meanwhile.
			it.m.Verb = map[api.Verb]api.Verb{api.Create: api.Update, api.Update: api.Create}[it.m.Verb]
			r.putBack(keys[i:i+1], items[i:i+1])
			r.signal()
			continue
		}
		r.log.Debug("report refused", "object", keys[i].String(), "verb", it.m.Verb.String(), "err", e)
		if it.refused != nil {
			it.refused(e)
		}
	}
	return len(ms), nil
}

func (r *reporter) take() (keys []api.Key, items []*reportItem, due bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	due, r.due = r.due, false
	n := min(len(r.order), reportBatch)
	keys = append(keys, r.order[:n]...)
	r.order = append(r.order[:0:0], r.order[n:]...)
	items = make([]*reportItem, n)
	for i, k := range keys {
		items[i] = r.items[k]
		delete(r.items, k)
	}
	return keys, items, due
}

// putBack returns unsent items to the head of the queue, unless newer ones wait.
func (r *reporter) putBack(keys []api.Key, items []*reportItem) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var front []api.Key
	for i, k := range keys {
		if newer, ok := r.items[k]; ok {
			if items[i].m.Verb == api.Create && newer.m.Verb == api.Update {
				newer.m.Verb = api.Create
			}
			continue
		}
		r.items[k] = items[i]
		front = append(front, k)
	}
	r.order = append(front, r.order...)
}

// drain sends what waits, once, within ctx; for the end of the agent.
func (r *reporter) drain(ctx context.Context) {
	for ctx.Err() == nil {
		if n, err := r.flush(ctx); n == 0 || err != nil {
			return
		}
	}
}
