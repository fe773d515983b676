package agent

import (
	"context"
	"maps"
	"reflect"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

const (
	listEvery   = 10 * time.Second // without an event
	listSpacing = 5 * time.Millisecond
	listTimeout = 20 * time.Second
)

// observer keeps the newest List of the runtime. Lists are numbered: whoever has
// changed something asks for fresh() and ignores what was listed before.
type observer struct {
	runtime Runtime
	// changed is called, outside the lock, with the pods whose sandbox differs from
	// the list before.
	changed func([]types.UID)
	ask     chan struct{}
	// turned receives when the runtime is lost or found; it holds one signal.
	turned chan struct{}

	mu       sync.Mutex
	begun    uint64 // number of the last list begun
	have     uint64 // number of the last list that succeeded; 0: none yet
	pods     map[types.UID]*Sandbox
	waiting  map[types.UID]uint64 // who waits for which list
	err      error
	errSince time.Time
}

func newObserver(r Runtime, changed func([]types.UID)) *observer {
	return &observer{runtime: r, changed: changed, ask: make(chan struct{}, 1), turned: make(chan struct{}, 1), pods: map[types.UID]*Sandbox{}, waiting: map[types.UID]uint64{}}
}

// fresh returns the number of the first list that will show everything done so
// far, and asks for it. The pod counts as changed when that list is there, whether
// or not it differs from an earlier one that the pod had to ignore.
func (o *observer) fresh(uid types.UID) uint64 {
	o.mu.Lock()
	n := o.begun + 1
	o.waiting[uid] = n
	o.mu.Unlock()
	select {
	case o.ask <- struct{}{}:
	default:
	}
	return n
}

// get returns the sandbox of a pod (shared, nil if there is none) and the number of
// the list it is from; 0 before the first.
func (o *observer) get(uid types.UID) (*Sandbox, uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.pods[uid], o.have
}

// all returns the sandboxes of the newest list and its number; 0 before the first.
func (o *observer) all() (pods map[types.UID]*Sandbox, number uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.pods), o.have
}

// health returns the error of the runtime, if the last list did not succeed, and
// since when it is so.
func (o *observer) health() (since time.Time, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.errSince, o.err
}

// run lists until ctx ends. After an error it backs off, whatever the events say.
func (o *observer) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for failures := 0; ; {
		ask, events := o.ask, o.runtime.Events()
		if failures > 0 {
			ask, events = nil, nil
		}
		select {
		case <-ctx.Done():
			return
		case <-ask:
		case <-events:
		case <-timer.C:
		}
		if err := o.list(ctx); err != nil {
			failures++
			timer.Reset(min(100*time.Millisecond<<min(failures-1, 10), 5*time.Second))
			continue
		}
		failures = 0
		select { // a burst of events costs one list
		case <-ctx.Done():
			return
		case <-time.After(listSpacing):
		}
		timer.Reset(listEvery)
	}
}

func (o *observer) list(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	o.mu.Lock()
	o.begun++
	number := o.begun
	o.mu.Unlock()
	list, err := o.runtime.List(ctx)
	if err != nil {
		o.mu.Lock()
		first := o.err == nil
		if first {
			o.errSince = time.Now()
		}
		o.err = err
		o.mu.Unlock()
		if first {
			o.turn()
			o.changed(nil)
		}
		return err
	}
	pods := make(map[types.UID]*Sandbox, len(list))
	for i := range list {
		pods[list[i].UID] = &list[i]
	}
	o.mu.Lock()
	recovered := o.err != nil || o.have == 0
	old := o.pods
	o.pods, o.have, o.err = pods, number, nil
	var waited []types.UID
	for uid, n := range o.waiting {
		if n <= number {
			waited = append(waited, uid)
			delete(o.waiting, uid)
		}
	}
	o.mu.Unlock()
	if recovered {
		o.turn()
	}
	changed := append(difference(old, pods), waited...)
	if len(changed) > 0 || recovered {
		o.changed(changed)
	}
	return nil
}

func (o *observer) turn() {
	select {
	case o.turned <- struct{}{}:
	default:
	}
}

func difference(old, now map[types.UID]*Sandbox) (uids []types.UID) {
	for uid, s := range now {
		if o, ok := old[uid]; !ok || !reflect.DeepEqual(o, s) {
			uids = append(uids, uid)
		}
	}
	for uid := range old {
		if _, ok := now[uid]; !ok {
			uids = append(uids, uid)
		}
	}
	return uids
}
