package compile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"decree.dev/decree/schemas/api"
)

// WorkerVerb is the argument with which a program must call [WorkerMain].
const WorkerVerb = "compile-worker"

// ProcessConfig says how a [Process] runs its workers. Zero values take the defaults.
type ProcessConfig struct {
	// Command is the worker's command line; this program with WorkerVerb by default.
	Command []string
	// Cache is how many bytes of results are kept; 64 MiB.
	Cache int64
	// Idle is how long a worker waits, started and with its definitions loaded, for
	// the next tree after one was evaluated; 1 minute. Negative: none waits.
	Idle time.Duration
	// Workers is how many may run at once; 2.
	Workers int
}

// Process is the [Compiler] that evaluates in bounded child processes. A worker
// serves one tree. It has no environment, no open files but its pipes, a
// low priority, and dies with the thread that started it.
type Process struct {
	cfg   ProcessConfig
	cache *cache
	slots chan struct{}
	spawn *spawner

	done   chan struct{} // closed by Close
	mu     sync.Mutex
	closed bool
	ready  *proc // started ahead, nil if none
	expire *time.Timer
	warm   sync.WaitGroup
}

var _ Compiler = (*Process)(nil)

// ErrClosed is returned by Compile after Close.
var ErrClosed = errors.New("the compiler is closed")

// NewProcess returns a compiler; no process is started before the first tree.
func NewProcess(cfg ProcessConfig) (*Process, error) {
	if len(cfg.Command) == 0 {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("compile worker: find this program: %w", err)
		}
		cfg.Command = []string{self, WorkerVerb}
	}
	if cfg.Cache == 0 {
		cfg.Cache = 64 << 20
	}
	if cfg.Idle == 0 {
		cfg.Idle = time.Minute
	}
	if cfg.Workers <= 0 {
		cfg.Workers = 2
	}
	return &Process{
		cfg: cfg, cache: newCache(cfg.Cache), slots: make(chan struct{}, cfg.Workers), spawn: newSpawner(),
		done: make(chan struct{}),
	}, nil
}

// Close ends the waiting worker, if any, and waits for it. Compilations under way end with
// their own contexts; new ones get ErrClosed.
func (p *Process) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	close(p.done)
	waiting := p.takeReady()
	p.mu.Unlock()
	if waiting != nil {
		waiting.kill()
	}
	p.warm.Wait()
	for range cap(p.slots) {
		p.slots <- struct{}{}
	}
	p.spawn.close()
	return nil
}

// Compile implements [Compiler].
func (p *Process) Compile(ctx context.Context, tree fs.FS, opts Options) (*Result, error) {
	opts = opts.withDefaults()
	t, diags, err := readTree(tree, opts)
	if err != nil {
		return nil, err
	}
	if len(diags) > 0 {
		return finish(nil, diags, len(t.files)), nil
	}
	dirs, h := t.under(opts.Path), newHasher(t)
	known := make(map[string][]*packageResult, len(dirs))
	var unknown []string
	for _, d := range dirs {
		if results, ok := p.cache.get(d, h); ok {
			known[d] = results
		} else {
			unknown = append(unknown, d)
		}
	}
	evaluated := 0
	if len(unknown) > 0 {
		fresh, limit, err := p.evaluate(ctx, t, opts, unknown)
		if err != nil {
			return nil, fmt.Errorf("compile: %w", err)
		}
		for d, f := range fresh {
			p.cache.put(d, depsOf(d, f.results), h, f.results, f.size)
			known[d] = f.results
			evaluated += len(f.results)
		}
		diags = limit
	}
	var results []*packageResult
	for _, d := range dirs {
		results = append(results, known[d]...)
	}
	r := finish(results, diags, len(t.files))
	r.Evaluated, r.Cached = evaluated, len(results)-evaluated
	for i := range r.Objects { // the cache keeps its own
		r.Objects[i].Object = api.Clone(r.Objects[i].Object)
	}
	return r, nil
}

// depsOf is the union of the folders that the results of a folder depend on.
func depsOf(dir string, results []*packageResult) []string {
	deps := []string{dir}
	for _, r := range results {
		deps = append(deps, r.deps...)
	}
	slices.Sort(deps)
	return slices.Compact(deps)
}

// evaluate has a worker evaluate folders of the tree. The diagnostics say which limit
// ended it, if one did; the folders before are good.
func (p *Process) evaluate(ctx context.Context, t *tree, opts Options, dirs []string) (map[string]folderResult, []api.Diagnostic, error) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-p.done:
		return nil, nil, ErrClosed
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, opts.Timeout, errTimeout)
	defer cancel()
	c, err := p.worker(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer p.prepare()
	return c.run(ctx, t, opts, dirs)
}

// worker returns the waiting worker, or starts one.
func (p *Process) worker(ctx context.Context) (*proc, error) {
	p.mu.Lock()
	closed, c := p.closed, p.takeReady()
	p.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	if c != nil && c.alive() {
		return c, nil
	}
	c, err := p.spawn.start(p.cfg.Command)
	if err != nil {
		return nil, err
	}
	return c, c.awaitReady(ctx)
}

// takeReady takes the waiting worker out; the caller holds mu.
func (p *Process) takeReady() *proc {
	c := p.ready
	p.ready = nil
	if p.expire != nil {
		p.expire.Stop()
	}
	return c
}

// prepare starts the next worker in the background and ends it when nothing comes
// for a while, so that an idle server pays no memory for it.
func (p *Process) prepare() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cfg.Idle < 0 || p.closed || p.ready != nil {
		return
	}
	p.warm.Go(func() {
		c, err := p.spawn.start(p.cfg.Command)
		if err != nil {
			return // the next Compile tries again and reports it
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.closed || p.ready != nil {
			c.kill()
			return
		}
		p.ready = c
		p.expire = time.AfterFunc(p.cfg.Idle, func() { p.dismiss(c) })
	})
}

// dismiss ends a worker that has waited long enough.
func (p *Process) dismiss(c *proc) {
	p.mu.Lock()
	taken := p.ready != c
	if !taken {
		p.ready = nil
	}
	p.mu.Unlock()
	if !taken {
		c.kill()
	}
}
