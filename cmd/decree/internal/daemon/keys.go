package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
)

// KeyStatus says how far the keys of the disks are rotated.
type KeyStatus struct {
	Epoch   int64       `json:"epoch"` // what the cluster asks for
	Servers []ServerKey `json:"servers"`
}

// ServerKey is the epoch that one server writes with.
type ServerKey struct {
	Node  string `json:"node"`
	Epoch int64  `json:"epoch"`
}

// pruneEvery is the time between two looks for keys that nothing needs any more.
const pruneEvery = 10 * time.Minute

// followKeys encrypts this server's disk with keys as new as the cluster asks for.
func (s *server) followKeys(ctx context.Context) error {
	st := replicated.Store{Store: s.store}
	prune := time.NewTicker(pruneEvery)
	defer prune.Stop()
	for {
		view := st.View()
		a, ok := api.Get[*api.Authority](view, "", api.AuthorityName)
		if ok && a.Spec.KeyEpoch > s.store.KeyEpoch() {
			if err := s.store.RotateKeys(a.Spec.KeyEpoch); err != nil {
				s.cfg.Log.Error("rotate the keys of the disk", "epoch", a.Spec.KeyEpoch, "error", err)
			}
			s.changedSelf()
		}
		changed := make(chan error, 1)
		waiting, cancel := context.WithCancel(ctx)
		go func() { changed <- st.Await(waiting, view.Revision(), api.Authorities) }()
		var err error
		select {
		case err = <-changed:
		case <-prune.C:
			cancel()
			<-changed
			if err := s.store.PruneKeys(); err != nil {
				s.cfg.Log.Warn("forget old keys", "error", err)
			}
		}
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow the keys: %w", err)
		}
	}
}

// rotateKeys asks all servers for new keys.
func (s *server) rotateKeys(ctx context.Context) error {
	return s.change(ctx, "rotate the keys of the disks", func(view api.Reader) ([]api.Mutation, error) {
		a, ok := api.Get[*api.Authority](view, "", api.AuthorityName)
		if !ok {
			return nil, errors.New("the cluster has no keys yet")
		}
		next := api.Clone(a)
		next.Spec.KeyEpoch = max(next.Spec.KeyEpoch, s.store.KeyEpoch()) + 1
		return []api.Mutation{api.Guarded(api.Update, next)}, nil
	})
}

func (s *server) keyStatus(ctx context.Context) (*KeyStatus, error) {
	view, err := s.store.Read(ctx)
	if err != nil {
		return nil, err
	}
	out := &KeyStatus{Servers: []ServerKey{}}
	if a, ok := api.Get[*api.Authority](view, "", api.AuthorityName); ok {
		out.Epoch = a.Spec.KeyEpoch
	}
	for o := range api.List[*api.Server](view, "") {
		if o.Status.Removed == nil {
			out.Servers = append(out.Servers, ServerKey{Node: o.Spec.Node, Epoch: o.Status.KeyEpoch})
		}
	}
	return out, nil
}
