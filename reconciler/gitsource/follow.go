package gitsource

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
)

// follow asks the Receiver about an update of the followed branch. inForce runs
// once, as soon as the commit is in force.
func (p *push) follow(ctx context.Context, c *packp.Command, inForce func()) error {
	if c.Action() == packp.Delete {
		return errors.New("main is what is in force and cannot be deleted; push a commit that removes the files instead")
	}
	head, lacking, err := p.s.inForce(ctx, p.repo)
	if err != nil {
		p.s.log.Error("push", "repository", p.repo.name, "error", err)
		return err
	}
	stored := !head.IsZero() && lacking == nil
	if (stored && c.Old != head) || (!stored && !c.Old.IsZero()) {
		return fmt.Errorf("fetch first: main is at %s now", short(head))
	}
	if c.New == head {
		return p.q.release() // the branch is there; the folder had lost its objects
	}
	force := false
	if !head.IsZero() {
		ok, err := descends(ctx, p.q, c.New, head)
		if err != nil {
			return err
		}
		if force = !ok; force && (p.s.cfg.AllowForce == nil || !p.s.cfg.AllowForce(p.repo.name)) {
			return fmt.Errorf("non-fast-forward: %s does not descend from %s, which is in force; run git pull --rebase and push again, or git revert to go back", short(c.New), short(head))
		}
	}
	commit, err := openCommit(p.q, c.New)
	if err != nil {
		return err
	}
	if err := checkFollowed(p.q, commit.Tree.(*treeFS).root, p.s.limits); err != nil {
		return err
	}
	return p.ask(ctx, &Push{
		Repository: p.repo.name, Ref: FollowedRef, Old: orZeros(head), New: c.New.String(),
		Pusher: p.identity, Force: force, Commit: commit,
	}, inForce)
}

func orZeros(h plumbing.Hash) string { return h.String() }

// ask runs the Receiver and holds its context to what Receiver promises.
func (p *push) ask(ctx context.Context, what *Push, inForce func()) error {
	if ctx.Err() != nil {
		return fmt.Errorf("the pusher went away: %w", context.Cause(ctx))
	}
	t := newTenure(ctx, p.s.limits)
	defer t.end()
	what.inForce = func() {
		if t.inForce() {
			inForce()
		}
	}
	durable := func() error {
		if err := t.accept(); err != nil {
			return err
		}
		return p.keep(t.ctx, what.New)
	}
	err := p.s.cfg.Receiver.Receive(t.ctx, what, durable, p.progress)
	if t.state() == tenureInForce {
		if err != nil {
			fmt.Fprintf(p.progress, "%v\n", err)
		}
		p.s.log.Info("push in force", "repository", what.Repository, "pusher", what.Pusher, "commit", what.New, "after", err)
		return nil
	}
	if err != nil {
		p.s.log.Info("push refused", "repository", what.Repository, "pusher", what.Pusher, "commit", what.New, "reason", err)
		p.explain(err)
		return err
	}
	if err := p.keep(t.ctx, what.New); err != nil { // in case the Receiver forgot durable
		p.s.log.Error("store pushed objects", "repository", what.Repository, "error", err)
		return err
	}
	p.s.log.Info("push in force", "repository", what.Repository, "pusher", what.Pusher, "commit", what.New)
	return nil
}

// keep stores the pushed objects here and on other servers. Only the first call does
// anything.
func (p *push) keep(ctx context.Context, commit string) error {
	if p.kept {
		return nil
	}
	if err := p.q.release(); err != nil {
		return err
	}
	if err := p.s.spread(ctx, p.repo, plumbing.NewHash(commit)); err != nil {
		return err
	}
	p.kept = true
	return nil
}

// tenure is the life of the context of one Receive. It ends with the client's
// request, except from accept to inForce.
type tenure struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	client context.Context
	stop   []func() bool

	mu sync.Mutex
	at int
}

const (
	tenureAsked = iota
	tenureAccepted
	tenureInForce
)

func newTenure(client context.Context, lim Limits) *tenure {
	ctx, cancelTime := context.WithTimeoutCause(context.WithoutCancel(client), lim.Time,
		fmt.Errorf("the push took longer than %s", lim.Time))
	t := &tenure{client: client}
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	t.stop = append(t.stop,
		context.AfterFunc(t.ctx, cancelTime),
		context.AfterFunc(client, t.clientGone))
	return t
}

func (t *tenure) clientGone() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.at != tenureAccepted {
		t.cancel(context.Cause(t.client))
	}
}

// accept is the last moment at which a client that went away stops the push.
func (t *tenure) accept() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.at == tenureAsked {
		if t.client.Err() != nil {
			return fmt.Errorf("the pusher went away: %w", context.Cause(t.client))
		}
		if t.ctx.Err() != nil {
			return context.Cause(t.ctx)
		}
		t.at = tenureAccepted
	}
	return nil
}

// inForce says whether this call is the first.
func (t *tenure) inForce() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.at == tenureInForce {
		return false
	}
	t.at = tenureInForce
	if t.client.Err() != nil {
		t.cancel(context.Cause(t.client))
	}
	return true
}

func (t *tenure) state() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.at
}

func (t *tenure) end() {
	t.cancel(context.Canceled)
	for _, stop := range t.stop[1:] {
		stop()
	}
}
