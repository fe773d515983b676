package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"
)

// Scheduler takes snapshots of a cluster on time, keeps them in a target, and deletes
// those that its policy gives up. Only one should run at a time, on the leader. It
// remembers nothing: what is due follows from what the target holds, so that a new
// leader goes on where the last one was.
type Scheduler struct {
	Target Target
	// Every is the time from one snapshot to the next.
	Every      time.Duration
	Policy     Policy
	Protection Protection
	// ClusterID returns whose snapshots these are, empty while that is not known.
	ClusterID func() string
	// Source reads what is to be saved, with its time.
	Source  func(context.Context) (Source, error)
	Metrics *Metrics     // may be nil
	Log     *slog.Logger // may be nil
}

// The pauses after failures: doubled from the first to the last.
const (
	firstRetry = 30 * time.Second
	lastRetry  = 30 * time.Minute
)

// Run takes snapshots until ctx ends, and returns nil then. Failures are logged, counted
// and tried again.
func (s *Scheduler) Run(ctx context.Context) error {
	if err := errors.Join(s.Protection.Check(), s.Policy.Check()); err != nil {
		return fmt.Errorf("scheduled snapshots: %w", err)
	}
	if s.Every <= 0 {
		return fmt.Errorf("scheduled snapshots: every %s", s.Every)
	}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		wait, err := s.Once(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			wait = min(firstRetry<<min(failures, 10), lastRetry, max(s.Every, firstRetry))
			failures++
			s.Metrics.failed()
			s.Log.Error("scheduled snapshot", "error", err, "failures", failures, "retry", wait)
		default:
			failures = 0
		}
		timer.Reset(wait)
	}
}

// Once takes a snapshot if one is due, and returns how long it is to the next look.
func (s *Scheduler) Once(ctx context.Context) (time.Duration, error) {
	cluster := s.ClusterID()
	if cluster == "" {
		return 0, errors.New("the cluster's id is not known yet")
	}
	list, err := s.Target.List(ctx, cluster)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	if newest, ok := s.newest(list, now); ok {
		s.Metrics.seen(newest)
		if due := newest.Name.Time.Add(s.Every); due.After(now) {
			return due.Sub(now), nil
		}
	}
	entry, err := s.take(ctx)
	if err != nil {
		return 0, err
	}
	s.retain(ctx, append(list, entry))
	return max(time.Until(entry.Name.Time.Add(s.Every)), 0), nil
}

// newest returns the newest snapshot. One from so far in the future that it cannot be a
// matter of two servers' clocks is passed over: it would put off all others.
func (s *Scheduler) newest(list []Entry, now time.Time) (newest Entry, ok bool) {
	for _, e := range list {
		if e.Size > 0 && !e.Name.Time.After(now.Add(s.Every)) && (!ok || older(newest.Name, e.Name) < 0) {
			newest, ok = e, true
		}
	}
	return newest, ok
}

func (s *Scheduler) take(ctx context.Context) (Entry, error) {
	start := time.Now()
	src, err := s.Source(ctx)
	if err != nil {
		return Entry{}, err
	}
	m, err := src.manifest()
	if err != nil {
		return Entry{}, err
	}
	name := NameOf(m)
	size, err := s.Target.Put(ctx, name, func(w io.Writer) error {
		_, err := Save(ctx, w, src, s.Protection)
		return err
	})
	if err != nil {
		return Entry{}, err
	}
	took := time.Since(start)
	s.Metrics.succeeded(name.Time, size, took)
	s.Log.Info("snapshot taken", "name", name.String(), "bytes", size, "took", took)
	return Entry{Name: name, Size: size}, nil
}

// retain deletes what the policy gives up. What cannot be deleted is tried again after
// the next snapshot.
func (s *Scheduler) retain(ctx context.Context, list []Entry) {
	for _, name := range Retain(list, s.Policy, time.Now()) {
		if err := s.Target.Delete(ctx, name); err != nil {
			s.Log.Warn("delete an old snapshot", "name", name.String(), "error", err)
			continue
		}
		s.Log.Info("old snapshot deleted", "name", name.String())
	}
}
