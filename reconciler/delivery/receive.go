package delivery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	appsv1 "k8s.io/api/apps/v1"

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

var _ gitsource.Receiver = (*Receiver)(nil)

// Head implements [gitsource.Receiver]: the applied commit of the source.
func (r *Receiver) Head(ctx context.Context, repository string) (string, error) {
	view, err := r.Pipeline.Store.Read(ctx)
	if err != nil {
		return "", err
	}
	src, err := sourceOf(view, repository)
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
	if src, ok := api.Get[*api.Source](r.Pipeline.Store.View(), "", push.Repository); ok {
		if s := src.Status.Suspended; s != nil {
			return fmt.Errorf("source %q is suspended by %s since %s: decree source resume %s", src.Name, s.By, s.At.Format(time.RFC3339), src.Name)
		}
	}
	out, err := r.Pipeline.Deliver(ctx, Request{Source: push.Repository, Commit: push.Commit, Pusher: push.Pusher, Durable: durable})
	if err != nil {
		return err
	}
	if !out.Applied {
		for _, d := range out.Diagnostics {
			fmt.Fprintln(progress, d.Error())
		}
		return errRefused
	}
	push.InForce()
	if err := out.Plan.Text(progress); err != nil {
		return err
	}
	fmt.Fprintf(progress, "%.7s is in force\n", push.New)
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
	return nil
}

// Rollout writes the progress of every Deployment that out changed, until all are
// healthy (nil), one has failed, or ctx ends.
func (p *Pipeline) Rollout(ctx context.Context, out *Outcome, progress io.Writer) error {
	keys := rollouts(out)
	said := make(map[api.Key]string, len(keys))
	for {
		view := p.Store.View()
		done := 0
		for _, k := range keys {
			d, ok := api.Get[*appsv1.Deployment](view, k.Namespace, k.Name)
			if !ok {
				done++ // a later commit has removed it
				continue
			}
			st := workload.Rollout(view, d)
			if said[k] != st.Line {
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
		if err := p.Store.Await(ctx, view.Revision()); err != nil {
			return err
		}
	}
}

// rollouts are the Deployments that an outcome created or changed.
func rollouts(out *Outcome) []api.Key {
	var keys []api.Key
	for _, m := range out.Plan.Mutations {
		if m.Key.Resource == api.Deployments && m.Verb != api.Delete {
			keys = append(keys, m.Key)
		}
	}
	return keys
}
