package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/schedule"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// maxReplans bounds how often a pass plans again because its view was outdated.
const maxReplans = 5

// settle plans and proposes until a plan holds. A plan is made from a view that may
// be outdated when it is applied; the store then rejects it as a whole, and another
// one is made from the newer view at once. What is rejected again and again is an
// error, and waits.
func (c *Controllers) settle(ctx context.Context, name string, plan func(api.Reader) []api.Mutation) error {
	for try := 0; ; try++ {
		ms := plan(c.Store.View())
		if len(ms) == 0 {
			return nil
		}
		err := c.propose(ctx, name, ms)
		if err == nil || !outdated(err) || try == maxReplans {
			return err
		}
	}
}

// propose replicates one plan.
func (c *Controllers) propose(ctx context.Context, name string, ms []api.Mutation) error {
	res, err := c.Store.Propose(ctx, command.Txn{Time: time.Now().UnixMilli(), Actor: "controller/" + name, Mutations: ms})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// outdated says that the plan does not fit the state that the store has.
func outdated(err error) bool {
	var r *command.Rejection
	return errors.As(err, &r) && (r.Code == command.Conflict || r.Code == command.Exists || r.Code == command.NotFound)
}

// once plans one key and proposes the result.
func (r *run) once(ctx context.Context, ctl *controller, k api.Key) (after time.Duration, err error) {
	err = r.settle(ctx, ctl.name, func(view api.Reader) (ms []api.Mutation) {
		ms, after = ctl.plan(time.Now(), view, k)
		return ms
	})
	return after, err
}

// judge finds nodes that went silent or came back.
func (r *run) judge(ctx context.Context, wakeAfter func(time.Duration)) error {
	return r.settle(ctx, "nodes", func(view api.Reader) []api.Mutation {
		ms, wait := workload.Nodes(time.Now(), view, r.Contacts.LastContacts())
		wakeAfter(wait)
		return ms
	})
}

// collect removes what nothing needs any more.
func (r *run) collect(ctx context.Context) error {
	return r.settle(ctx, "garbage", func(view api.Reader) []api.Mutation { return workload.Garbage(time.Now(), view) })
}

// balance gives load balancers their addresses.
func (r *run) balance(ctx context.Context) error {
	return r.settle(ctx, "balancers", func(view api.Reader) []api.Mutation { return workload.Balancers(time.Now(), view) })
}

// expose writes down where Ingresses are reached.
func (r *run) expose(ctx context.Context) error {
	return r.settle(ctx, "ingresses", workload.Ingresses)
}

// proposals is how many bindings are on their way at once.
const proposals = 256

// schedule binds what can be bound. Every pod travels in a transaction of its own,
// so that one that changed meanwhile does not hold up the others; they still share
// the writes to disk. A rejected pod is no failure of the pass: the next one looks at
// it again, at once if the view was outdated.
func (r *run) schedule(ctx context.Context) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	slots := make(chan struct{}, proposals)
	for _, ms := range perPod(schedule.Pass(time.Now(), r.Store.View())) {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			err := r.propose(ctx, "scheduler", ms)
			var rejected *command.Rejection
			switch {
			case err == nil:
			case outdated(err):
				r.scheduler.signal()
			case errors.As(err, &rejected):
				r.Log.Error("pod not bound", "object", ms[0].Key.String(), "err", err)
			default:
				mu.Lock()
				defer mu.Unlock()
				failed = err // one is enough to know
			}
		})
	}
	wg.Wait()
	return failed
}

// perPod puts what a pass wants of one pod, and the event that tells of it, into one
// transaction.
func perPod(ms []api.Mutation) [][]api.Mutation {
	var out [][]api.Mutation
	place := map[api.Key]int{}
	for _, m := range ms {
		about := m.Key
		if e, ok := m.Object.(*corev1.Event); ok {
			about = api.Key{Resource: api.Pods, Namespace: e.InvolvedObject.Namespace, Name: e.InvolvedObject.Name}
		}
		i, ok := place[about]
		if !ok {
			i = len(out)
			place[about] = i
			out = append(out, nil)
		}
		out[i] = append(out[i], m)
	}
	return out
}
