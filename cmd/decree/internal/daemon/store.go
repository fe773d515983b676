package daemon

import (
	"context"
	"errors"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/control"
	"decree.dev/decree/schemas/api"
)

// store shows the replicated store to delivery and control in the words they use.
type store struct{ *raftstore.Store }

func (s store) View() api.Reader { return s.Store.View() }

func (s store) Read(ctx context.Context) (api.Reader, error) {
	view, err := s.Store.Read(ctx)
	if err != nil {
		return nil, err
	}
	return view, nil
}

// Await blocks until the local view is newer than revision.
func (s store) Await(ctx context.Context, revision uint64) error {
	w, err := s.Watch(ctx, revision, raftstore.Filter{})
	if err == nil {
		_, err = w.Next(ctx)
	}
	if errors.Is(err, raftstore.ErrCompacted) {
		return nil // so much has changed that the history does not reach back
	}
	return err
}

// Changes calls f with every change after revision until ctx ends or the history
// is too old.
func (s store) Changes(ctx context.Context, after uint64, f func([]control.Change)) error {
	w, err := s.Watch(ctx, after, raftstore.Filter{})
	if err != nil {
		return err
	}
	for {
		events, err := w.Next(ctx)
		if err != nil {
			return err
		}
		changes := make([]control.Change, len(events))
		for i, e := range events {
			changes[i] = control.Change{Old: e.Previous, New: e.Object}
			if e.Type == raftstore.Deleted {
				changes[i].New = nil
			}
		}
		f(changes)
	}
}

func (s store) Propose(ctx context.Context, t command.Txn) (command.Result, error) {
	return s.Store.Propose(ctx, t)
}
