package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"decree.dev/decree/reconciler"
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

// diskKeys are the keys of this server's disk; *raftstore.Store has them.
type diskKeys interface {
	KeyEpoch() int64
	RotateKeys(epoch int64) error
	PruneKeys() error
}

// keyFollower encrypts a disk with keys as new as the cluster asks for.
type keyFollower struct {
	disk    diskKeys
	asked   func() int64 // the epoch that the cluster asks for
	rotated func()       // the disk's epoch has changed
	done    int64        // the epoch that was rotated to, all of it
}

// loop rotates when changed says so. What fails is tried again with a growing wait: a
// disk that is full has room again some time, and nobody asks for the same keys twice.
func (k *keyFollower) loop(changed <-chan struct{}, log *slog.Logger) *reconciler.Loop {
	k.done = k.disk.KeyEpoch()
	return &reconciler.Loop{
		Name: "keys", Changed: changed, Resync: pruneEvery, Logger: log,
		Backoff: reconciler.Backoff{Min: time.Second, Max: time.Minute},
		Once:    func(context.Context) error { return k.once() },
	}
}

func (k *keyFollower) once() error {
	asked := k.asked()
	if asked <= k.done {
		return k.disk.PruneKeys()
	}
	before := k.disk.KeyEpoch()
	err := k.disk.RotateKeys(asked)
	if k.disk.KeyEpoch() != before { // also if what follows a new key went wrong
		k.rotated()
	}
	if err != nil {
		return fmt.Errorf("rotate the keys of the disk to epoch %d: %w", asked, err)
	}
	k.done = asked
	return nil
}

// followKeys encrypts this server's disk with keys as new as the cluster asks for.
func (s *server) followKeys(ctx context.Context) error {
	k := &keyFollower{disk: s.store, rotated: s.changedSelf, asked: func() int64 {
		a, ok := api.Get[*api.Authority](s.store.View(), "", api.AuthorityName)
		if !ok {
			return 0
		}
		return a.Spec.KeyEpoch
	}}
	changed := make(chan struct{}, 1)
	g := newGroup(ctx)
	g.start("rotate", k.loop(changed, s.cfg.Log.With("part", "keys")).Run)
	g.start("follow", func(ctx context.Context) error {
		for ctx.Err() == nil {
			revision := s.store.View().Revision()
			select {
			case changed <- struct{}{}:
			default: // a signal waits there already
			}
			if err := s.awaitAny(ctx, nil, revision, api.Authorities); err != nil {
				return err
			}
		}
		return nil
	})
	return g.wait()
}

// rotateKeys asks all servers for new keys.
func (s *server) rotateKeys(ctx context.Context) error {
	return s.change(ctx, "rotate the keys of the disks", func(view api.Reader) ([]api.Mutation, error) {
		a, ok := api.Get[*api.Authority](view, "", api.AuthorityName)
		if !ok {
			return nil, errNoKeys
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
