// Package ipvs holds a node's services in IPVS, the kernel's own balancer, straight
// over netlink.
//
// What IPVS does not do is done by a few rules of nftables that do not grow with
// services (nft.Guard): refusing what is sent to service addresses and is no service,
// and masquerading. Service addresses have to be local to the node, by a route for
// their range: IPVS looks at what the node itself receives and sends.
//
// An endpoint that goes gets weight zero, and is removed once its connections have
// ended. What the kernel holds survives this process; the next one reads it back and
// goes on.
package ipvs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
	"decree.dev/decree/schemas/api"
)

// Defaults of Config.
const (
	DefaultTable     = "decree-ipvs"
	DefaultScheduler = "rr"
	DefaultDrain     = 15 * time.Minute
)

// Config says how services are balanced. The zero value will do.
type Config struct {
	// Table is the name of the nftables tables; empty: DefaultTable.
	Table string
	// Scheduler is one of api.Schedulers, for services that ask for none; empty:
	// DefaultScheduler.
	Scheduler string
	// Drain is how long connections to an endpoint that went may go on; zero:
	// DefaultDrain.
	Drain time.Duration
	// TCP, TCPFin and UDP are how long IPVS remembers idle connections, such that are
	// about to end, and flows. In whole seconds; zero: as the kernel has it.
	TCP, TCPFin, UDP time.Duration
	// Log; nil: slog.Default.
	Log *slog.Logger
}

// Validate says what is wrong with c, on kernels without IPVS too.
func (c Config) Validate() error {
	_, err := c.withDefaults()
	return err
}

func (c Config) withDefaults() (Config, error) {
	if c.Table == "" {
		c.Table = DefaultTable
	}
	if c.Scheduler == "" {
		c.Scheduler = DefaultScheduler
	}
	if !slices.Contains(api.Schedulers, c.Scheduler) {
		return c, fmt.Errorf("IPVS scheduler %q: want one of %v", c.Scheduler, api.Schedulers)
	}
	if c.Drain == 0 {
		c.Drain = DefaultDrain
	}
	for _, d := range []time.Duration{c.TCP, c.TCPFin, c.UDP, c.Drain} {
		if d < 0 || d%time.Second != 0 {
			return c, fmt.Errorf("IPVS timeout %s: want whole seconds", d)
		}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c, nil
}

// drain is a service that has servers without weight.
type drain struct {
	holds *virtual
	since map[netip.AddrPort]time.Time
}

// sweepEvery is the least time between two looks at what drains.
const sweepEvery = time.Second

var errClosed = fmt.Errorf("service tables: %w", os.ErrClosed)

// Services implements netplane.Services with IPVS. All methods are safe for
// concurrent use; they take turns.
type Services struct {
	cfg Config
	log *slog.Logger
	now func() time.Time

	mu       sync.Mutex
	closed   bool
	kernel   *kernel
	guard    *nft.Guard
	settings *settings
	steer    *steer
	// known says that have, and all that follows, is what the kernel holds.
	known bool
	have  render.Table
	// marks are those of the guard by port; hairpins are under the zero port.
	marks map[render.Port]map[nft.Mark]bool
	split *splits
	// reach counts how many services go to an address.
	reach    map[netip.Addr]int
	draining map[key]*drain
	swept    time.Time
	// missing are the schedulers that the kernel turned out not to have.
	missing map[string]bool
}

// New opens the sockets, in the network namespace of the calling thread. Nothing
// changes yet, but that the kernel loads IPVS. The error matches ErrMissing if it has
// none.
func New(cfg Config) (*Services, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Services{cfg: cfg, log: cfg.Log, now: time.Now, missing: map[string]bool{}}
	if s.kernel, err = openKernel(); err != nil {
		return nil, err
	}
	if s.guard, err = nft.NewGuard(cfg.Table, cfg.Log); err != nil {
		return nil, errors.Join(err, s.kernel.Close())
	}
	if s.settings, err = openSettings(&cfg); err != nil {
		return nil, errors.Join(err, s.guard.Close(), s.kernel.Close())
	}
	if s.steer, err = openSteer(); err != nil {
		return nil, errors.Join(err, s.settings.close(), s.guard.Close(), s.kernel.Close())
	}
	return s, nil
}

// Close closes the sockets; what the kernel holds stays.
func (s *Services) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.steer.close()
	return errors.Join(s.settings.close(), s.guard.Close(), s.kernel.Close())
}

// Sync implements netplane.Services. It also removes endpoints whose connections have
// ended since they went.
func (s *Services) Sync(ctx context.Context, want render.Table) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, errClosed
	}
	if s.known {
		n, err := s.incremental(ctx, want)
		if err == nil || ctx.Err() != nil {
			return n, err
		}
		if !errors.Is(err, errSettings) {
			s.log.Warn("services are not as expected; reading them back", "err", err)
		}
	}
	n, err := s.full(ctx, want)
	for errors.Is(err, errScheduler) {
		n, err = s.full(ctx, want)
	}
	return n, err
}

// scheduler is the one for a service that asks for one, or for none.
func (s *Services) scheduler(asked string) string {
	name := cmp.Or(asked, s.cfg.Scheduler)
	if s.missing[name] {
		return DefaultScheduler
	}
	return name
}

// Draining returns how many services still have connections to endpoints that went,
// as of the last Sync.
func (s *Services) Draining() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.draining)
}

// cutFor says for which servers there is nothing to wait for: flows of UDP, whose
// clients would stay for ever, and nodes that are gone.
func cutFor(t *render.Table) func(*virtual, netip.Addr) bool {
	return func(v *virtual, a netip.Addr) bool {
		return v.Proto == render.UDP || contains(t.Lost, a)
	}
}

func contains(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Probe finds out whether the kernel has all that services need, in the network
// namespace of the calling thread, by making what they need under a name that nobody
// has. The error matches ErrMissing if there is no IPVS.
func Probe() error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	s, err := openSettings(&Config{})
	if err != nil {
		return errors.Join(err, k.Close())
	}
	return errors.Join(nft.ProbeGuard(), s.close(), k.Close())
}
