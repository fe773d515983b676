// Package storebench measures the replicated store as processes on loopback, beside
// etcd in the same run: three servers each, fsync on, with mutual TLS for Decree and
// without TLS for etcd.
//
// It drives both with the same number of callers, keys and bytes, interleaved. Nothing
// of it is part of what a cluster does.
package storebench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// target is a store under measurement.
type target interface {
	name() string
	// fill writes keys from up to to-1, with values of so many bytes.
	fill(ctx context.Context, from, to, size int) error
	// put replaces the value of key i, acknowledged when durable on a quorum.
	put(ctx context.Context, i int) error
	// get reads key i, linearizable unless stale.
	get(ctx context.Context, i int, stale bool) error
	// watch counts events of all keys into n until ctx ends; it returns when it watches.
	watch(ctx context.Context, n *atomic.Int64) error
	// resident is the memory of the largest process in MB.
	resident() float64
	// term is how many elections there have been, give or take a constant.
	term(ctx context.Context) (uint64, error)
	// save makes a snapshot of everything in a file, restore a new cluster of one server
	// from it, which answers when restore returns; errNotMeasured if what it takes is not
	// installed.
	save(ctx context.Context, file string) error
	restore(ctx context.Context, file string) error
	// killLeader ends the leader's process, and returns what to call to start it again.
	killLeader(ctx context.Context) (restart func() error, err error)
	// write makes any durable change through servers that are left, until acknowledged.
	write(ctx context.Context, i int) error
	stop()
}

const (
	keys      = 10_000
	valueSize = 256
)

// changes makes every value another one: an unchanged object would be no change.
var changes atomic.Int64

// newValue returns a value of so many bytes that there was not before. It is text made
// of random bits: whoever compresses gets little out of it.
func newValue(size int) string {
	b := make([]byte, 0, size+8)
	for b = strconv.AppendInt(b, changes.Add(1), 36); len(b) < size; {
		for bits := rand.Uint64() | 1<<63; bits > 15 && len(b) < size; bits >>= 6 {
			b = append(b, base64Digits[bits&63])
		}
	}
	return string(b)
}

const base64Digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

// Sample is what one measurement of one store gave.
type Sample struct {
	Store   string  `json:"store"`
	What    string  `json:"what"`
	PerSec  float64 `json:"perSecond,omitempty"`
	P50     float64 `json:"p50ms,omitempty"`
	P90     float64 `json:"p90ms,omitempty"`
	P99     float64 `json:"p99ms,omitempty"`
	Max     float64 `json:"maxms,omitempty"`
	Took    float64 `json:"tookms,omitempty"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit,omitempty"`
	Failed  int64   `json:"failed,omitempty"`
	LastErr string  `json:"lastError,omitempty"`
}

// Config says what to measure.
type Config struct {
	Binary   string // of decree
	Etcd     string // of etcd; empty: no peer
	Dir      string // for data; removed by the caller
	Duration time.Duration
	Kills    int
	Watchers int
	Objects  int // for memory and snapshots
	Callers  []int
	Only     string // a part of the name of what to measure; empty: everything
	Say      func(Sample)
}

// Run measures.
func Run(ctx context.Context, cfg Config) error {
	targets, err := start(ctx, cfg)
	if err != nil {
		return err
	}
	b := &bench{Config: cfg, targets: targets}
	defer func() { b.stop() }()
	for _, n := range cfg.Callers {
		b.load(ctx, fmt.Sprintf("put, %d callers", n), n, func(ctx context.Context, t target, i int) error { return t.put(ctx, i) })
	}
	for _, n := range cfg.Callers {
		b.load(ctx, fmt.Sprintf("linearizable get, %d callers", n), n, func(ctx context.Context, t target, i int) error { return t.get(ctx, i, false) })
		b.load(ctx, fmt.Sprintf("stale get, %d callers", n), n, func(ctx context.Context, t target, i int) error { return t.get(ctx, i, true) })
	}
	b.load(ctx, "mixed (1 put, 4 gets), 64 callers", 64, func(ctx context.Context, t target, i int) error {
		if i%5 == 0 {
			return t.put(ctx, i)
		}
		return t.get(ctx, i, false)
	})
	b.fanOut(ctx)
	b.elections(ctx)
	return errors.Join(b.failover(ctx), b.size(ctx))
}

// fillFor bounds the wall time in which a store takes the objects of a measurement.
const fillFor = 5 * time.Minute

// start starts the stores with the keys in them.
func start(ctx context.Context, cfg Config) (targets []target, err error) {
	defer func() {
		if err != nil {
			(&bench{targets: targets}).stop()
		}
	}()
	d, err := startDecree(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("start decree: %w", err)
	}
	targets = append(targets, d)
	if cfg.Etcd != "" {
		e, err := startEtcd(ctx, cfg)
		if err != nil {
			return targets, fmt.Errorf("start etcd: %w", err)
		}
		targets = append(targets, e)
	}
	ctx, cancel := context.WithTimeout(ctx, fillFor)
	defer cancel()
	for _, t := range targets {
		if err := t.fill(ctx, 0, keys, valueSize); err != nil {
			return targets, fmt.Errorf("fill %s: %w", t.name(), err)
		}
	}
	return targets, nil
}

func (b *bench) stop() {
	for _, t := range b.targets {
		t.stop()
	}
	b.targets = nil
}

type bench struct {
	Config
	targets []target
}

func (b *bench) wanted(what string) bool { return strings.Contains(what, b.Only) }

func (b *bench) say(s Sample) {
	if b.wanted(s.What) {
		b.Say(s)
	}
}

// load runs callers that wait for each answer, on one store after the other.
func (b *bench) load(ctx context.Context, what string, callers int, call func(context.Context, target, int) error) {
	if !b.wanted(what) {
		return
	}
	for _, t := range b.targets {
		if ctx.Err() != nil {
			return
		}
		warm, cancel := context.WithTimeout(ctx, b.Duration/5)
		drive(warm, callers, func(ctx context.Context, i int) error { return call(ctx, t, i) })
		cancel()
		timed, cancel := context.WithTimeout(ctx, b.Duration)
		begun := time.Now()
		times, failed, last := drive(timed, callers, func(ctx context.Context, i int) error { return call(ctx, t, i) })
		took := time.Since(begun)
		cancel()
		s := summary(times)
		s.Store, s.What, s.PerSec, s.Failed = t.name(), what, float64(len(times))/took.Seconds(), failed
		if last != nil {
			s.LastErr = last.Error()
		}
		b.say(s)
	}
}

// drive returns how long each successful call took.
func drive(ctx context.Context, callers int, call func(context.Context, int) error) (all []time.Duration, failed int64, last error) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs atomic.Int64
	// What is under way when the time is up is waited for, and not counted.
	patient, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	for range callers {
		wg.Go(func() {
			var times []time.Duration
			for ctx.Err() == nil {
				begun := time.Now()
				err := call(patient, rand.IntN(keys))
				took := time.Since(begun)
				switch {
				case ctx.Err() != nil:
				case err != nil:
					errs.Add(1)
					mu.Lock()
					last = err
					mu.Unlock()
				default:
					times = append(times, took)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, times...)
		})
	}
	wg.Wait()
	return all, errs.Load(), last
}

func summary(times []time.Duration) Sample {
	if len(times) == 0 {
		return Sample{}
	}
	slices.Sort(times)
	at := func(q float64) float64 {
		return float64(times[min(len(times)-1, int(q*float64(len(times))))].Microseconds()) / 1000
	}
	return Sample{P50: at(0.5), P90: at(0.9), P99: at(0.99), Max: at(1)}
}

// fanOut counts the events that many watchers receive while callers put.
func (b *bench) fanOut(ctx context.Context) {
	what := fmt.Sprintf("watch events, %d watchers", b.Watchers)
	if !b.wanted(what) || b.Watchers == 0 {
		return
	}
	for _, t := range b.targets {
		if err := b.fanOutOne(ctx, t, what); err != nil {
			b.say(Sample{Store: t.name(), What: what, LastErr: err.Error()})
		}
	}
}

func (b *bench) fanOutOne(ctx context.Context, t target, what string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var events atomic.Int64
	for range b.Watchers {
		if err := t.watch(ctx, &events); err != nil {
			return err
		}
	}
	timed, stop := context.WithTimeout(ctx, b.Duration)
	defer stop()
	before, begun := events.Load(), time.Now()
	times, _, _ := drive(timed, 256, func(ctx context.Context, i int) error { return t.put(ctx, i) })
	// The rate at which events arrive, while more are made than can be delivered.
	rate := float64(events.Load()-before) / time.Since(begun).Seconds()
	b.say(Sample{Store: t.name(), What: what, PerSec: rate, Value: float64(len(times)) / b.Duration.Seconds(), Unit: "puts/s meanwhile"})
	return nil
}
