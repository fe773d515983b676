package gitreplica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"decree.dev/decree/reconciler"
	"decree.dev/decree/schemas/api"
)

// width is how many repositories catch up at the same time: one whose source hangs
// holds up no other for long.
const width = 4

// Behind is a repository that lacks something here.
type Behind struct {
	Repository string
	Hash       string // of the commit in force, or of the table of references
	Since      time.Time
	Err        error // of the last attempt
}

// Behind lists the repositories that lack something here, sorted by name.
func (r *Replica) Behind() []Behind {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.SortedFunc(maps.Values(r.behind), func(a, b Behind) int { return strings.Compare(a.Repository, b.Repository) })
}

// Run brings what the replicated state names into this server's repositories, on every
// change of a source and every now and then, until ctx is done. It must be called once.
func (r *Replica) Run(ctx context.Context) error {
	if err := r.attached(ctx); err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	loop := &reconciler.Loop{
		Name: "repositories", Changed: changed, Resync: r.cfg.Resync,
		Backoff: reconciler.Backoff{Min: 200 * time.Millisecond, Max: 10 * time.Second}, Once: r.catchUp, Logger: r.log,
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel(nil)
	watching.Go(func() {
		for {
			view := r.cfg.Store.View()
			select {
			case changed <- struct{}{}:
			default:
			}
			if err := r.cfg.Store.Await(ctx, view.Revision(), api.Sources); err != nil {
				cancel(err)
				return
			}
		}
	})
	return loop.Run(ctx)
}

// catchUp is one pass over all built-in sources of the local view.
func (r *Replica) catchUp(ctx context.Context) error {
	view := r.cfg.Store.View()
	names := map[string]bool{}
	slots := make(chan struct{}, width)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for src := range api.List[*api.Source](view, "") {
		if src.Spec.URL != "" {
			continue
		}
		names[src.Name] = true
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := r.complete(ctx, src); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	r.mu.Lock()
	maps.DeleteFunc(r.behind, func(name string, _ Behind) bool { return !names[name] })
	r.mu.Unlock()
	return errors.Join(errs...)
}

// complete brings one repository up to date.
func (r *Replica) complete(ctx context.Context, src *api.Source) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.cfg.Background, fmt.Errorf("it took longer than %s", r.cfg.Background))
	defer cancel()
	if err := r.git.Init(ctx, src.Name); err != nil {
		return err
	}
	for _, hash := range inForce(r.cfg.Store.View(), src.Name) {
		has, err := r.git.Has(src.Name, hash)
		if err == nil && !has {
			r.lag(src.Name, hash, nil)
			err = r.obtain(ctx, src.Name, hash)
		}
		if err != nil {
			r.lag(src.Name, hash, err)
			return fmt.Errorf("repository %s: %w", src.Name, err)
		}
	}
	r.mu.Lock()
	late, was := r.behind[src.Name]
	delete(r.behind, src.Name)
	r.mu.Unlock()
	if was {
		r.log.Info("repository has caught up", "repository", src.Name, "hash", late.Hash, "after", time.Since(late.Since))
	}
	if src.Status.References != "" {
		return nil
	}
	return r.git.AdoptReferences(ctx, src.Name)
}

// lag notes that a repository lacks something.
func (r *Replica) lag(name, hash string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b, ok := r.behind[name]
	if !ok {
		b = Behind{Repository: name, Since: time.Now()}
	}
	b.Hash, b.Err = hash, err
	r.behind[name] = b
}
