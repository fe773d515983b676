// Package containerd runs pods on containerd 1.6 to 2.x. It implements the agent's
// Runtime: sandboxes are namespaces and a cgroup without any process of their own,
// containers are containerd containers that carry their whole description in labels,
// and logs are written by the shims to files, so that neither needs this process to
// be alive.
//
// The package may touch its own folders, the cgroups below Config.CgroupParent and
// one containerd namespace. It knows nothing of the control plane.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"decree.dev/decree/reconciler/agent"
)

// Config configures a Runtime. Zero values choose the defaults in the comments.
type Config struct {
	Address      string // containerd's socket; required
	Namespace    string // containerd namespace; "decree"
	Dir          string // sandbox records and logs; required
	RunDir       string // namespace mounts and FIFOs, on a tmpfs; /run/decree/NAMESPACE
	CgroupParent string // absolute cgroup path; /decree
	Snapshotter  string // overlayfs where it works, else native
	LogMaxBytes  int64  // size at which a log file is rotated; 10 MiB
	LogFiles     int    // log files kept for one container attempt; 3
	PidsLimit    int64  // processes one container may have; 4096, negative: no limit
	Logger       *slog.Logger
}

// Runtime implements agent.Runtime. It is safe for concurrent use.
type Runtime struct {
	cfg    Config
	log    *slog.Logger
	client *ctrd.Client
	images *imageCache
	pumps  *pumps
	events chan struct{}

	locks     keyLocks // by pod: sandboxes and shims are shared between its containers
	snapMu    sync.Mutex
	snapName  string
	cancel    context.CancelFunc
	work      background
	closeOnce sync.Once
}

var (
	_ agent.Runtime   = (*Runtime)(nil)
	_ agent.Versioned = (*Runtime)(nil)
)

// New returns a Runtime for the containerd at cfg.Address, which need not answer
// yet: until it does, methods return errors. Pods left by an earlier Runtime with the
// same folders are adopted. Close ends the background work and leaves pods alone.
func New(cfg Config) (*Runtime, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{cfg.sandboxDir(), cfg.logDir(), cfg.nsDir(), cfg.fifoDir()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("container runtime: %w", err)
		}
	}
	client, err := ctrd.New(cfg.Address,
		ctrd.WithDefaultNamespace(cfg.Namespace),
		ctrd.WithDefaultRuntime(runcRuntime),
		ctrd.WithExtraDialOpts([]grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		})}))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", cfg.Address, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Runtime{
		cfg: cfg, log: cfg.Logger, client: client, cancel: cancel,
		images: newImageCache(),
		events: make(chan struct{}, 1),
	}
	if r.pumps, err = newPumps(cfg); err != nil {
		cancel()
		return nil, errors.Join(fmt.Errorf("container runtime: %w", err), client.Close())
	}
	if err := r.dropRecordless(); err != nil {
		r.log.Error("clear away what is left of removed sandboxes", "error", err)
	}
	r.work.ctx = ctx
	r.background(r.watch)
	r.background(r.sweepShims)
	return r, nil
}

func (cfg Config) withDefaults() (Config, error) {
	if cfg.Address == "" || cfg.Dir == "" {
		return cfg, errors.New("container runtime: the socket of containerd and a data folder are needed")
	}
	if cfg.Namespace == "" {
		cfg.Namespace = "decree"
	}
	if cfg.RunDir == "" {
		cfg.RunDir = filepath.Join("/run/decree", cfg.Namespace)
	}
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = "/decree"
	}
	if cfg.LogMaxBytes == 0 {
		cfg.LogMaxBytes = 10 << 20
	}
	if cfg.LogFiles == 0 {
		cfg.LogFiles = 3
	}
	if cfg.PidsLimit == 0 {
		cfg.PidsLimit = 4096
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if !filepath.IsAbs(cfg.CgroupParent) || filepath.Clean(cfg.CgroupParent) == "/" {
		return cfg, fmt.Errorf("container runtime: cgroup parent %q must be an absolute path below the root", cfg.CgroupParent)
	}
	return cfg, nil
}

func (cfg Config) sandboxDir() string { return filepath.Join(cfg.Dir, "sandboxes") }
func (cfg Config) logDir() string     { return filepath.Join(cfg.Dir, "logs") }
func (cfg Config) nsDir() string      { return filepath.Join(cfg.RunDir, "ns") }
func (cfg Config) fifoDir() string    { return filepath.Join(cfg.RunDir, "io") }

// Close ends the background work. Containers keep running and their output is kept
// by their shims until the next Runtime reads it.
func (r *Runtime) Close() error {
	var err error
	r.closeOnce.Do(func() {
		r.cancel()
		r.work.wait()
		err = errors.Join(r.pumps.close(), r.client.Close())
	})
	return err
}

// Version implements agent.Versioned: name and version of the runtime.
func (r *Runtime) Version(ctx context.Context) (string, error) {
	v, err := r.client.Version(r.ns(ctx))
	if err != nil {
		return "", fmt.Errorf("version of containerd at %s: %w", r.cfg.Address, err)
	}
	return "containerd://" + strings.TrimPrefix(v.Version, "v"), nil
}

// Ready returns once containerd answers requests, or the error it answers with when
// ctx ends first.
func (r *Runtime) Ready(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := r.client.Version(r.ns(ctx))
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for containerd at %s: %w", r.cfg.Address, errors.Join(ctx.Err(), err))
		case <-tick.C:
		}
	}
}

// Events implements agent.Runtime.
func (r *Runtime) Events() <-chan struct{} { return r.events }

// signal tells the agent that something changed.
func (r *Runtime) signal() {
	select {
	case r.events <- struct{}{}:
	default:
	}
}

func (r *Runtime) ns(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, r.cfg.Namespace)
}

// background runs f in its own goroutine, unless the Runtime is closing.
func (r *Runtime) background(f func(context.Context)) {
	r.work.mu.Lock()
	defer r.work.mu.Unlock()
	if r.work.ctx.Err() != nil {
		return
	}
	r.work.group.Go(func() { f(r.work.ctx) })
}

// background is the goroutines that Close waits for.
type background struct {
	mu    sync.Mutex
	ctx   context.Context
	group sync.WaitGroup
}

// wait returns once no goroutine is left; its context must have been cancelled.
func (b *background) wait() {
	b.mu.Lock() // no new one is being started
	//lint:ignore SA2001 passing through the lock is the point
	b.mu.Unlock()
	b.group.Wait()
}

// keyLocks holds one mutex for each key in use.
type keyLocks struct {
	mu    sync.Mutex
	locks map[string]*keyLock
}

type keyLock struct {
	sync.Mutex
	users int
}

// lock locks key and returns how to unlock it.
func (k *keyLocks) lock(key string) (unlock func()) {
	l := k.use(key)
	l.Lock()
	return func() { k.unuse(key, l, true) }
}

// tryLock is lock if nobody holds it.
func (k *keyLocks) tryLock(key string) (unlock func(), ok bool) {
	l := k.use(key)
	if !l.TryLock() {
		k.unuse(key, l, false)
		return nil, false
	}
	return func() { k.unuse(key, l, true) }, true
}

func (k *keyLocks) use(key string) *keyLock {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.locks == nil {
		k.locks = map[string]*keyLock{}
	}
	l := k.locks[key]
	if l == nil {
		l = &keyLock{}
		k.locks[key] = l
	}
	l.users++
	return l
}

func (k *keyLocks) unuse(key string, l *keyLock, held bool) {
	if held {
		l.Unlock()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(k.locks, key)
	}
}
