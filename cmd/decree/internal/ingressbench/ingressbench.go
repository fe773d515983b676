// Package ingressbench measures the proxy of Ingresses beside nginx, HAProxy and Caddy: the
// same backend and the same load, one proxy after the other on loopback. Each is a process
// with one processor core, on which nothing else of the measurement runs.
package ingressbench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Config says what to measure. Binary, H2load, Dir, Duration, Rounds and Say have to be set.
type Config struct {
	Binary                string // decree
	Nginx, HAProxy, Caddy string // their binaries; empty: left out. nginx is the backend, too
	H2load                string // the generator
	Dir                   string // for configurations and logs
	Duration              time.Duration
	Rounds                int    // how often; medians are reported
	Only                  string // measure only what has this in its name
	Say                   func(Sample)
}

// Sample is what one proxy did with one kind of requests: medians over all rounds.
type Sample struct {
	What    string  `json:"what"`
	Server  string  `json:"server"`
	PerSec  float64 `json:"requestsPerSecond"`
	P50     float64 `json:"p50us"` // microseconds
	P99     float64 `json:"p99us"`
	CPU     float64 `json:"cpuMillisecondsPerThousand"`
	Memory  float64 `json:"residentMiB"`
	Failed  float64 `json:"failed"` // of all rounds
	OfNginx float64 `json:"ofNginx,omitempty"`
	Rounds  int     `json:"rounds"`
}

// workload is a kind of requests.
type workload struct {
	name string
	tls  bool
	args []string // of h2load
	path string
}

var workloads = []workload{
	{name: "h1", args: []string{"--h1", "-c", "64"}, path: "/small"},
	{name: "h1, 100 KiB", args: []string{"--h1", "-c", "16"}, path: "/large"},
	{name: "h2 with TLS", tls: true, args: []string{"-c", "16", "-m", "8"}, path: "/small"},
}

const large = 100 << 10

// The cores: of the proxy, and of what asks and answers.
const proxyCore, otherCore = "0", "1"

// Run measures until everything has been, or ctx ends.
func Run(ctx context.Context, cfg Config) error {
	if err := writeCertificate(cfg.Dir); err != nil {
		return err
	}
	back, port, err := startBackend(ctx, &cfg)
	if err != nil {
		return err
	}
	defer back.Stop()
	proxies, err := startProxies(ctx, &cfg, port)
	defer func() {
		for _, p := range proxies {
			p.Stop()
		}
	}()
	if err != nil {
		return err
	}
	for _, w := range workloads {
		if !strings.Contains(w.name, cfg.Only) {
			continue
		}
		if err := measure(ctx, &cfg, w, proxies); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return nil
}

// measure puts one workload on each proxy in turn, several times.
func measure(ctx context.Context, cfg *Config, w workload, proxies []*proxy) error {
	rounds := make([][]load, len(proxies))
	for range cfg.Rounds {
		for i, p := range proxies {
			l, err := p.under(ctx, cfg, w)
			if err != nil {
				return fmt.Errorf("%s: %w", p.Name, err)
			}
			rounds[i] = append(rounds[i], l)
		}
	}
	var nginx float64
	samples := make([]Sample, len(proxies))
	for i, p := range proxies {
		samples[i] = summary(w, p, rounds[i])
		if p.Name == "nginx" {
			nginx = samples[i].PerSec
		}
	}
	for _, s := range samples {
		if nginx > 0 {
			s.OfNginx = s.PerSec / nginx
		}
		cfg.Say(s)
	}
	return nil
}

func summary(w workload, p *proxy, rounds []load) Sample {
	median := func(of func(load) float64) float64 {
		var values []float64
		for _, l := range rounds {
			values = append(values, of(l))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	s := Sample{
		What: w.name, Server: p.Name, Rounds: len(rounds), PerSec: median(func(l load) float64 { return l.perSec }),
		P50: median(func(l load) float64 { return l.p50 }), P99: median(func(l load) float64 { return l.p99 }),
		CPU: median(func(l load) float64 { return l.cpu }), Memory: median(func(l load) float64 { return l.memory }),
	}
	for _, l := range rounds {
		s.Failed += l.failed
	}
	return s
}

// load is what one measurement gave.
type load struct{ perSec, p50, p99, cpu, memory, failed, done float64 }

// under measures one proxy.
func (p *proxy) under(ctx context.Context, cfg *Config, w workload) (load, error) {
	before, err := p.CPU()
	if err != nil {
		return load{}, err
	}
	l, err := generate(ctx, cfg, w, p.url(w))
	if err != nil {
		return load{}, err
	}
	after, err := p.CPU()
	if err != nil {
		return load{}, err
	}
	l.cpu = (after - before).Seconds() * 1e6 / l.done
	l.memory, err = p.Memory()
	return l, err
}

// generate asks for url as fast as it is answered.
func generate(ctx context.Context, cfg *Config, w workload, url string) (load, error) {
	log := filepath.Join(cfg.Dir, "requests")
	if err := os.RemoveAll(log); err != nil {
		return load{}, err
	}
	args := append([]string{"-c", otherCore, cfg.H2load, "-t", "1", "-D", strconv.Itoa(max(int(cfg.Duration/time.Second), 1)), "--log-file", log}, w.args...)
	out, err := exec.CommandContext(ctx, "taskset", append(args, url)...).CombinedOutput()
	if err != nil {
		return load{}, fmt.Errorf("h2load: %w: %s", err, out)
	}
	return readLog(log, cfg.Duration)
}

// readLog reads what h2load writes about each request: when it began, in microseconds, the
// status, and how long it took.
func readLog(path string, duration time.Duration) (l load, err error) {
	f, err := os.Open(path)
	if err != nil {
		return l, err
	}
	defer f.Close()
	var took []float64
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) != 3 {
			return l, fmt.Errorf("h2load wrote something else: %q", s.Text())
		}
		us, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			return l, err
		}
		if fields[1] != "200" {
			l.failed++
			continue
		}
		took = append(took, us)
	}
	if len(took) == 0 {
		return l, errors.New("it answered nothing")
	}
	slices.Sort(took)
	l.done, l.perSec = float64(len(took)), float64(len(took))/duration.Seconds()
	l.p50, l.p99 = took[len(took)/2], took[len(took)*99/100]
	return l, nil
}
