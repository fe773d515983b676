// Package reconciler runs level-triggered loops. A loop observes, plans, carries
// out and reports in one function that is called for events, for retries and every
// now and then alike; it may be killed between any two steps, and a missed event
// repairs itself with the next pass.
//
// The package knows nothing about what is reconciled. [Loop] serves one thing as a
// whole, [Keyed] many things one by one.
package reconciler

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// Backoff is the wait between failed passes: it doubles from Min to Max, and every
// wait is shortened by a random part of up to a half, so that loops that failed
// together do not return together.
type Backoff struct {
	Min time.Duration // 100 ms when zero
	Max time.Duration // 30 s when zero
}

// Wait returns the wait after so many failures in a row.
func (b Backoff) Wait(failures int) time.Duration {
	if failures <= 0 {
		return 0
	}
	least, most := b.Min, b.Max
	if least <= 0 {
		least = 100 * time.Millisecond
	}
	if most <= 0 {
		most = 30 * time.Second
	}
	d := least
	for range failures - 1 {
		if d >= most/2 {
			d = most
			break
		}
		d *= 2
	}
	d = min(d, most)
	return d - rand.N(d/2+1)
}

// Status is how a loop is doing, for metrics and `decree status`.
type Status struct {
	Name         string
	Passes       uint64        // finished ones, failed ones included
	Failures     int           // in a row, zero when the last pass succeeded
	FailingSince time.Time     // of the first of these
	LastSuccess  time.Time     // zero before the first
	LastDuration time.Duration // of the last pass
	LastError    error         // of the last pass, nil if it succeeded
}

// Loop calls Once at the start, after every change, after failures, and at least
// every Resync. Fields must not be changed after Run was called.
type Loop struct {
	Name string
	// Changed wakes the loop; it should hold at most one signal. Nil: no events. When
	// it is closed, the loop goes on without events.
	Changed <-chan struct{}
	// Resync is the longest time between passes, jittered by up to a tenth. Zero:
	// only events and [Loop.WakeAfter] lead to further passes.
	Resync  time.Duration
	Backoff Backoff
	// Once does one pass over everything.
	Once func(ctx context.Context) error
	// Timeout bounds one pass; zero: the pass sees to it itself.
	Timeout time.Duration
	// Logger receives failures and recoveries; nil: slog.Default.
	Logger *slog.Logger

	mu     sync.Mutex
	status Status
	wake   time.Duration
}

// Run runs the loop until ctx is done and returns its cause. It must be called
// once.
func (l *Loop) Run(ctx context.Context) error {
	timer := time.NewTimer(0) // the first pass needs no event
	defer timer.Stop()
	changed, failures := l.Changed, 0
	for {
		events := changed
		if failures > 0 {
			events = nil // an event must not bypass the backoff
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case _, open := <-events:
			if !open {
				changed = nil
				continue
			}
		case <-timer.C:
		}
		if ctx.Err() != nil { // select is free to choose the event
			return context.Cause(ctx)
		}
		failures = l.pass(ctx)
		if next := l.next(failures); next > 0 {
			timer.Reset(next)
		} else {
			timer.Stop()
		}
	}
}

// pass runs Once and returns the number of failures in a row.
func (l *Loop) pass(ctx context.Context) int {
	l.mu.Lock()
	l.wake = 0
	l.mu.Unlock()
	start := time.Now()
	err := bounded(ctx, l.Timeout, l.Once)
	if err != nil && ctx.Err() != nil {
		return 1 // stopping is no failure
	}
	l.mu.Lock()
	before := l.status.Failures
	l.status.record(start, err)
	failures := l.status.Failures
	l.mu.Unlock()
	report(l.Logger, before, failures, err, slog.String("loop", l.Name))
	return failures
}

func bounded(ctx context.Context, timeout time.Duration, f func(context.Context) error) error {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	return f(ctx)
}

func (s *Status) record(start time.Time, err error) {
	now := time.Now()
	s.Passes++
	s.LastDuration, s.LastError = now.Sub(start), err
	if err == nil {
		s.Failures, s.FailingSince, s.LastSuccess = 0, time.Time{}, now
		return
	}
	if s.Failures++; s.Failures == 1 {
		s.FailingSince = now
	}
}

// report logs the first failure, every power of two of them, and the recovery.
func report(logger *slog.Logger, before, failures int, err error, who slog.Attr) {
	if logger == nil {
		logger = slog.Default()
	}
	switch {
	case err != nil && failures&(failures-1) == 0:
		logger.LogAttrs(context.Background(), slog.LevelWarn, "reconcile", who, slog.Int("failures", failures), slog.Any("error", err))
	case err == nil && before > 0:
		logger.LogAttrs(context.Background(), slog.LevelInfo, "reconcile recovered", who, slog.Int("failures", before))
	}
}

// next is the time until the next pass that no event asks for; zero for never.
func (l *Loop) next(failures int) time.Duration {
	if failures > 0 {
		return l.Backoff.Wait(failures)
	}
	next := l.Resync
	if next > 0 {
		next -= rand.N(next/10 + 1)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wake > 0 && (next == 0 || l.wake < next) {
		next = l.wake
	}
	return next
}

// WakeAfter asks for another pass within d even without an event. It is meant to
// be called by Once, of whose requests the shortest counts; they are forgotten when
// the next pass begins.
func (l *Loop) WakeAfter(d time.Duration) {
	if d <= 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wake == 0 || d < l.wake {
		l.wake = d
	}
}

// Status returns how the loop is doing. It is safe for concurrent use.
func (l *Loop) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Name = l.Name
	return s
}
