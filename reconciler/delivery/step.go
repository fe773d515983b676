package delivery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/plan"
	"decree.dev/decree/schemas/api"
)

// delivery is one commit on its way.
type delivery struct {
	*Pipeline
	Request

	compiled   bool
	generation int64 // of the source that desired was compiled for
	desired    []plan.Desired
	durable    bool               // Durable was called
	rejected   *command.Rejection // of the last proposal
}

// step takes the delivery one step further, from the newest state on: it compiles,
// or it plans and proposes. It returns nil, nil when there is another step to take.
func (d *delivery) step(ctx context.Context) (*Outcome, error) {
	view, src, err := d.read(ctx, d.Source)
	if err != nil {
		return nil, err
	}
	if err := d.mayFollow(src); err != nil {
		return nil, err
	}
	if !d.compiled || d.generation != src.Generation {
		desired, diags, err := d.compile(ctx, src, d.Commit.Tree)
		if err != nil {
			return nil, err
		}
		if len(diags) > 0 {
			return d.refuse(ctx, view, src, ReasonCompileError, diags)
		}
		d.compiled, d.generation, d.desired = true, src.Generation, desired
		return nil, nil // compiling takes its time: the state may have moved on
	}
	allow, err := plan.AllowDeletions(d.Commit.Message)
	if err != nil {
		return d.refuse(ctx, view, src, ReasonPlanRefused, []api.Diagnostic{{Message: err.Error()}})
	}
	cs := plan.Plan(plan.Input{Source: src, Commit: d.Commit.Hash, Desired: d.desired, Current: view, AllowDeletions: allow})
	switch {
	case len(cs.Refusals) > 0:
		return d.refuse(ctx, view, src, ReasonPlanRefused, cs.Refusals)
	case len(cs.Mutations) == 0 && src.Status.Applied == d.Commit.Hash:
		return &Outcome{Applied: true, Revision: view.Revision(), Generation: d.generation, Plan: cs}, nil
	}
	return d.propose(ctx, view, src, cs)
}

// mayFollow refuses to put the commit on top of one that it may know nothing of.
func (d *delivery) mayFollow(src *api.Source) error {
	if err := suspended(src); err != nil {
		return err
	}
	if now := src.Status.Applied; now != d.Parent && now != d.Commit.Hash {
		return fmt.Errorf("source %q: %w: %.7s; fetch it first, then push again", d.Source, ErrSuperseded, now)
	}
	return nil
}

// propose makes the commit durable and brings it into force. Each mutation is
// checked again when it is applied; a rejection is almost always that of a plan
// whose view is outdated by now, so the next step plans again, and what stays wrong
// is refused there with its position.
func (d *delivery) propose(ctx context.Context, view api.Reader, src *api.Source, cs plan.ChangeSet) (*Outcome, error) {
	if d.Durable != nil && !d.durable {
		if err := d.Durable(); err != nil {
			return nil, fmt.Errorf("source %q: make commit %.7s durable: %w", d.Source, d.Commit.Hash, err)
		}
		d.durable = true
	}
	rev := d.revision(src.Status.Applied, api.RevisionApplied)
	rev.Spec.Changes = cs.Changes
	res, err := d.Store.Propose(ctx, command.Txn{
		Time: time.Now().UnixMilli(), Actor: d.actor(), Reason: rev.Spec.Subject,
		Commit:    &command.Commit{Source: d.Source, Parent: src.Status.Applied, Revision: rev},
		Mutations: cs.Mutations,
	})
	switch {
	case errors.Is(err, command.ErrTooLarge):
		return d.refuse(ctx, view, src, ReasonPlanRefused, []api.Diagnostic{{
			Message: fmt.Sprintf("the commit changes %d objects, more than fits into one transaction: %v", len(cs.Mutations), err),
			Hint:    "bring them into force in several commits",
		}})
	case err != nil:
		return nil, fmt.Errorf("source %q: bring commit %.7s into force: %w", d.Source, d.Commit.Hash, err)
	case res.Rejected == nil:
		d.Log.Info("commit in force", "source", d.Source, "commit", d.Commit.Hash, "revision", res.Revision, "changes", len(cs.Changes))
		return &Outcome{Applied: true, Revision: res.Revision, Generation: d.generation, Plan: cs}, nil
	case res.Rejected.Code == command.Invalid: // no other view makes it right
		return d.refuse(ctx, view, src, ReasonPlanRefused, []api.Diagnostic{diagnose(cs, res.Rejected)})
	}
	d.rejected = res.Rejected
	return nil, nil
}

// diagnose finds the place of what the state machine rejects.
func diagnose(cs plan.ChangeSet, r *command.Rejection) api.Diagnostic {
	out := api.Diagnostic{Message: r.Message}
	if r.Key.Name != "" {
		out.Object = r.Key.String()
	}
	for _, m := range cs.Mutations {
		if m.Key == r.Key && m.Object != nil {
			if origin, ok := api.OriginOf(m.Object); ok {
				out.Pos = origin.Pos
			}
		}
	}
	return out
}

func (d *delivery) actor() string { return "git/" + d.Source }
