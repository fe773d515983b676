package delivery

import (
	"context"
	"fmt"
	"time"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// Table implements [gitsource.References]: the table that the source's status names.
func (r *Receiver) Table(ctx context.Context, repository string) (string, error) {
	_, src, err := r.Pipeline.read(ctx, repository)
	if err != nil {
		return "", err
	}
	return src.Status.References, nil
}

// Replace implements [gitsource.References]. A status that changed for another reason
// in between is no hindrance.
func (r *Receiver) Replace(ctx context.Context, repository, old, new, pusher string) error {
	for range maxSteps {
		_, src, err := r.Pipeline.read(ctx, repository)
		if err != nil {
			return err
		}
		if src.Status.References == new {
			return nil // an attempt whose answer was lost
		}
		if src.Status.References != old {
			return fmt.Errorf("source %q: %w: fetch them and push again", repository, gitsource.ErrMoved)
		}
		next := api.Clone(src)
		next.Status.References = new
		res, err := r.Pipeline.Store.Propose(ctx, command.Txn{
			Time: time.Now().UnixMilli(), Actor: "user/" + pusher, Reason: "push of references",
			Mutations: []api.Mutation{api.Guarded(api.UpdateStatus, next)},
		})
		switch {
		case err != nil:
			return fmt.Errorf("source %q: put references into force: %w", repository, err)
		case res.Rejected == nil:
			return nil
		case res.Rejected.Code != command.Conflict:
			return fmt.Errorf("source %q: put references into force: %w", repository, res.Rejected)
		}
	}
	return fmt.Errorf("source %q: put references into force: its status kept changing: push again", repository)
}
