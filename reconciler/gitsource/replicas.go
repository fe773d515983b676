package gitsource

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
)

// Replicas are the other servers that hold the same repositories. Implementations
// are safe for concurrent use.
type Replicas interface {
	// Spread returns once enough servers have an object, a commit or a table of
	// references, with all that it stands on, so that it survives the loss of a
	// minority of them. It is stored and synced here already. An error says what the
	// pusher is to know: how many have it, how many must.
	Spread(ctx context.Context, repository, hash string) error
	// Obtain brings an object that the replicated state names, and that is not stored
	// here, from a server that has it.
	Obtain(ctx context.Context, repository, hash string) error
}

// obtainTime is how long a request waits for what this server lacks.
const obtainTime = 20 * time.Second

func (s *Server) spread(ctx context.Context, repo *repository, h plumbing.Hash) error {
	if s.cfg.Replicas == nil {
		return nil
	}
	return s.cfg.Replicas.Spread(ctx, repo.name, h.String())
}

// obtain makes sure that an object is stored here, and asks other servers for it if
// it is not. An error matches ErrNotFound.
func (s *Server) obtain(ctx context.Context, repo *repository, h plumbing.Hash) error {
	stored, err := repo.stored(h)
	if stored || err != nil {
		return err
	}
	if s.cfg.Replicas == nil {
		return fmt.Errorf("object %s: %w", h, ErrNotFound)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, obtainTime, fmt.Errorf("it took longer than %s", obtainTime))
	defer cancel()
	if err := s.cfg.Replicas.Obtain(ctx, repo.name, h.String()); err != nil {
		return fmt.Errorf("object %s: %w: %w", h, ErrNotFound, err)
	}
	return nil
}

// inForce returns the commit in force, zero before the first one. If it is not
// stored here and cannot be had from another server either, lacking says so.
func (s *Server) inForce(ctx context.Context, repo *repository) (head plumbing.Hash, lacking, err error) {
	head, err = s.head(ctx, repo.name)
	if err != nil || head.IsZero() {
		return head, nil, err
	}
	err = s.obtain(ctx, repo, head)
	if errors.Is(err, ErrNotFound) {
		return head, s.lacks(repo, head, err), nil
	}
	return head, nil, err
}

func (s *Server) lacks(repo *repository, head plumbing.Hash, err error) error {
	if s.cfg.Replicas == nil {
		return fmt.Errorf("commit %s of %s is in force but not stored in %s: restore that folder, or push main again from a clone", head, repo.name, repo.dir)
	}
	return fmt.Errorf("commit %s of %s is in force but not stored on this server yet: try again in a moment, or use another server (%w)", head, repo.name, err)
}

// Has says whether an object is stored in a repository with all that it stands on, and
// synced to disk.
func (s *Server) Has(name, hash string) (bool, error) {
	repo, err := s.repository(name)
	if err != nil {
		return false, err
	}
	h, err := parseHash(hash)
	if err != nil {
		return false, err
	}
	return repo.stored(h)
}

// stored says whether an object is here for good: with all that it stands on, and
// synced to disk.
func (r *repository) stored(h plumbing.Hash) (bool, error) {
	// What a release has moved but not synced yet is visible already.
	r.objects.moving.Lock()
	defer r.objects.moving.Unlock()
	return r.objects.has(h)
}
