// Package control runs the pure planners of workload and schedule against the
// store: it maps every change to the objects it concerns, asks their planner for
// mutations, and proposes them. It decides nothing itself.
//
// Every controller is level-triggered: a change only says which object to look at
// again, and after a lost watch all objects are looked at. It may be killed between
// any two steps. A planner that panics takes the process with it: that is a defect
// to be seen, and containers do not need this process to keep running.
package control

import (
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler"
	"decree.dev/decree/reconciler/schedule"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// Change is one changed object: before and after, nil where it did not exist.
type Change struct{ Old, New api.Object }

// Store is the part of the replicated store that controllers need.
type Store interface {
	// View returns the local view.
	View() api.Reader
	// Changes calls f with every change after revision, in order and without gaps,
	// until ctx ends or the history is too old (an error: list again).
	Changes(ctx context.Context, after uint64, f func([]Change)) error
	// Propose replicates a transaction; a rejection is in the result. When it returns,
	// View holds what was applied, and what a rejection was about.
	Propose(ctx context.Context, t command.Txn) (command.Result, error)
}

// Contacts says when each node was last heard of. It lives in the leader's memory.
type Contacts interface{ LastContacts() map[string]time.Time }

// Controllers runs all controllers of the leader.
type Controllers struct {
	Store    Store
	Contacts Contacts
	Log      *slog.Logger
}

const (
	// workers is how many keys of one controller are planned and proposed at once.
	// Proposals that wait together share one write to disk.
	workers = 8
	// timeout bounds one pass, in which few proposals are replicated.
	timeout = 30 * time.Second
)

// backoff is for what fails although the view is the newest.
var backoff = reconciler.Backoff{Min: 5 * time.Millisecond, Max: 10 * time.Second}

// run is the controllers between start and stop.
type run struct {
	*Controllers
	keyed []*controller

	// Each holds a signal when there is something to do for the loop of that name.
	scheduler, nodes, garbage, balancers, ingresses wake
}

// wake holds at most one signal.
type wake chan struct{}

func newWake() wake { return make(wake, 1) }

func (w wake) signal() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// Run works until ctx ends, waits for what it started, and returns the cause. It may
// be called again after that.
func (c *Controllers) Run(ctx context.Context) error {
	r := &run{Controllers: c, keyed: controllers(), scheduler: newWake(), nodes: newWake(), garbage: newWake(), balancers: newWake(), ingresses: newWake()}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	start := func(part func(context.Context) error) {
		parts.Go(func() { cancel(part(ctx)) }) // the first one to end ends all
	}
	for _, ctl := range r.keyed {
		ctl.queue = &reconciler.Keyed[api.Key]{
			Name: ctl.name, Workers: workers, Backoff: backoff, Timeout: timeout, Logger: c.Log,
			Do: func(ctx context.Context, k api.Key) (time.Duration, error) { return r.once(ctx, ctl, k) },
		}
		start(ctl.queue.Run)
	}
	start(r.loop("scheduler", r.scheduler, time.Minute, r.schedule).Run)
	start(r.loop("garbage", r.garbage, time.Minute, r.collect).Run)
	start(r.loop("balancers", r.balancers, time.Minute, r.balance).Run)
	start(r.loop("ingresses", r.ingresses, time.Minute, r.expose).Run)
	nodes := r.loop("nodes", r.nodes, 5*time.Second, nil) // contacts come without an event
	nodes.Once = func(ctx context.Context) error { return r.judge(ctx, nodes.WakeAfter) }
	start(nodes.Run)
	start(r.dispatch)
	parts.Wait()
	return context.Cause(ctx)
}

func (r *run) loop(name string, changed wake, resync time.Duration, once func(context.Context) error) *reconciler.Loop {
	return &reconciler.Loop{Name: name, Changed: changed, Resync: resync, Backoff: backoff, Timeout: timeout, Logger: r.Log, Once: once}
}

// dispatch turns changes into keys until ctx ends. A watch that is lost before it
// has brought anything is not asked for again at once.
func (r *run) dispatch(ctx context.Context) error {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for failures := 0; ; failures++ {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-pause.C:
		}
		view := r.Store.View()
		r.everything(view)
		err := r.Store.Changes(ctx, view.Revision(), func(changes []Change) {
			failures = 0
			view := r.Store.View()
			for _, ch := range changes {
				r.route(view, ch)
			}
		})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r.Log.Info("controllers lost their watch and look at everything again", "err", err)
		pause.Reset(backoff.Wait(failures))
	}
}

// everything asks for a look at all there is.
func (r *run) everything(view api.Reader) {
	for _, ctl := range r.keyed {
		for o := range view.List(ctl.owns, "") {
			ctl.queue.Add(api.KeyOf(o))
		}
	}
	r.scheduler.signal()
	r.nodes.signal()
	r.garbage.signal()
	r.balancers.signal()
	r.ingresses.signal()
}

// route wakes whom a change concerns. Before and after both count: a pod may have
// left a service.
func (r *run) route(view api.Reader, ch Change) {
	if freesOrWants(ch) {
		r.scheduler.signal()
	}
	if leavesGarbage(view, ch) {
		r.garbage.signal()
	}
	if concernsBalancers(ch.Old) || concernsBalancers(ch.New) {
		r.balancers.signal()
	}
	if concernsIngresses(ch.Old) || concernsIngresses(ch.New) {
		r.ingresses.signal()
	}
	for _, o := range []api.Object{ch.Old, ch.New} {
		if o == nil {
			continue
		}
		if _, ok := o.(*corev1.Node); ok {
			r.nodes.signal()
		}
		for _, ctl := range r.keyed {
			ctl.queue.Add(ctl.concerns(view, o)...)
		}
	}
}

// freesOrWants says whether a change may let a pod be placed: one waits that did not
// wait like this before, one gave back its place, or a node is another one. What
// nodes report about running pods is none of these.
func freesOrWants(ch Change) bool {
	before, _ := ch.Old.(*corev1.Pod)
	after, _ := ch.New.(*corev1.Pod)
	switch {
	case before == nil && after == nil:
		_, was := ch.Old.(*corev1.Node)
		_, is := ch.New.(*corev1.Node)
		return was || is
	case after == nil:
		return before.Spec.NodeName != ""
	case before == nil:
		return schedule.IsPending(after)
	case schedule.IsPending(after):
		return !schedule.IsPending(before) || before.Generation != after.Generation
	}
	return after.Spec.NodeName != "" && api.PodFinished(after) && !api.PodFinished(before)
}

// concernsBalancers says whether addresses of load balancers depend on o.
func concernsBalancers(o api.Object) bool {
	switch o := o.(type) {
	case *corev1.Service:
		return o.Spec.Type == corev1.ServiceTypeLoadBalancer
	case *api.AddressPool, *corev1.Namespace:
		return true
	}
	return false
}

// concernsIngresses says whether addresses of Ingresses depend on o.
func concernsIngresses(o api.Object) bool {
	switch o.(type) {
	case *networkingv1.Ingress, *networkingv1.IngressClass, *corev1.Node:
		return true
	}
	return false
}

// leavesGarbage says whether a change makes something superfluous: the object itself,
// what it controlled, or what was in it or on it.
func leavesGarbage(view api.Reader, ch Change) bool {
	if ch.New != nil {
		return workload.IsGarbage(time.Now(), view, ch.New)
	}
	switch ch.Old.(type) {
	case *corev1.Namespace, *corev1.Node:
		return true
	}
	for range view.Owned(ch.Old.GetUID()) {
		return true
	}
	return false
}
