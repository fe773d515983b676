// Package delivery brings Git commits into force: compile, plan, propose. It is
// the edge that connects gitsource, the compiler, the plan and the store; what it
// decides is decided by those.
//
// A failure on the way changes nothing but the source's status and a Refused
// Revision: the last good commit stays in force.
package delivery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/reconciler/plan"
	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

// Store is the part of the replicated store that delivery needs.
type Store interface {
	// Read returns a linearizable view.
	Read(ctx context.Context) (api.Reader, error)
	// View returns the local view, which may be behind.
	View() api.Reader
	// Await blocks until the local view has a change of r ("" is every kind) that is
	// newer than revision. It may return earlier.
	Await(ctx context.Context, revision uint64, r api.Resource) error
	// Propose replicates a transaction; a rejection is in the result.
	Propose(ctx context.Context, t command.Txn) (command.Result, error)
}

// Pipeline delivers commits. It is safe for concurrent use: a commit comes into
// force only on top of the one it was checked to follow.
type Pipeline struct {
	Compiler compile.Compiler
	Store    Store
	Log      *slog.Logger
}

// Request is one commit to bring into force.
type Request struct {
	Source string
	Commit *gitsource.Commit
	// Parent is the commit in force that Commit is known to follow, "" for none.
	// When another one is in force, nothing changes and the error is ErrSuperseded:
	// Commit may lack what that one brought.
	Parent string
	Pusher string // authenticated identity, for the built-in repository
	// Durable, when not nil, is called once after the plan is good and before the
	// commit is proposed; it returns when the commit is on a quorum of servers. If it
	// fails, nothing changes.
	Durable func() error
}

// Outcome is what became of a request.
type Outcome struct {
	// Applied is true when the commit is in force now.
	Applied bool
	// Revision is the state's revision at which it is in force.
	Revision uint64
	// Generation is that of the Source whose spec the outcome is about.
	Generation int64
	// Plan is what the commit changes; empty when it was refused.
	Plan plan.ChangeSet
	// Diagnostics say why the commit was refused; none if it was applied.
	Diagnostics []api.Diagnostic
	// Reason is CompileError or PlanRefused when the commit was refused.
	Reason string
}

// The reasons of a source's Ready condition.
const (
	ReasonApplied       = "Applied"
	ReasonFetchError    = "FetchError"
	ReasonRewound       = "Rewound"
	ReasonCompileError  = "CompileError"
	ReasonPlanRefused   = "PlanRefused"
	ReasonDeliveryError = "DeliveryError" // the commit may be good, the machinery failed
	ReasonSuspended     = "Suspended"
)

// The errors that callers tell apart, with errors.Is.
var (
	// ErrNoSource: the cluster has no source of this name.
	ErrNoSource = errors.New("no such source")
	// ErrSuspended: the source is not followed at the moment.
	ErrSuspended = errors.New("suspended")
	// ErrSuperseded: another commit than Request.Parent is in force.
	ErrSuperseded = errors.New("another commit came into force meanwhile")
)

// maxSteps bounds how often a delivery compiles or plans because what it depends
// on has changed in between.
const maxSteps = 8

// DryRun says what bringing tree into force would do, without doing it.
func (p *Pipeline) DryRun(ctx context.Context, source string, tree fs.FS) (*Outcome, error) {
	view, src, err := p.read(ctx, source)
	if err != nil {
		return nil, err
	}
	desired, diags, err := p.compile(ctx, src, tree)
	switch {
	case err != nil:
		return nil, err
	case len(diags) > 0:
		return &Outcome{Generation: src.Generation, Diagnostics: diags, Reason: ReasonCompileError}, nil
	}
	cs := plan.Plan(plan.Input{Source: src, Commit: "worktree", Desired: desired, Current: view})
	out := &Outcome{Generation: src.Generation, Plan: cs, Diagnostics: cs.Refusals}
	if len(cs.Refusals) > 0 {
		out.Reason = ReasonPlanRefused
	}
	return out, nil
}

// Deliver brings req.Commit into force, or says why not. The error is about the
// machinery, and about what else is in force; everything wrong with the commit is
// in the outcome, and recorded as a Refused Revision (when recording it fails, both
// are returned). A commit that is in force already and changes nothing is applied
// without a trace.
func (p *Pipeline) Deliver(ctx context.Context, req Request) (*Outcome, error) {
	d := &delivery{Pipeline: p, Request: req}
	for range maxSteps {
		out, err := d.step(ctx)
		if err != nil || out != nil {
			return out, err
		}
	}
	last := errors.New("the source's spec changed")
	if d.rejected != nil {
		last = d.rejected
	}
	return nil, fmt.Errorf("source %q: the state kept changing while commit %.7s was planned; push again: %w", req.Source, req.Commit.Hash, last)
}

// read returns a linearizable view and the source in it.
func (p *Pipeline) read(ctx context.Context, source string) (api.Reader, *api.Source, error) {
	view, err := p.Store.Read(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("source %q: read the state: %w", source, err)
	}
	src, err := sourceOf(view, source)
	return view, src, err
}

// compile evaluates the tree as the source's spec asks for.
func (p *Pipeline) compile(ctx context.Context, src *api.Source, tree fs.FS) ([]plan.Desired, []api.Diagnostic, error) {
	res, err := p.Compiler.Compile(ctx, tree, compile.Options{Path: src.Spec.Path})
	if err != nil {
		return nil, nil, fmt.Errorf("source %q: compile: %w", src.Name, err)
	}
	if len(res.Diagnostics) > 0 {
		return nil, res.Diagnostics, nil
	}
	desired := make([]plan.Desired, len(res.Objects))
	for i, o := range res.Objects {
		desired[i] = plan.Desired{Object: o.Object, Pos: o.Pos, Fields: o.Fields}
	}
	return desired, nil, nil
}

func sourceOf(r api.Reader, name string) (*api.Source, error) {
	src, ok := api.Get[*api.Source](r, "", name)
	if !ok {
		return nil, fmt.Errorf("source %q: %w (decree source list shows them)", name, ErrNoSource)
	}
	return src, nil
}

// suspended returns an error matching ErrSuspended that says by whom, or nil.
func suspended(src *api.Source) error {
	switch s := src.Status.Suspended; {
	case s != nil:
		why := ""
		if s.Reason != "" {
			why = " (" + s.Reason + ")"
		}
		return fmt.Errorf("source %q is %w by %s since %s%s: decree source resume %s", src.Name, ErrSuspended, s.By, s.At.UTC().Format(time.RFC3339), why, src.Name)
	case src.Spec.Suspend:
		return fmt.Errorf("source %q is %w by its own spec: remove suspend where the Source is written", src.Name, ErrSuspended)
	}
	return nil
}

// Suspend records that an operator has stopped a source, or lets it go on when to is
// nil. From then on none of its commits comes into force; what runs goes on.
func (p *Pipeline) Suspend(ctx context.Context, source, user string, to *api.Suspension) error {
	reason := "suspend"
	if to == nil {
		reason = "resume"
	}
	for range maxSteps {
		_, src, err := p.read(ctx, source)
		if err != nil {
			return err
		}
		next := api.Clone(src)
		next.Status.Suspended = to
		res, err := p.Store.Propose(ctx, command.Txn{
			Time: time.Now().UnixMilli(), Actor: "user/" + user, Reason: reason,
			Mutations: []api.Mutation{api.Guarded(api.UpdateStatus, next)},
		})
		switch {
		case err != nil:
			return fmt.Errorf("source %q: %s: %w", source, reason, err)
		case res.Rejected == nil:
			return nil
		case res.Rejected.Code != command.Conflict: // a poll wrote its result just now
			return fmt.Errorf("source %q: %s: %w", source, reason, res.Rejected)
		}
	}
	return fmt.Errorf("source %q: %s: its status kept changing: try again", source, reason)
}
