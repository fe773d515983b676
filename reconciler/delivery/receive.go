package delivery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// Receiver delivers pushes to built-in repositories: it implements
// [gitsource.Receiver]. The source of a built-in repository has the same name.
type Receiver struct {
	Pipeline *Pipeline
	// Watch is how long a push reports the progress of the rollout before it leaves
	// it to `decree status`.
	Watch time.Duration
}

var (
	_ gitsource.Receiver   = (*Receiver)(nil)
	_ gitsource.References = (*Receiver)(nil)
)

// Head implements [gitsource.Receiver]: the applied commit of the source.
func (r *Receiver) Head(ctx context.Context, repository string) (string, error) {
	_, src, err := r.Pipeline.read(ctx, repository)
	if err != nil {
		return "", err
	}
	return src.Status.Applied, nil
}

// errRefused is what the pusher reads beside the ref; the reasons went before it.
var errRefused = errors.New("refused, nothing has changed")

// Receive implements [gitsource.Receiver].
func (r *Receiver) Receive(ctx context.Context, push *gitsource.Push, durable func() error, progress io.Writer) error {
	begun := time.Now()
	out, err := r.Pipeline.Deliver(ctx, Request{
		Source: push.Repository, Commit: push.Commit, Parent: parentOf(push), Pusher: push.Pusher, Durable: durable,
	})
	if out != nil && !out.Applied {
		for _, d := range out.Diagnostics {
			fmt.Fprintln(progress, d.Error())
		}
		return errors.Join(errRefused, err)
	}
	if err != nil {
		return err
	}
	push.InForce()
	if err := out.Plan.Text(progress); err != nil {
		return err
	}
	fmt.Fprintf(progress, "%.7s is in force\n", push.New)
	r.watch(ctx, out, begun, progress)
	return nil
}

// parentOf is the commit that the push was checked against, "" for none.
func parentOf(push *gitsource.Push) string {
	if strings.Trim(push.Old, "0") == "" {
		return ""
	}
	return push.Old
}

// watch reports the rollout until it has an end. Whatever that is, the commit stays
// in force.
func (r *Receiver) watch(ctx context.Context, out *Outcome, begun time.Time, progress io.Writer) {
	ctx, cancel := context.WithTimeout(ctx, r.Watch)
	defer cancel()
	switch err := r.Pipeline.Rollout(ctx, out, progress); {
	case errors.Is(err, context.DeadlineExceeded):
		fmt.Fprintf(progress, "not healthy after %s; the commit stays in force: decree status\n", r.Watch)
	case err != nil:
		fmt.Fprintf(progress, "%v; the commit stays in force: decree status\n", err)
	default:
		fmt.Fprintf(progress, "healthy after %.1fs\n", time.Since(begun).Seconds())
	}
}

// breath is the least time between two looks at a rollout: while many pods start,
// changes come by the hundred.
const breath = 10 * time.Millisecond

// Rollout writes the progress of every Deployment and Pod that out changed, until
// all are healthy (nil), one has failed, or ctx ends (its cause).
func (p *Pipeline) Rollout(ctx context.Context, out *Outcome, progress io.Writer) error {
	keys := rollouts(out)
	said := make(map[api.Key]string, len(keys))
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		view := p.Store.View()
		done := 0
		for _, k := range keys {
			st := health(view, k)
			if st.Line != "" && said[k] != st.Line {
				said[k] = st.Line
				fmt.Fprintln(progress, st.Line)
			}
			if st.Failed {
				return fmt.Errorf("%s did not become healthy", k)
			}
			if st.Done {
				done++
			}
		}
		if done == len(keys) {
			return nil
		}
		if err := p.Store.Await(ctx, view.Revision(), ""); err != nil {
			return err
		}
		pause.Reset(breath)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-pause.C:
		}
	}
}

// health says how an object that a commit changed is doing. One that is gone was
// removed by a later commit.
func health(view api.Reader, k api.Key) workload.RolloutStatus {
	o, ok := view.Get(k)
	if !ok {
		return workload.RolloutStatus{Done: true}
	}
	switch o := o.(type) {
	case *appsv1.Deployment:
		return workload.Rollout(view, o)
	case *corev1.Pod:
		why := workload.WhyNotReady(o)
		switch {
		case o.Status.Phase == corev1.PodSucceeded:
			return workload.RolloutStatus{Done: true, Line: k.String() + ": ended well"}
		case o.Status.Phase == corev1.PodFailed:
			return workload.RolloutStatus{Failed: true, Line: k.String() + ": failed: " + why}
		case api.PodReady(o):
			return workload.RolloutStatus{Done: true, Line: k.String() + ": ready"}
		}
		return workload.RolloutStatus{Line: strings.TrimSuffix(k.String()+": not ready: "+why, ": ")}
	}
	return workload.RolloutStatus{Done: true}
}

// rollouts are the Deployments and Pods that an outcome created or changed.
func rollouts(out *Outcome) []api.Key {
	var keys []api.Key
	for _, m := range out.Plan.Mutations {
		if (m.Key.Resource == api.Deployments || m.Key.Resource == api.Pods) && m.Verb != api.Delete {
			keys = append(keys, m.Key)
		}
	}
	return keys
}
