package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/schemas/api"
)

// sources carries out what operators ask of sources.
type sources struct{ *server }

func (s *sources) Sync(ctx context.Context, source, _ string) error {
	src, ok := api.Get[*api.Source](s.store.View(), "", source)
	if ok && src.Spec.URL == "" {
		return apierrors.NewBadRequest(fmt.Sprintf("source %q is a repository of this cluster: a push to it is applied at once, there is nothing to fetch", source))
	}
	err := s.store.OnLeader(ctx,
		func() error { return s.follower.Sync(source) },
		func(leader string) error { return s.peers.Call(ctx, leader, callSync, source, nil) })
	if remote, ok := errors.AsType[*peer.RemoteError](err); ok {
		return apierrors.NewBadRequest(remote.Text)
	}
	if errors.Is(err, delivery.ErrSuspended) {
		return apierrors.NewBadRequest(err.Error())
	}
	return err
}

func (s *sources) Suspend(ctx context.Context, source, user, reason string) error {
	return s.suspension(ctx, source, user, &api.Suspension{By: user, At: metav1.NewTime(time.Now().UTC().Truncate(time.Second)), Reason: reason})
}

func (s *sources) Resume(ctx context.Context, source, user string) error {
	return s.suspension(ctx, source, user, nil)
}

func (s *sources) suspension(ctx context.Context, source, user string, to *api.Suspension) error {
	return known(s.pipeline.Suspend(ctx, source, user, to))
}

// known tells the API in its own words that there is no such source.
func known(err error) error {
	if errors.Is(err, delivery.ErrNoSource) {
		return fmt.Errorf("%w: %w", apiserver.ErrNotFound, err)
	}
	return err
}

func (s *sources) Plan(ctx context.Context, source string, tree fs.FS) (*apiserver.Plan, error) {
	out, err := s.pipeline.DryRun(ctx, source, tree)
	if err != nil {
		return nil, known(err)
	}
	return &apiserver.Plan{Changes: out.Plan.Changes, Unchanged: out.Plan.Unchanged, Refusals: out.Diagnostics}, nil
}
