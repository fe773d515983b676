package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// SnapshotConfig says how snapshots are taken by themselves.
type SnapshotConfig struct {
	To         string // folder or bucket; empty: none are taken
	Every      time.Duration
	Keep       int // newest ones
	KeepDaily  int // one a day
	Recipients []string
}

// snapshotSource is what a snapshot of the cluster holds. The state is read first, so
// that the repositories have every commit that it names.
func (s *server) snapshotSource(ctx context.Context) (backup.Source, error) {
	view, err := s.store.Read(ctx)
	if err != nil {
		return backup.Source{}, err
	}
	return backup.Source{State: view, Repositories: repositories{s.git, view}, Version: s.cfg.Version, Now: time.Now()}, nil
}

// repositories are the built-in ones as of one view.
type repositories struct {
	git  *gitsource.Server
	view *state.State
}

// Names implements backup.Repositories.
func (r repositories) Names() ([]string, error) {
	var names []string
	for src := range api.List[*api.Source](r.view, "") {
		if src.Spec.URL == "" && src.Status.Applied != "" {
			names = append(names, src.Name)
		}
	}
	return names, nil
}

// Export implements backup.Repositories.
func (r repositories) Export(ctx context.Context, name string, w io.Writer) error {
	src, ok := api.Get[*api.Source](r.view, "", name)
	if !ok {
		return fmt.Errorf("repository %s: no source has this name", name)
	}
	return r.git.Export(ctx, name, gitsource.Tips{Head: src.Status.Applied, References: src.Status.References}, w)
}

// ImportRepository makes a repository of a snapshot below dir, and checks that it has
// what the snapshot's state names. It is a [backup.ImportRepository].
func ImportRepository(ctx context.Context, s *state.State, dir, name string, r io.Reader) error {
	git, err := gitsource.NewServer(gitsource.ServerConfig{Dir: dir, Receiver: noPushes{}})
	if err != nil {
		return err
	}
	tips, err := git.Import(ctx, name, r)
	if err != nil {
		return err
	}
	return checkTips(s, name, tips)
}

// noPushes is the receiver of repositories that nobody serves.
type noPushes struct{}

func (noPushes) Head(context.Context, string) (string, error) { return "", nil }

func (noPushes) Receive(context.Context, *gitsource.Push, func() error, io.Writer) error {
	return errors.New("this repository is not served")
}

// CheckRepository is [ImportRepository] without anything left of it: a
// [backup.CheckRepository].
func CheckRepository(ctx context.Context, s *state.State, name string, r io.Reader) error {
	dir, err := os.MkdirTemp("", "decree-verify-")
	if err != nil {
		return fmt.Errorf("check repository %s: %w", name, err)
	}
	defer os.RemoveAll(dir)
	return ImportRepository(ctx, s, dir, name, r)
}

// newScheduler prepares scheduled snapshots, nil if none are wanted.
func (s *server) newScheduler() (*backup.Scheduler, error) {
	cfg := s.cfg.Snapshots
	if cfg.To == "" {
		return nil, nil
	}
	target, err := backup.OpenTarget(cfg.To)
	if err != nil {
		return nil, fmt.Errorf("--snapshot-to: %w", err)
	}
	recipients, err := backup.Recipients(cfg.Recipients...)
	if err != nil {
		return nil, fmt.Errorf("--snapshot-recipient: %w", err)
	}
	if len(recipients) == 0 {
		return nil, fmt.Errorf("--snapshot-to needs --snapshot-recipient: snapshots hold all secrets of the cluster (age-keygen makes a key)")
	}
	metrics, err := backup.NewMetrics(s.metrics)
	if err != nil {
		return nil, err
	}
	return &backup.Scheduler{
		Target: target, Every: cfg.Every, Policy: backup.Policy{Keep: cfg.Keep, Daily: cfg.KeepDaily}, Protection: backup.Protection{Recipients: recipients},
		ClusterID: s.store.ClusterID, Source: s.snapshotSource, Metrics: metrics, Log: s.cfg.Log.With("part", "snapshots"),
	}, nil
}
