// Package dnsbench measures the cluster DNS beside CoreDNS and unbound: the same names,
// the same questions and the same load, one server after the other on loopback. Each is a
// process of its own, so that its processor time and memory are its own.
package dnsbench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Config says what to measure. All fields but Only and the peers have to be set.
type Config struct {
	Binary   string        // decree
	CoreDNS  string        // its binary; empty: it is left out
	Unbound  string        // its binary; empty: it is left out
	Dnsperf  string        // its binary; empty: a slower generator of our own
	Dir      string        // for question files and configurations
	Names    int           // services in the cluster
	Duration time.Duration // of one measurement
	Rounds   int           // how often; medians are reported
	Only     string        // measure only what has this in its name
	Say      func(Sample)
}

// Sample is what one server did with one kind of questions: medians over all rounds.
type Sample struct {
	What    string  `json:"what"`
	Server  string  `json:"server"`
	PerSec  float64 `json:"queriesPerSecond"`
	P50     float64 `json:"p50us"` // microseconds, with one question at a time
	P99     float64 `json:"p99us"`
	CPU     float64 `json:"cpuMillisecondsPerThousand"`
	Memory  float64 `json:"residentMiB"` // after the measurement
	Lost    float64 `json:"lost"`        // questions without an answer, of all rounds
	Rounds  int     `json:"rounds"`
	Loading string  `json:"generator"`
}

// workload is a kind of questions.
type workload struct {
	name string
	// question is the i-th one of a round.
	question func(round, i int) string
	n        int
	// once: every question is asked once, so that no answer is remembered.
	once bool
}

// workloads are what is measured.
func workloads(cfg *Config) []workload {
	return []workload{
		{name: "cluster names", n: cfg.Names, question: func(_, i int) string { return serviceName(i) + " A" }},
		{name: "absent names", n: cfg.Names, question: func(_, i int) string {
			return "www.host" + fmt.Sprint(i) + ".org." + namespace(i) + ".svc." + domain + " A"
		}},
		{name: "forwarded, cached", n: 1000, question: func(_, i int) string { return fmt.Sprintf("host%d.example.org A", i) }},
		{name: "forwarded, cold", n: 20_000, once: true, question: func(r, i int) string { return fmt.Sprintf("h%d-%d.example.net A", r, i) }},
	}
}

const domain = "cluster.local"

func namespace(i int) string   { return fmt.Sprintf("team-%d", i%50) }
func serviceName(i int) string { return fmt.Sprintf("service-%d.%s.svc.%s", i, namespace(i), domain) }
func address(i int) string     { return fmt.Sprintf("10.%d.%d.%d", 96+i>>16, i>>8&0xff, i&0xff) }

// Run measures until everything has been, or ctx ends.
func Run(ctx context.Context, cfg Config) error {
	up, err := startUpstream()
	if err != nil {
		return err
	}
	defer up.close()
	servers, err := start(ctx, &cfg, up.address())
	defer func() {
		for _, s := range servers {
			s.Stop()
		}
	}()
	if err != nil {
		return err
	}
	for _, w := range workloads(&cfg) {
		if !strings.Contains(w.name, cfg.Only) {
			continue
		}
		if err := measure(ctx, &cfg, w, servers); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return nil
}

// measure puts one workload on each server in turn, several times.
func measure(ctx context.Context, cfg *Config, w workload, servers []*server) error {
	results := make([][]load, len(servers))
	for round := range cfg.Rounds {
		path := filepath.Join(cfg.Dir, "questions")
		questions := make([]string, w.n)
		for i := range questions {
			questions[i] = w.question(round, i)
		}
		if err := os.WriteFile(path, []byte(strings.Join(questions, "\n")+"\n"), 0o600); err != nil {
			return err
		}
		for i, s := range servers {
			if !w.once { // the first answers are not what is measured
				if _, err := generate(ctx, cfg, s.port, path, questions, 0); err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
			}
			l, err := s.under(ctx, cfg, w, path, questions)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			results[i] = append(results[i], l)
		}
	}
	for i, s := range servers {
		cfg.Say(summary(cfg, w, s, results[i]))
	}
	return nil
}

func summary(cfg *Config, w workload, s *server, rounds []load) Sample {
	median := func(of func(load) float64) float64 {
		var values []float64
		for _, l := range rounds {
			values = append(values, of(l))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	out := Sample{
		What: w.name, Server: s.name, Rounds: len(rounds), Loading: "dnsperf",
		PerSec: median(func(l load) float64 { return l.perSec }), P50: median(func(l load) float64 { return l.p50 }), P99: median(func(l load) float64 { return l.p99 }),
		CPU: median(func(l load) float64 { return l.cpu }), Memory: median(func(l load) float64 { return l.memory }),
	}
	for _, l := range rounds {
		out.Lost += l.lost
	}
	if cfg.Dnsperf == "" {
		out.Loading = "own"
	}
	return out
}

// load is what one measurement gave.
type load struct {
	perSec, p50, p99, cpu, memory, lost float64
	completed                           float64
}

// under measures one server: first with many questions at a time, then with one.
func (s *server) under(ctx context.Context, cfg *Config, w workload, path string, questions []string) (load, error) {
	duration := cfg.Duration
	if w.once {
		duration = 0
	}
	before, err := s.CPU()
	if err != nil {
		return load{}, err
	}
	l, err := generate(ctx, cfg, s.port, path, questions, duration)
	if err != nil {
		return load{}, err
	}
	after, err := s.CPU()
	if err != nil {
		return load{}, err
	}
	if l.completed == 0 {
		return load{}, errors.New("it answered nothing")
	}
	l.cpu = (after - before).Seconds() * 1e6 / l.completed
	if w.once { // the questions are no longer new, but these are
		for i, q := range questions {
			questions[i] = "again-" + s.name + "-" + q
		}
		defer func() {
			for i, q := range questions {
				questions[i] = strings.TrimPrefix(q, "again-"+s.name+"-")
			}
		}()
	}
	if l.p50, l.p99, err = oneAtATime(ctx, s.port, questions, 3000); err != nil {
		return load{}, err
	}
	l.memory, err = s.Memory()
	return l, err
}
