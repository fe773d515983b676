// Package control runs the pure planners of workload and schedule against the
// store: it maps every change to the objects it concerns, asks their planner for
// mutations, and proposes them. It decides nothing itself.
//
// Every controller is level-triggered: a change only says which object to look at
// again, and after a lost watch all objects are looked at. It may be killed between
// any two steps.
package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

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
	// until ctx ends (nil) or the history is too old (an error: list again).
	Changes(ctx context.Context, after uint64, f func([]Change)) error
	// Propose replicates a transaction; a rejection is in the result.
	Propose(ctx context.Context, t command.Txn) (command.Result, error)
}

// Contacts says when each node was last heard of. It lives in the leader's memory.
type Contacts interface{ LastContacts() map[string]time.Time }

// controller is one kind's planner with its place in the flow of changes.
type controller struct {
	name string
	// owns is the resource whose objects are planned.
	owns api.Resource
	// concerns maps a changed object of any kind to the keys to look at.
	concerns func(view api.Reader, o api.Object) []api.Key
	// plan returns what to change for one key; after is when to look again even
	// without a change, zero for never.
	plan  func(now time.Time, view api.Reader, k api.Key) (ms []api.Mutation, after time.Duration)
	queue *reconciler.Keyed[api.Key]
}

// workers is how many keys of one controller are planned and proposed at once.
// Proposals that wait together share one write to disk.
const workers = 8

// timeout bounds one pass, in which at most one proposal is replicated per key.
const timeout = 30 * time.Second

// backoff is short at first: the usual failure is a conflict with a status that
// arrived meanwhile, and planning again from the newer view settles it.
var backoff = reconciler.Backoff{Min: 5 * time.Millisecond, Max: 10 * time.Second}

// Controllers runs all controllers of the leader.
type Controllers struct {
	Store    Store
	Contacts Contacts
	Log      *slog.Logger
}

// Run works until ctx ends.
func (c *Controllers) Run(ctx context.Context) error {
	list := controllers()
	pods, gone := make(chan struct{}, 1), make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(ctx)
	running := make(chan error)
	started := 0
	start := func(f func(context.Context) error) {
		started++
		go func() { running <- f(ctx) }()
	}
	for _, ctl := range list {
		ctl.queue = &reconciler.Keyed[api.Key]{
			Name: ctl.name, Workers: workers, Backoff: backoff, Timeout: timeout, Logger: c.Log,
			Do: func(ctx context.Context, k api.Key) (time.Duration, error) { return c.once(ctx, ctl, k) },
		}
		start(ctl.queue.Run)
	}
	start((&reconciler.Loop{Name: "scheduler", Changed: pods, Resync: time.Minute, Backoff: backoff, Timeout: timeout, Logger: c.Log, Once: c.schedule}).Run)
	start((&reconciler.Loop{Name: "nodes", Resync: 5 * time.Second, Timeout: timeout, Logger: c.Log, Once: c.nodes}).Run)
	start((&reconciler.Loop{Name: "garbage", Changed: gone, Resync: time.Minute, Backoff: backoff, Timeout: timeout, Logger: c.Log, Once: c.garbage}).Run)
	start(func(ctx context.Context) error { return c.dispatch(ctx, list, pods, gone) })
	err := <-running
	cancel()
	for range started - 1 {
		<-running
	}
	return err
}

// dispatch turns changes into keys until ctx ends.
func (c *Controllers) dispatch(ctx context.Context, list []*controller, pods, gone chan<- struct{}) error {
	for {
		view := c.Store.View()
		for _, ctl := range list {
			for o := range view.List(ctl.owns, "") {
				ctl.queue.Add(api.KeyOf(o))
			}
		}
		signal(pods)
		signal(gone)
		err := c.Store.Changes(ctx, view.Revision(), func(changes []Change) {
			view := c.Store.View()
			for _, ch := range changes {
				c.route(list, view, ch, pods)
				if ch.New == nil {
					signal(gone)
				}
			}
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.Log.Info("controllers lost their watch and look at everything again", "err", err)
	}
}

func (c *Controllers) route(list []*controller, view api.Reader, ch Change, pods chan<- struct{}) {
	for _, o := range []api.Object{ch.Old, ch.New} {
		if o == nil {
			continue
		}
		switch o.(type) {
		case *corev1.Pod, *corev1.Node:
			signal(pods)
		}
		for _, ctl := range list {
			for _, k := range ctl.concerns(view, o) {
				ctl.queue.Add(k)
			}
		}
	}
}

// once plans one key and proposes the result.
func (c *Controllers) once(ctx context.Context, ctl *controller, k api.Key) (time.Duration, error) {
	ms, after := ctl.plan(time.Now(), c.Store.View(), k)
	if len(ms) == 0 {
		return after, nil
	}
	return after, c.propose(ctx, ctl.name, ms)
}

// propose replicates a plan. A conflict means that the plan was made from a view
// that is behind: it is an error, so that the key is planned again.
func (c *Controllers) propose(ctx context.Context, name string, ms []api.Mutation) error {
	res, err := c.Store.Propose(ctx, command.Txn{Time: time.Now().UnixMilli(), Actor: "controller/" + name, Mutations: ms})
	if err != nil {
		return err
	}
	if res.Rejected != nil {
		return fmt.Errorf("%s: %w", name, res.Rejected)
	}
	return nil
}

// schedule binds what can be bound. Every pod travels in a transaction of its own,
// so that one that changed meanwhile does not hold up the others; they still share
// the writes to disk.
func (c *Controllers) schedule(ctx context.Context) error {
	ms := schedule.Pass(time.Now(), c.Store.View())
	errs := make(chan error, len(ms))
	slots := make(chan struct{}, 256)
	for _, m := range ms {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			errs <- c.propose(ctx, "scheduler", []api.Mutation{m})
		}()
	}
	var all []error
	for range ms {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

func (c *Controllers) nodes(ctx context.Context) error {
	ms, _ := workload.Nodes(time.Now(), c.Store.View(), c.Contacts.LastContacts())
	if len(ms) == 0 {
		return nil
	}
	return c.propose(ctx, "nodes", ms)
}

func (c *Controllers) garbage(ctx context.Context) error {
	ms := workload.Garbage(time.Now(), c.Store.View())
	if len(ms) == 0 {
		return nil
	}
	return c.propose(ctx, "garbage", ms)
}

func signal(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// controllers lists the keyed controllers.
func controllers() []*controller {
	return []*controller{
		{
			name: "deployment", owns: api.Deployments,
			concerns: func(view api.Reader, o api.Object) []api.Key {
				switch o := o.(type) {
				case *appsv1.Deployment:
					return []api.Key{api.KeyOf(o)}
				case *appsv1.ReplicaSet:
					return owner(o, "Deployment", api.Deployments)
				case *corev1.Pod:
					for _, k := range owner(o, "ReplicaSet", api.ReplicaSets) {
						if rs, ok := view.Get(k); ok {
							return owner(rs, "Deployment", api.Deployments)
						}
					}
				}
				return nil
			},
			plan: planner(workload.Deployment),
		},
		{
			name: "replicaset", owns: api.ReplicaSets,
			concerns: func(_ api.Reader, o api.Object) []api.Key {
				if rs, ok := o.(*appsv1.ReplicaSet); ok {
					return []api.Key{api.KeyOf(rs)}
				}
				return owner(o, "ReplicaSet", api.ReplicaSets)
			},
			plan: planner(workload.ReplicaSet),
		},
		{
			name: "endpoints", owns: api.Services,
			concerns: func(view api.Reader, o api.Object) []api.Key {
				switch o := o.(type) {
				case *corev1.Service:
					return []api.Key{api.KeyOf(o)}
				case *corev1.Pod:
					return selecting(view, o)
				}
				return owner(o, "Service", api.Services)
			},
			plan: planner(func(now time.Time, view api.Reader, s *corev1.Service) ([]api.Mutation, time.Duration) {
				return workload.Endpoints(now, view, s), 0
			}),
		},
	}
}

// planner looks the object up and plans nothing for one that is gone.
func planner[T api.Object](plan func(time.Time, api.Reader, T) ([]api.Mutation, time.Duration)) func(time.Time, api.Reader, api.Key) ([]api.Mutation, time.Duration) {
	return func(now time.Time, view api.Reader, k api.Key) ([]api.Mutation, time.Duration) {
		o, ok := api.Get[T](view, k.Namespace, k.Name)
		if !ok {
			return nil, 0
		}
		return plan(now, view, o)
	}
}

// owner is the key of the controlling owner of o, if that is of this kind.
func owner(o api.Object, kind string, r api.Resource) []api.Key {
	ref := metav1.GetControllerOf(o)
	if ref == nil || ref.Kind != kind {
		return nil
	}
	return []api.Key{{Resource: r, Namespace: o.GetNamespace(), Name: ref.Name}}
}

// selecting lists the services whose selector matches the pod.
func selecting(view api.Reader, p *corev1.Pod) []api.Key {
	var keys []api.Key
	for s := range api.List[*corev1.Service](view, p.Namespace) {
		if len(s.Spec.Selector) > 0 && labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(p.Labels)) {
			keys = append(keys, api.KeyOf(s))
		}
	}
	return keys
}
