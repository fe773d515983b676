package netbench

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/render"
)

// measurement is one backend at one size.
type measurement struct {
	cfg     *Config
	backend netplane.Backend
	n       int
	dir     string
	table   render.Table
}

func (m *measurement) say(s Sample) {
	s.Backend, s.Services = string(m.backend), m.n
	m.cfg.Say(s)
}

func (m *measurement) run(ctx context.Context) error {
	if err := m.cold(ctx); err != nil {
		return err
	}
	l, err := newLab(m.dir)
	if err != nil {
		return err
	}
	defer l.close()
	before := memory()
	s, err := open(m.backend, l.node)
	if err != nil {
		return err
	}
	defer s.Close()
	defer s.Purge(context.WithoutCancel(ctx))
	if _, err := s.Sync(ctx, m.table); err != nil {
		return err
	}
	after := memory()
	m.say(Sample{What: "memory of the process", Unit: "MB", P50: after.resident - before.resident, Count: 1, Note: fmt.Sprint(endpoints(&m.table), " endpoints")})
	m.say(Sample{What: "memory of the kernel", Unit: "MB", P50: after.kernel - before.kernel, Count: 1, Note: "slab, per-CPU and vmalloc"})
	for _, step := range []func(context.Context, tables) error{m.single, m.churn} {
		if err := step(ctx, s); err != nil {
			return err
		}
	}
	return m.connect(ctx, s, l)
}

// cold makes the tables from nothing, again and again.
func (m *measurement) cold(ctx context.Context) error {
	var took, user, kernel []float64
	for i := range m.cfg.Runs {
		err := func() error {
			ns, remove, err := namespace(m.dir, fmt.Sprint("cold", i))
			if err != nil {
				return err
			}
			defer remove()
			s, err := open(m.backend, ns)
			if err != nil {
				return err
			}
			defer s.Close()
			debug.FreeOSMemory()
			u, k := processor()
			start := time.Now()
			if _, err := s.Sync(ctx, m.table); err != nil {
				return err
			}
			took = append(took, milliseconds(time.Since(start)))
			u2, k2 := processor()
			user, kernel = append(user, milliseconds(u2-u)), append(kernel, milliseconds(k2-k))
			return s.Purge(ctx)
		}()
		if err != nil {
			return err
		}
	}
	m.say(summary("cold", "ms", took))
	m.say(summary("cold, processor in the process", "ms", user))
	m.say(summary("cold, processor in the kernel", "ms", kernel))
	return nil
}

// single changes one service at a time: an endpoint is replaced, or one comes or goes.
func (m *measurement) single(ctx context.Context, s tables) error {
	mk := &maker{next: 1 << 21}
	rnd := rand.New(rand.NewPCG(3, 4))
	replace := func(svc *render.Service) { svc.Endpoints[0] = mk.endpoint() }
	for _, c := range []struct {
		what string
		how  func(*render.Service)
	}{{"one change, an endpoint replaced", replace}, {"one change, an endpoint more", func(svc *render.Service) { svc.Endpoints = append(svc.Endpoints, mk.endpoint()) }}} {
		var took []float64
		for range m.cfg.Changes {
			next := change(m.table, []int{rnd.IntN(m.n)}, c.how)
			start := time.Now()
			if _, err := s.Sync(ctx, next); err != nil {
				return err
			}
			took = append(took, milliseconds(time.Since(start)))
			m.table = next
		}
		m.say(summary(c.what, "ms", took))
	}
	return nil
}

// batches is in how many steps the changes of a second come.
const batches = 10

// churn replaces an endpoint of one service in a hundred each second.
func (m *measurement) churn(ctx context.Context, s tables) error {
	if m.cfg.Churn <= 0 {
		return nil
	}
	mk := &maker{next: 1 << 20}
	rnd := rand.New(rand.NewPCG(5, 6))
	tick := time.NewTicker(time.Second / batches)
	defer tick.Stop()
	var took []float64
	u, k := processor()
	start := time.Now()
	for time.Since(start) < m.cfg.Churn {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		next := change(m.table, rnd.Perm(m.n)[:max(1, m.n/100/batches)], func(svc *render.Service) { svc.Endpoints[0] = mk.endpoint() })
		begun := time.Now()
		if _, err := s.Sync(ctx, next); err != nil {
			return err
		}
		took = append(took, milliseconds(time.Since(begun)))
		m.table = next
	}
	u2, k2 := processor()
	share := float64((u2-u)+(k2-k)) / float64(time.Since(start)) * 100
	m.say(summary("1% a second, each of 10 changes", "ms", took))
	m.say(Sample{What: "1% a second, processor", Unit: "% of one", P50: share, Count: 1, Note: fmt.Sprintf("over %s, %.0f%% of it in the kernel", m.cfg.Churn, 100*float64(k2-k)/float64((u2-u)+(k2-k)))})
	return nil
}

// processor is the time that this process has used, of its own and in the kernel: what it
// sends over netlink is carried out meanwhile.
func processor() (user, kernel time.Duration) {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &r) // fails on a bad pointer only
	return time.Duration(r.Utime.Nano()), time.Duration(r.Stime.Nano())
}

// usage is in MB.
type usage struct{ resident, kernel float64 }

// memory is what this process and the kernel hold now.
func memory() usage {
	debug.FreeOSMemory()
	own, all := kilobytes("/proc/self/status"), kilobytes("/proc/meminfo")
	return usage{resident: own["VmRSS"] / 1000, kernel: (all["Slab"] + all["Percpu"] + all["VmallocUsed"]) / 1000}
}

// kilobytes reads lines such as "VmRSS:  123 kB"; what cannot be read is missing.
func kilobytes(path string) map[string]float64 {
	out := map[string]float64{}
	b, err := os.ReadFile(path)
	if err != nil {
		return out
	}
	for sc := bufio.NewScanner(strings.NewReader(string(b))); sc.Scan(); {
		key, rest, _ := strings.Cut(sc.Text(), ":")
		if v, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64); err == nil {
			out[key] = v
		}
	}
	return out
}

// connect compares connections through a service with direct ones, in turns.
func (m *measurement) connect(ctx context.Context, s tables, l *lab) error {
	at := m.table.Services[m.n/2]
	next := change(m.table, []int{m.n / 2}, func(svc *render.Service) { svc.Endpoints = append(svc.Endpoints[:0], l.server) })
	if _, err := s.Sync(ctx, next); err != nil {
		return err
	}
	var direct, through []float64
	err := netspace.Do(l.client, func() error {
		for i := range m.cfg.Connects + 10 {
			d, err := connectOnce(l.server.Addr().As4(), int(l.server.Port()))
			if err != nil {
				return fmt.Errorf("connect directly: %w", err)
			}
			v, err := connectOnce(at.Addr.As4(), int(at.Port.Port))
			if err != nil {
				return fmt.Errorf("connect through the service: %w", err)
			}
			if i >= 10 { // those before warm up
				direct, through = append(direct, d), append(through, v)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	a, b := summary("connect directly", "µs", direct), summary("connect through a service", "µs", through)
	m.say(a)
	m.say(b)
	m.say(Sample{What: "connect, added by the service", Unit: "µs", P50: b.P50 - a.P50, Count: len(direct), Note: "difference of the medians"})
	return nil
}
