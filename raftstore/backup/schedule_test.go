package backup_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/raftstore/backup"
)

// memory is a target that remembers when something came.
type memory struct {
	mu   sync.Mutex
	kept map[backup.Name]int64
	puts []time.Duration // since begin
	fail error
	from time.Time
}

func newMemory() *memory { return &memory{kept: map[backup.Name]int64{}, from: time.Now()} }

func (m *memory) Put(_ context.Context, name backup.Name, write func(io.Writer) error) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.puts = append(m.puts, time.Since(m.from))
	if m.fail != nil {
		return 0, m.fail
	}
	w := &peakWriter{}
	if err := write(w); err != nil {
		return 0, err
	}
	m.kept[name] = int64(w.n)
	return int64(w.n), nil
}

func (m *memory) List(_ context.Context, cluster string) ([]backup.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []backup.Entry
	for name, size := range m.kept {
		if name.ClusterID == cluster {
			list = append(list, backup.Entry{Name: name, Size: size})
		}
	}
	slices.SortFunc(list, func(a, b backup.Entry) int { return a.Name.Time.Compare(b.Name.Time) })
	return list, nil
}

func (m *memory) Get(context.Context, backup.Name) (io.ReadCloser, error) {
	return nil, errors.ErrUnsupported
}

func (m *memory) Delete(_ context.Context, name backup.Name) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.kept, name)
	return nil
}

func scheduler(target backup.Target) *backup.Scheduler {
	return &backup.Scheduler{
		Target: target, Every: time.Hour, Policy: backup.Policy{Keep: 3}, Protection: plain,
		ClusterID: func() string { return "small" },
		Source: func(context.Context) (backup.Source, error) {
			src := small()
			src.Now = time.Now()
			return src, nil
		},
	}
}

// run lets a scheduler run for some fake time, as if this server led so long.
func run(t *testing.T, s *backup.Scheduler, d time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

func hours(list []time.Duration) []float64 {
	var out []float64
	for _, d := range list {
		out = append(out, d.Hours())
	}
	return out
}

func TestScheduler(t *testing.T) {
	small() // made outside of the bubble
	synctest.Test(t, func(t *testing.T) {
		target := newMemory()
		s := scheduler(target)
		reg := prometheus.NewRegistry()
		var err error
		if s.Metrics, err = backup.NewMetrics(reg); err != nil {
			t.Fatal(err)
		}
		run(t, s, 4*time.Hour+30*time.Minute)
		if want := []float64{0, 1, 2, 3, 4}; !cmp.Equal(hours(target.puts), want) {
			t.Errorf("snapshots after %v hours, want %v", hours(target.puts), want)
		}
		if list, _ := target.List(t.Context(), "small"); len(list) != 3 || !list[2].Name.Time.Equal(target.from.Add(4*time.Hour)) {
			t.Errorf("kept %v", list)
		}
		newest := float64(target.from.Add(4 * time.Hour).Unix())
		if got, err := reg.Gather(); err != nil || len(got) != 4 {
			t.Errorf("metrics %v, %v", got, err)
		}
		if got := metric(t, reg, "decree_snapshot_last_success_timestamp_seconds"); got != newest {
			t.Errorf("last success %v, want %v", got, newest)
		}
		// Another server leads from here: it neither doubles a snapshot nor begins anew.
		other := scheduler(target)
		reg2 := prometheus.NewRegistry()
		if other.Metrics, err = backup.NewMetrics(reg2); err != nil {
			t.Fatal(err)
		}
		run(t, other, 15*time.Minute)
		if got := metric(t, reg2, "decree_snapshot_last_success_timestamp_seconds"); got != newest {
			t.Errorf("the new leader knows of %v, want %v", got, newest)
		}
		run(t, other, time.Hour)
		if want := []float64{0, 1, 2, 3, 4, 5}; !cmp.Equal(hours(target.puts), want) {
			t.Errorf("snapshots after %v hours, want %v", hours(target.puts), want)
		}
		// Nobody led for a day: one is due at once.
		time.Sleep(24 * time.Hour)
		run(t, other, time.Minute)
		if n := len(target.puts); n != 7 || target.puts[6].Hours() != 29.75 {
			t.Errorf("after a day without a leader: %v", hours(target.puts))
		}
	})
}

func metric(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if m := f.GetMetric()[0]; f.GetName() == name {
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func TestSchedulerFails(t *testing.T) {
	small()
	synctest.Test(t, func(t *testing.T) {
		target := newMemory()
		target.fail = errors.New("bucket is gone")
		s := scheduler(target)
		reg := prometheus.NewRegistry()
		var err error
		if s.Metrics, err = backup.NewMetrics(reg); err != nil {
			t.Fatal(err)
		}
		run(t, s, 10*time.Minute)
		var seconds []float64
		for _, p := range target.puts {
			seconds = append(seconds, p.Seconds())
		}
		if want := []float64{0, 30, 90, 210, 450}; !cmp.Equal(seconds, want) {
			t.Errorf("tries after %v seconds, want %v", seconds, want)
		}
		if got := metric(t, reg, "decree_snapshot_failures_total"); got != 5 {
			t.Errorf("%v failures counted, want 5", got)
		}
		run(t, s, 24*time.Hour) // the pause is bounded
		if n := len(target.puts); n < 45 || n > 60 {
			t.Errorf("%d tries in a day", n)
		}
		target.fail = nil
		run(t, s, time.Minute)
		if len(target.kept) != 1 {
			t.Errorf("kept %v", target.kept)
		}
	})
}

// TestSchedulerClock holds that a snapshot from a clock far ahead does not stop others,
// and one from a clock a little ahead is not doubled.
func TestSchedulerClock(t *testing.T) {
	small()
	synctest.Test(t, func(t *testing.T) {
		target := newMemory()
		target.kept[backup.Name{ClusterID: "small", Time: time.Now().Add(1000 * time.Hour), Revision: 1}] = 1
		target.kept[backup.Name{ClusterID: "other", Time: time.Now(), Revision: 1}] = 1
		run(t, scheduler(target), 90*time.Minute)
		if want := []float64{0, 1}; !cmp.Equal(hours(target.puts), want) {
			t.Errorf("snapshots after %v hours, want %v", hours(target.puts), want)
		}
		if len(target.kept) != 4 {
			t.Errorf("kept %v", target.kept)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		target := newMemory()
		target.kept[backup.Name{ClusterID: "small", Time: time.Now().Add(time.Minute), Revision: 1}] = 1
		run(t, scheduler(target), 70*time.Minute)
		if len(target.puts) != 1 || target.puts[0] != 61*time.Minute {
			t.Errorf("snapshots after %v", target.puts)
		}
	})
}

func TestSchedulerRefuses(t *testing.T) {
	for _, change := range []func(*backup.Scheduler){
		func(s *backup.Scheduler) { s.Every = 0 },
		func(s *backup.Scheduler) { s.Protection = backup.Protection{} },
		func(s *backup.Scheduler) { s.Policy = backup.Policy{Daily: 7} },
		func(s *backup.Scheduler) { s.Policy.Keep = -1 },
	} {
		s := scheduler(newMemory())
		change(s)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Run(ctx); err == nil {
			t.Errorf("%+v runs", s)
		}
	}
}
