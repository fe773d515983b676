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

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
	// Await blocks until the local view is newer than revision.
	Await(ctx context.Context, revision uint64) error
	// Propose replicates a transaction; a rejection is in the result.
	Propose(ctx context.Context, t command.Txn) (command.Result, error)
}

// Pipeline delivers commits. It is safe for concurrent use: the store refuses the
// second of two deliveries that started from the same commit, and the loser plans
// again.
type Pipeline struct {
	Compiler compile.Compiler
	Store    Store
	Log      *slog.Logger
}

// Request is one commit to bring into force.
type Request struct {
	Source string
	Commit *gitsource.Commit
	Pusher string // authenticated identity, for the built-in repository
	// Durable, when not nil, is called after the plan is good and before the commit
	// is proposed.
	Durable func() error
}

// Outcome is what became of a request.
type Outcome struct {
	// Applied is true when the commit is in force now.
	Applied bool
	// Revision is the state's revision at which it came into force.
	Revision uint64
	// Plan is what the commit changes; empty when it did not compile.
	Plan plan.ChangeSet
	// Diagnostics say why the commit was refused; none if it was applied.
	Diagnostics []api.Diagnostic
	// Reason is CompileError or PlanRefused when the commit was refused.
	Reason string
}

// The reasons of a source's Ready condition.
const (
	ReasonApplied      = "Applied"
	ReasonFetchError   = "FetchError"
	ReasonRewound      = "Rewound"
	ReasonCompileError = "CompileError"
	ReasonPlanRefused  = "PlanRefused"
	ReasonSuspended    = "Suspended"
)

// maxPlans bounds how often a delivery plans anew because another commit of the
// same source came into force in between.
const maxPlans = 5

// DryRun says what bringing tree into force would do, without doing it.
func (p *Pipeline) DryRun(ctx context.Context, source string, tree fs.FS) (*Outcome, error) {
	view, err := p.Store.Read(ctx)
	if err != nil {
		return nil, err
	}
	src, err := sourceOf(view, source)
	if err != nil {
		return nil, err
	}
	desired, out, err := p.compile(ctx, src, tree)
	if err != nil || out != nil {
		return out, err
	}
	cs := plan.Plan(plan.Input{Source: src, Commit: "worktree", Desired: desired, Current: view})
	return &Outcome{Plan: cs, Diagnostics: cs.Refusals, Reason: refusalReason(cs)}, nil
}

// Deliver brings req.Commit into force, or says why not. The error is about the
// machinery; everything wrong with the commit is in the outcome, and recorded as a
// Refused Revision.
func (p *Pipeline) Deliver(ctx context.Context, req Request) (*Outcome, error) {
	view, err := p.Store.Read(ctx)
	if err != nil {
		return nil, err
	}
	src, err := sourceOf(view, req.Source)
	if err != nil {
		return nil, err
	}
	desired, out, err := p.compile(ctx, src, req.Commit.Tree)
	if err != nil {
		return nil, err
	}
	if out != nil {
		return out, p.refuse(ctx, req, src.Status.Applied, out)
	}
	for range maxPlans {
		out, err = p.apply(ctx, req, desired)
		if err != nil || out != nil {
			return out, err
		}
	}
	return nil, fmt.Errorf("source %q: other commits kept coming into force while %.7s was planned: push again", req.Source, req.Commit.Hash)
}

// compile evaluates the tree; a non-nil outcome is a refusal.
func (p *Pipeline) compile(ctx context.Context, src *api.Source, tree fs.FS) ([]plan.Desired, *Outcome, error) {
	res, err := p.Compiler.Compile(ctx, tree, compile.Options{Path: src.Spec.Path})
	if err != nil {
		return nil, nil, fmt.Errorf("source %q: compile: %w", src.Name, err)
	}
	if len(res.Diagnostics) > 0 {
		return nil, &Outcome{Diagnostics: res.Diagnostics, Reason: ReasonCompileError}, nil
	}
	desired := make([]plan.Desired, len(res.Objects))
	for i, o := range res.Objects {
		desired[i] = plan.Desired{Object: o.Object, Pos: o.Pos, Fields: o.Fields}
	}
	return desired, nil, nil
}

// apply plans against the newest state and proposes once. It returns nil, nil when
// another commit came into force in between.
func (p *Pipeline) apply(ctx context.Context, req Request, desired []plan.Desired) (*Outcome, error) {
	view, err := p.Store.Read(ctx)
	if err != nil {
		return nil, err
	}
	src, err := sourceOf(view, req.Source)
	if err != nil {
		return nil, err
	}
	parent := src.Status.Applied
	allow, err := plan.AllowDeletions(req.Commit.Message)
	if err != nil {
		out := &Outcome{Diagnostics: []api.Diagnostic{{Message: err.Error()}}, Reason: ReasonPlanRefused}
		return out, p.refuse(ctx, req, parent, out)
	}
	cs := plan.Plan(plan.Input{Source: src, Commit: req.Commit.Hash, Desired: desired, Current: view, AllowDeletions: allow})
	if len(cs.Refusals) > 0 {
		out := &Outcome{Plan: cs, Diagnostics: cs.Refusals, Reason: ReasonPlanRefused}
		return out, p.refuse(ctx, req, parent, out)
	}
	if req.Durable != nil {
		if err := req.Durable(); err != nil {
			return nil, fmt.Errorf("source %q: make commit %.7s durable: %w", req.Source, req.Commit.Hash, err)
		}
	}
	rev := revision(req, parent, api.RevisionApplied)
	rev.Spec.Changes = cs.Changes
	res, err := p.Store.Propose(ctx, command.Txn{
		Time:   time.Now().UnixMilli(),
		Actor:  actor(req),
		Reason: req.Commit.Subject,
		Commit: &command.Commit{Source: req.Source, Parent: parent, Revision: rev},
		// The plan must still hold when it is applied: each mutation carries the
		// revision it was planned against.
		Mutations: cs.Mutations,
	})
	switch {
	case err != nil:
		return nil, err
	case res.Rejected == nil:
		p.Log.Info("commit in force", "source", req.Source, "commit", req.Commit.Hash, "revision", res.Revision, "changes", len(cs.Changes))
		return &Outcome{Applied: true, Revision: res.Revision, Plan: cs}, nil
	case res.Rejected.Code == command.Conflict:
		return nil, nil
	}
	out := &Outcome{Plan: cs, Reason: ReasonPlanRefused, Diagnostics: []api.Diagnostic{{
		Object: objectName(res.Rejected.Key), Message: res.Rejected.Message,
	}}}
	return out, p.refuse(ctx, req, parent, out)
}

// refuse records a refused commit. It is kept short: the whole list of errors goes
// to whoever asked.
func (p *Pipeline) refuse(ctx context.Context, req Request, parent string, out *Outcome) error {
	rev := revision(req, parent, api.RevisionRefused)
	rev.Spec.Message = summary(out.Diagnostics)
	p.Log.Info("commit refused", "source", req.Source, "commit", req.Commit.Hash, "reason", out.Reason, "errors", len(out.Diagnostics))
	res, err := p.Store.Propose(ctx, command.Txn{
		Time: time.Now().UnixMilli(), Actor: actor(req), Reason: out.Reason,
		Commit: &command.Commit{Source: req.Source, Parent: parent, Revision: rev},
	})
	if err != nil {
		return err
	}
	if res.Rejected != nil && res.Rejected.Code != command.Conflict {
		return res.Rejected
	}
	return nil
}

// maxSummary bounds the diagnostics that are kept in a Revision, in lines.
const maxSummary = 20

func summary(ds []api.Diagnostic) string {
	var s string
	for i, d := range ds {
		if i == maxSummary {
			return s + fmt.Sprintf("… and %d more", len(ds)-i)
		}
		s += d.Error() + "\n"
	}
	return s
}

func revision(req Request, parent, result string) *api.Revision {
	return &api.Revision{Spec: api.RevisionSpec{
		Source: req.Source, Commit: req.Commit.Hash, Parent: parent, Author: req.Commit.Author,
		Time: metav1.NewTime(req.Commit.Time.UTC().Truncate(time.Second)), Subject: req.Commit.Subject,
		Pusher: req.Pusher, Signer: req.Commit.Signer, Result: result,
	}}
}

func actor(req Request) string { return "git/" + req.Source }

func refusalReason(cs plan.ChangeSet) string {
	if len(cs.Refusals) > 0 {
		return ReasonPlanRefused
	}
	return ""
}

func objectName(k api.Key) string {
	if k.Name == "" {
		return ""
	}
	return k.String()
}

// ErrNoSource is returned for a source that the cluster does not have.
var ErrNoSource = errors.New("no such source")

func sourceOf(r api.Reader, name string) (*api.Source, error) {
	src, ok := api.Get[*api.Source](r, "", name)
	if !ok {
		return nil, fmt.Errorf("source %q: %w (decree source list shows them)", name, ErrNoSource)
	}
	return src, nil
}
