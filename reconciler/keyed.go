package reconciler

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Keyed reconciles many things by key with a few workers. A key that is added many
// times before its turn has one turn; one key is never worked on twice at a time;
// each key has its own backoff, which events do not bypass.
//
// The zero value with Do set is ready; fields must not be changed after the first
// call. All methods are safe for concurrent use.
type Keyed[K comparable] struct {
	Name    string
	Workers int // 1 when zero
	Backoff Backoff
	// Do does one pass for one key. It is called again after the returned time, if
	// that is not zero, or earlier when the key is added.
	Do func(ctx context.Context, key K) (after time.Duration, err error)
	// Timeout bounds one pass; zero: the pass sees to it itself.
	Timeout time.Duration
	// Logger receives failures and recoveries; nil: slog.Default.
	Logger *slog.Logger

	mu      sync.Mutex
	once    sync.Once
	entries map[K]*entry
	queue   []K
	ready   chan struct{} // holds a signal while the queue may not be empty
	stopped bool
	status  Status
	failing int
}

// entry is what is known about a key that is not at rest.
type entry struct {
	queued, running, again bool
	failures               int
	timer                  *time.Timer // the next turn by backoff or by Do's request
}

func (q *Keyed[K]) init() {
	q.once.Do(func() {
		q.entries = map[K]*entry{}
		q.ready = make(chan struct{}, 1)
	})
}

// Add asks for a turn of each key. A key that waits after a failure goes on
// waiting; after [Keyed.Run] has returned Add does nothing.
func (q *Keyed[K]) Add(keys ...K) {
	q.init()
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, key := range keys {
		if e := q.entry(key); e.failures == 0 || e.running {
			q.enqueue(key, e)
		}
	}
}

func (q *Keyed[K]) entry(key K) *entry {
	e := q.entries[key]
	if e == nil {
		e = &entry{}
		q.entries[key] = e
	}
	return e
}

// enqueue gives key a turn, or another one if it has its turn now.
func (q *Keyed[K]) enqueue(key K, e *entry) {
	switch {
	case q.stopped || e.queued:
		return
	case e.running:
		e.again = true
		return
	}
	e.stop()
	e.queued = true
	q.queue = append(q.queue, key)
	q.signal()
}

func (q *Keyed[K]) signal() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

func (e *entry) stop() {
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
}

// Run works until ctx is done, waits for the running passes, and returns the cause.
// It must be called once.
func (q *Keyed[K]) Run(ctx context.Context) error {
	q.init()
	var workers sync.WaitGroup
	for range max(1, q.Workers) {
		workers.Go(func() { q.work(ctx) })
	}
	workers.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.stopped = true
	for _, e := range q.entries {
		e.stop()
	}
	return context.Cause(ctx)
}

func (q *Keyed[K]) work(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.ready:
		}
		for ctx.Err() == nil {
			key, ok := q.take()
			if !ok {
				break
			}
			start := time.Now()
			var after time.Duration
			err := bounded(ctx, q.Timeout, func(ctx context.Context) (err error) {
				after, err = q.Do(ctx, key)
				return err
			})
			q.finish(ctx, key, start, after, err)
		}
	}
}

// take begins the turn of the key that waits longest.
func (q *Keyed[K]) take() (key K, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue) == 0 {
		return key, false
	}
	key = q.queue[0]
	q.queue = q.queue[1:]
	if len(q.queue) > 0 {
		q.signal() // another worker may be idle
	}
	e := q.entries[key]
	e.queued, e.running, e.again = false, true, false
	return key, true
}

// finish ends the turn of key and arranges the next one, if any.
func (q *Keyed[K]) finish(ctx context.Context, key K, start time.Time, after time.Duration, err error) {
	if err != nil && ctx.Err() != nil {
		return // stopping is no failure
	}
	q.mu.Lock()
	e := q.entries[key]
	before := e.failures
	e.running = false
	q.count(e, start, err)
	switch {
	case err != nil:
		q.later(key, e, q.Backoff.Wait(e.failures))
	case e.again:
		q.enqueue(key, e)
	case after > 0:
		q.later(key, e, after)
	default:
		delete(q.entries, key)
	}
	failures := e.failures
	q.mu.Unlock()
	report(q.Logger, before, failures, err, slog.Group("loop", slog.String("name", q.Name), slog.String("key", fmt.Sprint(key))))
}

// count keeps the failures of the key and the status of the whole.
func (q *Keyed[K]) count(e *entry, start time.Time, err error) {
	switch {
	case err != nil && e.failures == 0:
		q.failing++
	case err == nil && e.failures > 0:
		q.failing--
	}
	since := q.status.FailingSince
	q.status.record(start, err)
	q.status.Failures, q.status.FailingSince = q.failing, since
	switch {
	case q.failing == 0:
		q.status.FailingSince = time.Time{}
	case since.IsZero():
		q.status.FailingSince = time.Now()
	}
	if err != nil {
		e.failures++
	} else {
		e.failures = 0
	}
}

// later gives key a turn after d, unless something else does so earlier.
func (q *Keyed[K]) later(key K, e *entry, d time.Duration) {
	if q.stopped {
		return
	}
	e.timer = time.AfterFunc(d, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.entries[key] == e {
			e.timer = nil
			q.enqueue(key, e)
		}
	})
}

// Len is the number of keys that wait for a worker.
func (q *Keyed[K]) Len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.queue)
}

// Status returns how the queue is doing: Failures is the number of keys whose last
// pass failed, FailingSince the time since when there are any, LastError the result
// of the last pass of any key.
func (q *Keyed[K]) Status() Status {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.status
	s.Name = q.Name
	return s
}
