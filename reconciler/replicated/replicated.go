// Package replicated shows the replicated store to delivery and control in the
// words they use. It holds no state and decides nothing.
package replicated

import (
	"context"
	"errors"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/reconciler/control"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/schemas/api"
)

// Store adapts a [raftstore.Store]. It is safe for concurrent use.
type Store struct{ *raftstore.Store }

var (
	_ delivery.Store = Store{}
	_ control.Store  = Store{}
)

// View returns the local view, which may be behind on a server that does not lead.
func (s Store) View() api.Reader { return s.Store.View() }

// Read returns a linearizable view.
func (s Store) Read(ctx context.Context) (api.Reader, error) {
	view, err := s.Store.Read(ctx)
	if err != nil {
		return nil, err
	}
	return view, nil
}

// Await blocks until an object of r ("" is every kind) has changed after revision.
// It may return earlier: callers look again.
func (s Store) Await(ctx context.Context, revision uint64, r api.Resource) error {
	w, err := s.Watch(ctx, revision, raftstore.Filter{Resource: r})
	if err == nil {
		_, err = w.Next(ctx)
	}
	if errors.Is(err, raftstore.ErrCompacted) {
		return nil // so much has changed that the history does not reach back
	}
	return err
}

// Changes calls f with every change after revision until ctx ends (its cause) or
// the history is too old (an error).
func (s Store) Changes(ctx context.Context, after uint64, f func([]control.Change)) error {
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
