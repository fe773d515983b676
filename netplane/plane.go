package netplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane/announce"
	"decree.dev/decree/netplane/cni"
	"decree.dev/decree/netplane/flows"
	"decree.dev/decree/netplane/healthcheck"
	"decree.dev/decree/netplane/host"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/overlay"
	"decree.dev/decree/netplane/render"
)

// DefaultReadBack is how often the kernel's tables are compared with what they
// should be.
const DefaultReadBack = 30 * time.Second

// DefaultLinger is the least time between the last new connection to a pod and the
// pod's end: servers accept late under load, and other nodes learn a little later.
const DefaultLinger = 200 * time.Millisecond

// Config says where a node's network is. Only DataDir has to be set.
type Config struct {
	// DataDir is the folder of this package; Purge removes it.
	DataDir string
	// Backend balances services; empty: IPVS where the kernel has it, else nftables.
	Backend Backend
	// IPVS is how that backend works: how it chooses, how long it waits for connections to
	// endpoints that went, and the kernel's timeouts. Table and Log are set here.
	IPVS ipvs.Config
	// Table is the name of the nftables tables; empty: nft.DefaultTable.
	Table string
	// CNIConfDir is where a user's CNI configuration wins over the generated one,
	// usually /etc/cni/net.d. Empty: there is none.
	CNIConfDir string
	// CNIBinDirs are searched for plugins; empty: /opt/cni/bin and /usr/lib/cni.
	CNIBinDirs []string
	// MTU of pod interfaces in bytes; zero: what reaches all nodes whole.
	MTU int
	// Overlay names what leads to other nodes; zero: the defaults.
	Overlay overlay.Config
	// Encryption of what pods of different nodes say to each other; empty: none.
	Encryption Encryption
	// NetNS is the node's network namespace; empty: that of the process.
	NetNS string
	// ReadBack is the time between comparisons; zero: DefaultReadBack.
	ReadBack time.Duration
	// Linger is how long Withdraw goes on waiting once no service leads to the pod;
	// zero: DefaultLinger.
	Linger time.Duration
	// Registerer takes the metrics; nil: they go nowhere.
	Registerer prometheus.Registerer
	// Log; nil: slog.Default.
	Log *slog.Logger
}

// withDefaults fills what the caller left out.
func (c Config) withDefaults() Config {
	if len(c.CNIBinDirs) == 0 {
		c.CNIBinDirs = []string{"/opt/cni/bin", "/usr/lib/cni"}
	}
	if c.ReadBack == 0 {
		c.ReadBack = DefaultReadBack
	}
	if c.Linger == 0 {
		c.Linger = DefaultLinger
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

func (c *Config) networks() *cni.Networks {
	return cni.New(cni.Config{
		UserConfDir: c.CNIConfDir, BinDirs: c.CNIBinDirs, DataDir: filepath.Join(c.DataDir, "cni"), NetNS: c.NetNS,
	}, c.Log)
}

// Plane is the network of one node. What it makes outlives it, and the next Plane
// with the same folder goes on with it. All methods are safe for concurrent use.
type Plane struct {
	cfg      Config
	log      *slog.Logger
	host     *host.Host
	networks *cni.Networks
	overlay  *overlay.Overlay
	services *balancer
	policies *keeper
	health   *healthcheck.Server
	callers  *announce.Announcer
	metrics  *metrics
	// checking has room for the checks of the network that run; swept is done once what
	// earlier ones left is gone.
	checking chan struct{}
	swept    sync.Once
	key      string // see PublicKey

	mu     sync.Mutex
	render render.Renderer
	want   *render.Table // nil before the first Set
	// self and peers are the nodes of the last Set, valid while want is.
	self  render.Peer
	peers []render.Peer
	// targets are the pods that the table in force sends new connections to, released
	// those that it ceased to within Linger. inForce is closed when another is in force.
	targets  map[types.UID]bool
	released map[types.UID]time.Time
	inForce  chan struct{}
	// checks are what load balancers shall be told, and unchecked why some are not.
	checks    []render.HealthCheck
	unchecked string
	// announced are the addresses of load balancers that this node announces; told is
	// signalled when some came.
	announced []netip.Addr
	told      chan struct{}
	// led is signalled when the kernel was told of nodes.
	led chan struct{}
}

// New opens the kernel's interfaces, and changes nothing yet.
func New(cfg Config) (*Plane, error) {
	cfg = cfg.withDefaults()
	if cfg.DataDir == "" {
		return nil, errors.New("netplane: DataDir is not set")
	}
	if err := cfg.IPVS.Validate(); err != nil {
		return nil, fmt.Errorf("netplane: %w", err)
	}
	wireguard, why, err := cfg.wireguard()
	if err != nil {
		return nil, fmt.Errorf("netplane: %w", err)
	}
	if why != nil {
		cfg.Log.Warn("pod traffic is not encrypted", "err", why)
	}
	cfg.Overlay.WireGuard = wireguard
	p := &Plane{
		key: wireguard.PublicKey(),
		cfg: cfg, log: cfg.Log, host: host.New(cfg.DataDir), networks: cfg.networks(), overlay: overlay.New(cfg.Overlay),
		metrics: newMetrics(cfg.Registerer), told: make(chan struct{}, 1), led: make(chan struct{}, 1), inForce: make(chan struct{}), released: map[types.UID]time.Time{},
		checking: make(chan struct{}, maxChecks),
	}
	if p.services, err = openBalancer(&p.cfg); err != nil {
		return nil, fmt.Errorf("netplane: %w", err)
	}
	p.callers = announce.New(p.host, cfg.Log)
	if p.policies, err = openKeeper(&p.cfg, p.networks); err != nil {
		return nil, errors.Join(fmt.Errorf("netplane: %w", err), p.services.Close())
	}
	p.health = healthcheck.New(healthcheck.Config{Listen: p.listen, Log: cfg.Log})
	return p, nil
}

// Close lets go of the kernel's interfaces, and load balancers are no longer answered;
// everything made stays.
func (p *Plane) Close() error {
	return errors.Join(p.health.Close(), p.services.Close(), p.policies.close())
}

// Set makes the node's network what d asks for. It is idempotent, and does as much
// as it can when part of it does not work; the error says which part, and the next
// Set tries all of it again.
func (p *Plane) Set(ctx context.Context, d Desired) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	table := p.render.Render(d)
	var errs []error
	if p.want == nil || !p.want.SameConfig(table) {
		errs = append(errs, p.prepare(&table))
	}
	self, peers := render.Peers(d)
	if p.want == nil || !p.self.Equal(self) || !slices.EqualFunc(p.peers, peers, render.Peer.Equal) || !slices.Equal(p.want.Cluster, table.Cluster) {
		errs = append(errs, p.lead(self, peers, table.Cluster))
	}
	errs = append(errs, p.policies.set(ctx, d), p.sync(ctx, table))
	if announced := announcedBy(d); p.want == nil || !slices.Equal(p.announced, announced) {
		errs = append(errs, p.call(announced)) // once the services are there
	}
	p.checks = render.HealthChecks(d)
	p.answer(ctx)
	if err := errors.Join(errs...); err != nil {
		p.want = nil // so that the next Set tries all of it
		return fmt.Errorf("set network: %w", err)
	}
	p.want, p.self, p.peers = &table, self, peers
	p.note(render.Targets(d))
	return nil
}

// note remembers which pods the table in force sends new connections to, and which
// ones it just ceased to. The caller holds mu.
func (p *Plane) note(targets map[types.UID]bool) {
	now := time.Now()
	maps.DeleteFunc(p.released, func(_ types.UID, at time.Time) bool { return now.Sub(at) > p.cfg.Linger })
	for uid := range p.targets {
		if !targets[uid] {
			p.released[uid] = now
		}
	}
	p.targets = targets
	close(p.inForce)
	p.inForce = make(chan struct{})
}

// Withdraw waits until no service has sent new connections to the pod for
// Config.Linger; not at all if none did. It returns the cause when ctx ends first.
//
// A pod that is being deleted is no longer ready, whatever its probes say. It may
// stay in the table as the last resort of a service without any other endpoint;
// waiting longer would not change that.
func (p *Plane) Withdraw(ctx context.Context, pod types.UID) error {
	ended := func() error { return fmt.Errorf("withdraw pod %s from services: %w", pod, context.Cause(ctx)) }
	for {
		p.mu.Lock()
		known, target, next := p.targets != nil, p.targets[pod], p.inForce
		linger := time.Until(p.released[pod].Add(p.cfg.Linger))
		p.mu.Unlock()
		var lingered <-chan time.Time
		switch {
		case known && !target && linger <= 0:
			return nil
		case known && !target:
			lingered = time.After(linger)
		}
		select {
		case <-ctx.Done():
			return ended()
		case <-next:
		case <-lingered:
		}
	}
}

// prepare makes the node route, and service addresses local.
func (p *Plane) prepare(t *render.Table) error {
	local := slices.Clone(t.Range)
	for _, l := range t.Local {
		if !slices.ContainsFunc(local, func(r netip.Prefix) bool { return r.Contains(l.Addr) }) {
			local = append(local, netip.PrefixFrom(l.Addr, l.Addr.BitLen()))
		}
	}
	is6 := func(q netip.Prefix) bool { return q.Addr().Is6() }
	is4 := func(q netip.Prefix) bool { return q.Addr().Is4() }
	return netspace.Do(p.cfg.NetNS, func() error {
		return errors.Join(p.host.Forward(slices.ContainsFunc(t.Pods, is4), slices.ContainsFunc(t.Pods, is6)), p.host.Routes(local))
	})
}

// lead makes routes to the pods of other nodes, unless the user's own network does that,
// and gives pods interfaces that fit. All pods are in cluster.
func (p *Plane) lead(self render.Peer, peers []render.Peer, cluster []netip.Prefix) error {
	if len(self.Addrs) == 0 { // this node has not said yet where it is: what is there stays
		have, err := p.networks.PodCIDRs()
		if err != nil || len(have) > 0 {
			return err
		}
		return p.networks.Configure(self.Pods, p.cfg.MTU)
	}
	own, err := p.networks.Own()
	if err != nil {
		return err
	}
	if !own {
		peers, cluster = nil, nil
		if p.key != "" { // it was ours at the start
			p.log.Error("pod traffic is not encrypted", "err", errOwnNetwork)
		}
	}
	var plan overlay.Plan
	err = netspace.Do(p.cfg.NetNS, func() (err error) {
		var n int
		plan, n, err = p.overlay.Sync(self, peers, cluster)
		if n > 0 {
			p.log.Info("routes to other nodes", "nodes", len(peers), "wrapped", len(plan.Peers), "encrypted", plan.Encrypts(), "changes", n)
			select {
			case p.led <- struct{}{}:
			default:
			}
		}
		return err
	})
	if len(plan.Lost) > 0 {
		p.log.Warn("the pods of these nodes cannot be reached: they and this node have no addresses of the same family", "nodes", plan.Lost, "own", self.Addrs)
	}
	if len(plan.Clear) > 0 {
		p.log.Warn("these nodes do not encrypt", "nodes", plan.Clear, "reached", p.cfg.Encryption != EncryptAll)
	}
	mtu := p.cfg.MTU
	if mtu == 0 {
		mtu = plan.MTU
	}
	return errors.Join(err, p.networks.Configure(self.Pods, mtu))
}

func (p *Plane) sync(ctx context.Context, t render.Table) error {
	start := time.Now()
	n, err := p.services.Sync(ctx, t)
	p.metrics.sync.Observe(time.Since(start).Seconds())
	p.metrics.operations.Add(float64(n))
	if err != nil {
		p.metrics.failures.Inc()
		return fmt.Errorf("services: %w", err)
	}
	p.metrics.services.Set(float64(len(t.Services)))
	return nil
}

// Attach connects the pod's network namespace and returns the pod's addresses, the
// primary one first. See cni.Networks.Attach. What network policies say about the pod is
// then in force: nothing in it may run before. It waits for the first Set, but not long.
func (p *Plane) Attach(ctx context.Context, pod *corev1.Pod, netns string) ([]netip.Addr, error) {
	if err := p.policies.await(ctx); err != nil { // which also says where pods get their addresses
		return nil, fmt.Errorf("attach pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	addrs, err := p.networks.Attach(ctx, pod, netns)
	if err != nil {
		return nil, err
	}
	if err := p.policies.attached(ctx, pod, addrs); err != nil {
		return nil, fmt.Errorf("attach pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return addrs, nil
}

// Detach undoes Attach; netns may be gone already. Nothing of the pod may run any more: the
// kernel forgets its connections before others can have its addresses.
func (p *Plane) Detach(ctx context.Context, pod types.UID, netns string) error {
	if _, addrs, err := p.networks.Find(pod); err == nil { // or else it was never attached, or is not any more
		if _, err := flows.Forget(p.cfg.NetNS, addrs...); err != nil {
			p.log.Warn("the next pod with these addresses may get what is left for this one", "pod", pod, "addresses", addrs, "err", err)
		}
	}
	if err := p.networks.Detach(ctx, pod, netns); err != nil {
		return err
	}
	p.policies.detached(pod)
	return nil
}

// Attached lists the pods that hold network resources.
func (p *Plane) Attached(ctx context.Context) ([]types.UID, error) {
	return p.networks.Attached(ctx)
}

// Run repairs what others change, until ctx ends; then it returns the cause. It does
// nothing before the first Set.
func (p *Plane) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { p.watch(ctx) })
	wg.Go(func() { p.collect(ctx) })
	wg.Go(func() { p.tell(ctx) })
	wg.Go(func() { p.meet(ctx) })
	wg.Wait()
	return context.Cause(ctx)
}

// watch compares the kernel with the last Set from time to time.
func (p *Plane) watch(ctx context.Context) {
	tick := time.NewTicker(p.cfg.ReadBack)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := p.Repair(ctx); err != nil && ctx.Err() == nil {
				p.log.Error("network is not as it should be; will try again", "err", err)
			}
		}
	}
}

// meet has handshakes with other nodes begin anew where they came to nothing.
func (p *Plane) meet(ctx context.Context) {
	var due <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.led:
		case <-due:
		}
		var next time.Duration
		p.mu.Lock()
		err := netspace.Do(p.cfg.NetNS, func() (err error) {
			var n int
			if next, n, err = p.overlay.Meet(); n > 0 {
				p.log.Info("handshakes with other nodes began anew", "nodes", n)
			}
			return err
		})
		p.mu.Unlock()
		if err != nil {
			p.log.Error("handshakes with other nodes", "err", err)
		}
		if due = nil; next > 0 {
			due = time.After(next)
		}
	}
}

// collectEvery is the time between two Collects of the pod network; the first one comes
// once the agent has had time to detach the pods that are no more.
const collectEvery = time.Hour

func (p *Plane) collect(ctx context.Context) {
	next := time.NewTimer(p.cfg.ReadBack)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
			if err := p.networks.Collect(ctx); err != nil && ctx.Err() == nil {
				p.log.Warn("pod network", "err", err)
			}
			next.Reset(collectEvery)
		}
	}
}

// Repair compares the kernel with the last Set and repairs what differs. Run calls
// it from time to time. It does nothing before the first Set.
func (p *Plane) Repair(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == nil {
		return nil
	}
	p.answer(ctx)
	if err := errors.Join(p.prepare(p.want), p.lead(p.self, p.peers, p.want.Cluster), p.call(p.announced)); err != nil {
		return err
	}
	if err := p.policies.repair(ctx); err != nil {
		return err
	}
	if _, err := p.services.Read(ctx); err != nil {
		return fmt.Errorf("read services back: %w", err)
	}
	n, err := p.services.Sync(ctx, *p.want)
	if n > 0 {
		p.metrics.drift.Add(float64(n))
		p.log.Warn("somebody changed the service table; repaired", "operations", n)
	}
	if err != nil {
		return fmt.Errorf("services: %w", err)
	}
	return nil
}

// Purge removes everything that this or any earlier Plane with the same folder
// made. It is idempotent, and needs no Set before. Run must have returned.
func (p *Plane) Purge(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.want = nil
	p.checks, p.announced = nil, nil
	p.answer(ctx)
	cidrs, err := p.networks.PodCIDRs()
	errs := []error{err, p.removeCheckEnds(ctx), p.networks.Purge(ctx), p.services.Purge(ctx), p.policies.purge(ctx)}
	errs = append(errs, netspace.Do(p.cfg.NetNS, func() error {
		return errors.Join(p.overlay.Purge(), p.callers.Purge(), p.host.Links(cidrs), p.host.Restore())
	}))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("purge network: %w", err)
	}
	if err := os.RemoveAll(p.cfg.DataDir); err != nil {
		return fmt.Errorf("purge network: %w", err)
	}
	return nil
}
