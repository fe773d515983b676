package gitsource

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
)

// maxMoves is how often a push is put on top of references that another server has
// changed meanwhile.
const maxMoves = 8

// tryOthers refuses the commands on ordinary references that do not fit those in
// force, before any command is carried out.
func (p *push) tryOthers(ctx context.Context) error {
	t, _, err := p.s.table(ctx, p.repo)
	if err != nil {
		return err
	}
	_, refused := t.apply(p.others(), p.s.limits.Refs)
	maps.Copy(p.results, refused)
	return nil
}

// others are the commands on ordinary references that are not refused yet.
func (p *push) others() []*packp.Command {
	var list []*packp.Command
	for _, c := range p.req.commands {
		if c.Name != FollowedRef && p.results[c.Name] == nil {
			list = append(list, c)
		}
	}
	return list
}

// updateOthers carries out the commands on ordinary references that are not refused
// yet, all of them at once. A second call does nothing.
func (p *push) updateOthers(ctx context.Context) {
	if p.othersDone {
		return
	}
	p.othersDone = true
	todo := p.others()
	if len(todo) == 0 {
		return
	}
	// What was begun is finished, also when the pusher goes away.
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), p.s.limits.Time,
		fmt.Errorf("the push took longer than %s", p.s.limits.Time))
	defer cancel()
	if err := p.q.release(); err != nil {
		p.s.log.Error("store pushed objects", "repository", p.repo.name, "error", err)
		p.fail(todo, errors.New("the server cannot store the push; see its log"))
		return
	}
	for range maxMoves {
		err := p.changeTable(ctx, &todo)
		if err == nil {
			return
		}
		if !errors.Is(err, ErrMoved) {
			p.s.log.Info("push of references failed", "repository", p.repo.name, "pusher", p.identity, "error", err)
			p.explain(err)
			p.fail(todo, err)
			return
		}
	}
	p.fail(todo, errors.New("other pushes keep changing the references: push again"))
}

// changeTable puts a table with the commands carried out into force. Those that do
// not fit the present one any more are refused and leave todo.
func (p *push) changeTable(ctx context.Context, todo *[]*packp.Command) error {
	t, at, err := p.s.table(ctx, p.repo)
	if err != nil {
		return err
	}
	next, refused := t.apply(*todo, p.s.limits.Refs)
	maps.Copy(p.results, refused)
	*todo = slices.DeleteFunc(*todo, func(c *packp.Command) bool { return refused[c.Name] != nil })
	if p.req.has("atomic") && len(refused) > 0 { // FollowedRef is in force by now, and stays
		p.fail(*todo, errAtomic)
		return nil
	}
	if maps.Equal(next, t) {
		return nil
	}
	return p.s.replaceTable(ctx, p.repo, at, next, p.identity)
}

func (p *push) fail(commands []*packp.Command, err error) {
	for _, c := range commands {
		p.results[c.Name] = err
	}
}
