package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/front"
	"decree.dev/decree/netplane/render"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/raftstore/tunnel"
	"decree.dev/decree/reconciler"
	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/containerd"
	"decree.dev/decree/schemas/api"
)

// node is the agent in this process, with its runtime and network.
type node struct {
	cfg        *Config
	supervisor *containerd.Supervisor // nil with an existing containerd
	runtime    *containerd.Runtime
	plane      *netplane.Plane
	front      *front.Keeper
	agent      *agent.Agent
	mirror     *client.Mirror
	peers      *peers
	changed    fanout
}

// fanout passes the mirror's signal on to the agent and to the network, once the
// mirror may be relied on.
type fanout struct {
	agent, network chan struct{}
	usable         chan struct{}
}

// stalePatience is how long a starting node waits for a server before it goes by
// what an earlier process has kept. The kernel's tables and the containers are newer
// than that, and do without for a while.
const stalePatience = 3 * time.Second

func (f *fanout) run(ctx context.Context, m *client.Mirror) error {
	patience := time.NewTimer(stalePatience)
	defer patience.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-m.Current():
	case <-patience.C:
		select {
		case <-ctx.Done():
			return nil
		case <-m.Synced():
		}
	}
	close(f.usable)
	in := make(chan struct{}, 1)
	in <- struct{}{} // all that is there now
	return f.forward(ctx, in, m.Changed())
}

func (f *fanout) forward(ctx context.Context, first, in <-chan struct{}) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-first:
		case <-in:
		}
		for _, out := range []chan struct{}{f.agent, f.network} {
			select {
			case out <- struct{}{}:
			default: // a signal waits there already
			}
		}
	}
}

// controlPlane is the mirror as the agent sees it: with a signal of its own, without
// a view that may be out of date for no need, and synced only by a server.
type controlPlane struct {
	*client.Mirror
	changed, usable <-chan struct{}
}

func (c controlPlane) Changed() <-chan struct{} { return c.changed }
func (c controlPlane) Synced() <-chan struct{}  { return c.Current() }

func (c controlPlane) View() api.Reader {
	select {
	case <-c.usable:
		return c.Mirror.View()
	default:
		return nil
	}
}

// supervision says where the containerd of a node lives.
func (c *Config) supervision() containerd.SupervisorConfig {
	return containerd.SupervisorConfig{Dir: c.dir("containerd"), RunDir: c.containerdRun(), Logger: c.Log.With("part", "containerd")}
}

// network says what the network of a node is made of.
func (c *Config) network(metrics prometheus.Registerer) netplane.Config {
	return netplane.Config{
		DataDir: c.dir("network"), CNIConfDir: "/etc/cni/net.d", Backend: c.Backend, IPVS: c.IPVS, Encryption: c.Encryption,
		Log: c.Log.With("part", "network"), Registerer: metrics,
	}
}

// openRuntime connects to containerd, starting it if it is ours.
func openRuntime(ctx context.Context, cfg *Config) (*containerd.Runtime, *containerd.Supervisor, error) {
	var sup *containerd.Supervisor
	address := cfg.Containerd
	if address == "" {
		var err error
		if sup, err = containerd.Supervise(ctx, cfg.supervision()); err != nil {
			return nil, nil, err
		}
		if err := sup.WaitReady(ctx); err != nil {
			return nil, nil, err
		}
		address = sup.Address()
	}
	rt, err := containerd.New(containerd.Config{
		Address: address, Dir: cfg.dir("runtime"), RunDir: cfg.sandboxRun(),
		Namespace: cfg.instance(), CgroupParent: "/" + cfg.instance(), Logger: cfg.Log.With("part", "runtime"),
	})
	return rt, sup, err
}

// controlPlaneAt is where and as whom a node speaks to the control plane.
type controlPlaneAt struct {
	url    string          // of the server to ask first
	others func() []string // host:port of all that are known
	keeper *pki.Keeper
}

// newNode opens runtime and network. The control plane need not answer.
func newNode(ctx context.Context, cfg *Config, at controlPlaneAt, metrics prometheus.Registerer) (_ *node, err error) {
	n := &node{cfg: cfg, changed: fanout{make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})}}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if n.runtime, n.supervisor, err = openRuntime(ctx, cfg); err != nil {
		return nil, err
	}
	if n.plane, err = netplane.New(cfg.network(metrics)); err != nil {
		return nil, err
	}
	if n.front, err = newFront(cfg); err != nil {
		return nil, err
	}
	if n.mirror, err = newMirror(cfg, at, client.NodeSelections(cfg.Node), "view"); err != nil {
		return nil, err
	}
	if n.peers, err = newPeers(cfg, at); err != nil {
		return nil, err
	}
	n.agent, err = agent.New(agent.Config{
		Node: cfg.Node, Runtime: n.runtime, Network: n.plane, ControlPlane: controlPlane{n.mirror, n.changed.agent, n.changed.usable}, Dir: cfg.dir("agent"), Labels: cfg.labels(),
		HostIPs: cfg.hostIPs(), ClusterDNS: cfg.DNS, ClusterDomain: cfg.Domain, Version: cfg.Version,
		Annotations: map[string]string{api.AnnotationWireGuard: n.plane.PublicKey(), api.AnnotationNetworks: cfg.networks()},
		Logger:      cfg.Log.With("part", "agent"), Registerer: metrics,
	})
	return n, err
}

// labels are those of this machine's node that follow from what the operator chose.
func (c *Config) labels() map[string]string {
	l := map[string]string{api.LabelIngressNode: strconv.FormatBool(!c.Ingress.Off)}
	if c.Zone != "" {
		l[corev1.LabelTopologyZone] = c.Zone
	}
	return l
}

// newMirror makes a local copy of some of the state, kept in a folder.
func newMirror(cfg *Config, at controlPlaneAt, selections []client.Selection, dir string) (*client.Mirror, error) {
	c, err := client.New(client.Config{Server: at.url, Others: at.others, TLS: at.keeper.ClientTLS(), Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	return client.NewMirror(client.MirrorConfig{
		Client: c, Node: cfg.Node, Select: selections, Cache: cfg.dir(dir), Log: cfg.Log.With("part", dir),
	})
}

// run works until ctx ends; containers and services are left as they are.
func (n *node) run(start func(name string, f func(context.Context) error)) {
	start("mirror", n.mirror.Run)
	start("signals", func(ctx context.Context) error { return n.changed.run(ctx, n.mirror) })
	start("network", n.plane.Run)
	start("peers", func(ctx context.Context) error { return n.peers.run(ctx, n.changed.network) })
	start("services", n.follow)
	start("servers", n.front.Run)
	start("agent", n.agent.Run)
}

// follow hands the desired network to the kernel whenever the local copy changes.
func (n *node) follow(ctx context.Context) error {
	select {
	case <-n.changed.usable:
	case <-ctx.Done():
		return nil
	}
	loop := &reconciler.Loop{
		Name: "services", Changed: n.changed.network, Resync: time.Minute, Timeout: 30 * time.Second,
		Backoff: reconciler.Backoff{Min: 50 * time.Millisecond, Max: 10 * time.Second},
		Logger:  n.cfg.Log.With("part", "network"),
		Once: func(ctx context.Context) error {
			view := n.mirror.View()
			d := n.desired(view)
			served := frontObjects(view, d)
			var errs []error
			if n.front.Up() { // before the agent goes by what the plane leads to
				errs = append(errs, n.front.Set(ctx, served))
			} else { // nobody is led anywhere, and pods shall not wait for it
				n.front.Offer(served)
			}
			d.Pods = n.peers.pods(ctx, &d)
			errs = append(errs, n.plane.Set(ctx, d))
			return errors.Join(errs...)
		},
	}
	return loop.Run(ctx)
}

// desired is the network that a view asks of this node.
func (n *node) desired(view api.Reader) netplane.Desired {
	d := netplane.Desired{
		Node: n.cfg.Node, ClusterCIDR: n.cfg.PodCIDRs, ServiceCIDR: n.cfg.ServiceCIDRs,
		DNS: n.cfg.DNS, Domain: n.cfg.Domain,
		Services: slices.Collect(api.List[*corev1.Service](view, "")),
		Slices:   slices.Collect(api.List[*discoveryv1.EndpointSlice](view, "")),
		Nodes:    slices.Collect(api.List[*corev1.Node](view, "")),
		Policies: slices.Collect(api.List[*networkingv1.NetworkPolicy](view, "")), Namespaces: slices.Collect(api.List[*corev1.Namespace](view, "")),
		Pods: slices.Collect(api.List[*corev1.Pod](view, "")),
	}
	d.Announced = render.Balanced(d.Services)
	for _, node := range d.Nodes {
		if node.Name != n.cfg.Node {
			continue
		}
		for _, cidr := range node.Spec.PodCIDRs {
			if p, err := netip.ParsePrefix(cidr); err == nil {
				d.PodCIDRs = append(d.PodCIDRs, p)
			}
		}
	}
	return d
}

// tunnel keeps the node's containers, and what it gathers of metrics, within reach of all
// servers.
func (n *node) tunnel(servers func() []string, keeper *pki.Keeper, metrics prometheus.Gatherer) func(context.Context) error {
	local := &nodes{node: n.cfg.Node, metrics: exposed(metrics, n.cfg.Log.With("part", "metrics"))}
	local.agent.Store(n.agent)
	a := &tunnel.Agent{
		Node: n.cfg.Node, Servers: servers, Local: local, Log: n.cfg.Log.With("part", "tunnel"),
		Streams: map[string]func(context.Context, io.ReadWriter) error{netcheckStream: n.plane.Check},
		TLS:     func() *tls.Config { return pki.RequireGroup(keeper.ClientTLS(), pki.GroupServers) },
	}
	return a.Run
}

// importImages loads the archives of the images folder.
func (n *node) importImages(ctx context.Context) error {
	if n.cfg.Images == "" {
		return nil
	}
	archives, err := filepath.Glob(filepath.Join(n.cfg.Images, "*.tar"))
	if err != nil {
		return fmt.Errorf("--images: %w", err)
	}
	for _, path := range archives {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("--images: %w", err)
		}
		names, err := n.runtime.ImportImage(ctx, f)
		f.Close()
		if err != nil {
			return fmt.Errorf("--images %s: %w", path, err)
		}
		n.cfg.Log.Info("image imported", "archive", path, "names", names)
	}
	return nil
}

func (n *node) close() {
	if n.plane != nil {
		n.plane.Close()
	}
	if n.front != nil {
		n.front.Close()
	}
	if n.runtime != nil {
		n.runtime.Close()
	}
	if n.supervisor != nil {
		n.supervisor.Close()
	}
}

// nodes gives the API server the containers and metrics of this process's node, and
// those of others through their tunnels.
type nodes struct {
	node      string
	metrics   http.Handler // of this process
	agent     atomic.Pointer[agent.Agent]
	plane     atomic.Pointer[netplane.Plane]
	elsewhere *tunnel.Server // nil: there are no others
}

// remote returns where the containers of a node are reached if not here.
func (n *nodes) remote(node string) *tunnel.Server {
	if node == n.node && n.agent.Load() != nil {
		return nil
	}
	return n.elsewhere
}

var errNoAgent = errors.New("the agent of this node is not running yet")

func (n *nodes) Logs(ctx context.Context, node string, pod *corev1.Pod, opts *corev1.PodLogOptions, w io.Writer) error {
	if r := n.remote(node); r != nil {
		return told(r.Logs(ctx, node, pod, opts, w))
	}
	a := n.agent.Load()
	if a == nil {
		return errNoAgent
	}
	o := agent.LogOptions{Follow: opts.Follow, Previous: opts.Previous, Timestamps: opts.Timestamps, TailLines: -1}
	if opts.TailLines != nil {
		o.TailLines = *opts.TailLines
	}
	if opts.LimitBytes != nil {
		o.LimitBytes = *opts.LimitBytes
	}
	if opts.SinceTime != nil {
		o.Since = opts.SinceTime.Time
	} else if opts.SinceSeconds != nil {
		o.Since = time.Now().Add(-time.Duration(*opts.SinceSeconds) * time.Second)
	}
	return answer(a.Logs(ctx, pod.Namespace, pod.Name, opts.Container, o, w))
}

// answer makes what the agent does not have, such as the log of a container that was
// never restarted, a mistake of the request and not of the server.
func answer(err error) error {
	if errors.Is(err, agent.ErrNotFound) {
		return apierrors.NewBadRequest(err.Error())
	}
	return err
}

// told makes what another node refuses an answer of the API.
func told(err error) error {
	refused, ok := errors.AsType[*tunnel.Refused](err)
	switch {
	case errors.Is(err, tunnel.ErrNoAgent):
		return apierrors.NewServiceUnavailable(err.Error())
	case ok && refused.Code == http.StatusBadRequest:
		return apierrors.NewBadRequest(refused.Text)
	case ok && refused.Code == http.StatusServiceUnavailable:
		return apierrors.NewServiceUnavailable(refused.Text)
	}
	return err
}

func (n *nodes) Exec(ctx context.Context, node string, pod *corev1.Pod, e apiserver.ExecStreams) (int, error) {
	if r := n.remote(node); r != nil {
		code, err := r.Exec(ctx, node, pod, e)
		return code, told(err)
	}
	a := n.agent.Load()
	if a == nil {
		return 0, errNoAgent
	}
	cfg := agent.ExecConfig{Command: e.Command, TTY: e.TTY, Stdin: e.Stdin, Stdout: e.Stdout, Stderr: e.Stderr}
	if e.Resize != nil {
		sizes := make(chan agent.TerminalSize)
		cfg.Resize = sizes
		go func() {
			defer close(sizes)
			for size := range e.Resize {
				select {
				case sizes <- agent.TerminalSize(size):
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	code, err := a.Exec(ctx, pod.Namespace, pod.Name, e.Container, cfg)
	return code, answer(err)
}

// hostIPs are this machine's own addresses, loopback if there is no other.
func hostIPs(cluster ...netip.Prefix) []netip.Addr {
	var list []netip.Addr
	for _, p := range hostPrefixes(cluster...) {
		list = append(list, p.Addr())
	}
	if len(list) == 0 {
		list = append(list, netip.MustParseAddr("127.0.0.1"))
	}
	return list
}

// hostPrefixes are this machine's own addresses with the networks that they are of. The node's
// ends of pod links, which a restarted agent finds, lie within cluster and are no addresses of
// the machine.
func hostPrefixes(cluster ...netip.Prefix) (list []netip.Prefix) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		ours := slices.ContainsFunc(cluster, func(c netip.Prefix) bool { return c.Contains(p.Addr().Unmap()) })
		if err == nil && p.Addr().IsGlobalUnicast() && !ours {
			list = append(list, p)
		}
	}
	return list
}

// networkList is the text of the networks that addresses are of; those that are alone in theirs
// share it with nobody.
func networkList(addrs []netip.Prefix) string {
	var texts []string
	for _, p := range addrs {
		if text := p.Masked().String(); !p.IsSingleIP() && !slices.Contains(texts, text) {
			texts = append(texts, text)
		}
	}
	slices.Sort(texts)
	return strings.Join(texts, ",")
}

// Doctor checks what the network of a node with the default configuration needs.
func Doctor() []netplane.Check {
	var cfg Config
	if err := cfg.complete(); err != nil {
		return []netplane.Check{{Requirement: "configuration", Why: err.Error()}}
	}
	return netplane.Doctor(cfg.network(nil))
}
