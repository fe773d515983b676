package reconciler_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"decree.dev/decree/reconciler"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// turns records when something was called; a test may look at it at any time.
type turns struct {
	mu    sync.Mutex
	begin time.Time
	times []time.Duration
}

func record() *turns { return &turns{begin: time.Now()} }

func (r *turns) add() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.times = append(r.times, time.Since(r.begin))
	return len(r.times)
}

func (r *turns) all() []time.Duration {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.times)
}

func (r *turns) count() int { return len(r.all()) }

// start runs f in the bubble and returns a function that stops it and checks that
// it returns the cause.
func start(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	reason := errors.New("test is over")
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	synctest.Wait()
	return func() {
		t.Helper()
		cancel(reason)
		if err := <-done; !errors.Is(err, reason) {
			t.Errorf("Run returned %v, want the cause of its context", err)
		}
	}
}

func TestLoopPassesAtStartOnEventAndOnResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changed := make(chan struct{}, 1)
		passes := record()
		l := &reconciler.Loop{Name: "test", Changed: changed, Resync: time.Minute, Logger: quiet,
			Once: func(context.Context) error { passes.add(); return nil }}
		defer start(t, l.Run)()
		check := func(want int, when string) {
			t.Helper()
			if n := passes.count(); n != want {
				t.Errorf("%d passes %s, want %d", n, when, want)
			}
		}
		check(1, "at the start")
		changed <- struct{}{}
		check(2, "after an event")
		time.Sleep(53 * time.Second) // fake time
		check(2, "before the resync")
		time.Sleep(7 * time.Second)
		check(3, "after the resync")
		if s := l.Status(); s.Passes != 3 || s.Failures != 0 || s.LastSuccess.IsZero() || s.Name != "test" {
			t.Errorf("status %+v", s)
		}
	})
}

func TestLoopEventsDoNotBypassTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changed := make(chan struct{}, 1)
		passes := record()
		var good atomic.Bool
		l := &reconciler.Loop{Changed: changed, Resync: time.Hour, Logger: quiet,
			Backoff: reconciler.Backoff{Min: time.Second, Max: 8 * time.Second},
			Once: func(context.Context) error {
				passes.add()
				if good.Load() {
					return nil
				}
				return errors.New("no luck")
			}}
		defer start(t, l.Run)()
		for range 600 {
			select {
			case changed <- struct{}{}:
			default:
			}
			time.Sleep(100 * time.Millisecond)
		}
		times := passes.all()
		for i := 1; i < len(times); i++ {
			most := min(8*time.Second, time.Second<<(i-1))
			if gap := times[i] - times[i-1]; gap < most/2 || gap > most {
				t.Errorf("wait after failure %d is %v, want %v to %v", i, gap, most/2, most)
			}
		}
		if s := l.Status(); s.Failures != len(times) || s.LastError == nil || !s.FailingSince.Equal(passes.begin) || !s.LastSuccess.IsZero() {
			t.Errorf("status %+v after %d failures", s, len(times))
		}
		good.Store(true)
		time.Sleep(8 * time.Second)
		synctest.Wait()
		if s := l.Status(); s.Failures != 0 || !s.FailingSince.IsZero() || s.LastError != nil {
			t.Errorf("status %+v after the recovery", s)
		}
	})
}

func TestLoopWakeAfterAndClosedEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changed := make(chan struct{})
		close(changed)
		passes := record()
		var l *reconciler.Loop
		l = &reconciler.Loop{Changed: changed, Logger: quiet, Once: func(context.Context) error {
			if passes.add() < 3 {
				l.WakeAfter(time.Hour)
				l.WakeAfter(time.Minute)
				l.WakeAfter(2 * time.Minute)
			}
			return nil
		}}
		defer start(t, l.Run)()
		time.Sleep(59 * time.Second)
		if n := passes.count(); n != 1 {
			t.Errorf("%d passes before the minute is over, want 1", n)
		}
		time.Sleep(62 * time.Second)
		if n := passes.count(); n != 3 {
			t.Errorf("%d passes after two minutes, want 3", n)
		}
		time.Sleep(24 * time.Hour)
		if n := passes.count(); n != 3 {
			t.Errorf("%d passes without event, resync or wake, want 3", n)
		}
	})
}

func TestLoopTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &reconciler.Loop{Timeout: time.Second, Logger: quiet, Backoff: reconciler.Backoff{Min: time.Hour, Max: time.Hour},
			Once: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}
		defer start(t, l.Run)()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if s := l.Status(); s.Failures != 1 || !errors.Is(s.LastError, context.DeadlineExceeded) || s.LastDuration != time.Second {
			t.Errorf("status %+v", s)
		}
	})
}

func TestKeyedDedupesAndNeverOverlapsAKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		running, most, count := map[string]bool{}, 0, map[string]int{}
		q := &reconciler.Keyed[string]{Name: "test", Workers: 3, Logger: quiet}
		q.Do = func(_ context.Context, key string) (time.Duration, error) {
			mu.Lock()
			if running[key] {
				t.Errorf("key %s has two turns at a time", key)
			}
			running[key] = true
			most = max(most, len(running))
			count[key]++
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			delete(running, key)
			mu.Unlock()
			return 0, nil
		}
		for range 10 {
			q.Add("a", "b", "c", "d")
		}
		if q.Len() != 4 {
			t.Errorf("%d keys wait, want 4", q.Len())
		}
		defer start(t, q.Run)()
		q.Add("a") // while it has its turn
		q.Add("a")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if most != 3 {
			t.Errorf("%d keys at a time, want 3", most)
		}
		if fmt.Sprint(count) != "map[a:2 b:1 c:1 d:1]" {
			t.Errorf("turns %v", count)
		}
	})
}

func TestKeyedBackoffIsPerKeyAndNotBypassed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := record(), record()
		var good atomic.Bool
		q := &reconciler.Keyed[int]{Logger: quiet, Backoff: reconciler.Backoff{Min: time.Second, Max: 4 * time.Second}}
		q.Do = func(_ context.Context, key int) (time.Duration, error) {
			if key == 1 {
				one.add()
				return 0, nil
			}
			two.add()
			if good.Load() {
				return 0, nil
			}
			return 0, errors.New("no luck")
		}
		defer start(t, q.Run)()
		for range 200 {
			q.Add(1, 2)
			time.Sleep(100 * time.Millisecond)
		}
		if n := one.count(); n != 200 {
			t.Errorf("the good key had %d turns, want 200", n)
		}
		times := two.all()
		for i := 1; i < len(times); i++ {
			most := min(4*time.Second, time.Second<<(i-1))
			if gap := times[i] - times[i-1]; gap < most/2 || gap > most {
				t.Errorf("wait after failure %d is %v, want %v to %v", i, gap, most/2, most)
			}
		}
		if s := q.Status(); s.Failures != 1 || !s.FailingSince.Equal(two.begin) {
			t.Errorf("status %+v", s)
		}
		good.Store(true)
		time.Sleep(4 * time.Second)
		n := two.count()
		q.Add(2)
		if two.count() != n+1 {
			t.Error("after a success an event must count at once")
		}
		if s := q.Status(); s.Failures != 0 || !s.FailingSince.IsZero() {
			t.Errorf("status %+v after the recovery", s)
		}
	})
}

func TestKeyedRequeueAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		times := record()
		q := &reconciler.Keyed[string]{Logger: quiet}
		q.Do = func(context.Context, string) (time.Duration, error) {
			if times.add() == 4 {
				return 0, nil
			}
			return 10 * time.Second, nil
		}
		stop := start(t, q.Run)
		q.Add("a")
		time.Sleep(13 * time.Second)
		q.Add("a") // earlier than the requeue
		time.Sleep(time.Hour)
		want := []time.Duration{0, 10 * time.Second, 13 * time.Second, 23 * time.Second}
		if got := times.all(); !slices.Equal(got, want) {
			t.Errorf("turns at %v, want %v", got, want)
		}
		stop()
		q.Add("b") // after Run: nothing happens, nothing hangs
		synctest.Wait()
		if q.Len() != 0 {
			t.Error("a key was queued after Run returned")
		}
	})
}
