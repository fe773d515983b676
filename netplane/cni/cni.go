// Package cni gives pods their networks: it is a CNI runtime.
//
// The network is the user's own where the user's CNI folder has a configuration.
// Otherwise one is generated for the standard plugins from the node's pod CIDRs.
// Everything it keeps is under one data folder, so that it can be undone by a
// process that knows nothing else.
package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane/netspace"
)

// ErrNotReady matches errors about a network that is not configured yet.
var ErrNotReady = errors.New("pod network is not configured")

// ifName is the pod's interface.
const ifName = "eth0"

// Config says where things are.
type Config struct {
	// UserConfDir is where a user's configuration wins over the generated one, such
	// as /etc/cni/net.d. Empty: there is none.
	UserConfDir string
	// BinDirs are searched for plugins, in order.
	BinDirs []string
	// DataDir is this package's own folder.
	DataDir string
	// NetNS is the node's network namespace; empty: the current one.
	NetNS string
	// Timeout bounds one call of one plugin; zero: 30 seconds.
	Timeout time.Duration
}

func (c *Config) confPath() string { return filepath.Join(c.DataDir, "conf", "10-decree.conflist") }
func (c *Config) cacheDir() string { return filepath.Join(c.DataDir, "cache") }
func (c *Config) allocDir() string { return filepath.Join(c.DataDir, "addresses") }

// Networks attaches pods. All methods are idempotent and safe for concurrent use;
// calls for one pod take turns.
type Networks struct {
	cfg Config
	log *slog.Logger
	cni libcni.CNI

	mu   sync.Mutex
	pods map[types.UID]*turn

	collecting sync.RWMutex // held for writing by Collect
}

type turn struct {
	sync.Mutex
	users int
}

// New returns a runtime; it changes nothing yet.
func New(cfg Config, log *slog.Logger) *Networks {
	if cfg.Timeout == 0 {
		cfg.Timeout = pluginTimeout
	}
	run := &runner{netns: cfg.NetNS, timeout: cfg.Timeout, slots: make(chan struct{}, maxPlugins)}
	return &Networks{
		cfg: cfg, log: log, pods: map[types.UID]*turn{},
		cni: libcni.NewCNIConfigWithCacheDir(cfg.BinDirs, cfg.cacheDir(), run),
	}
}

// lock waits for this pod's turn, and returns what ends it.
func (n *Networks) lock(pod types.UID) func() {
	n.collecting.RLock()
	n.mu.Lock()
	t := n.pods[pod]
	if t == nil {
		t = &turn{}
		n.pods[pod] = t
	}
	t.users++
	n.mu.Unlock()
	t.Lock()
	return func() {
		defer n.collecting.RUnlock()
		t.Unlock()
		n.mu.Lock()
		defer n.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(n.pods, pod)
		}
	}
}

// Attach connects the network namespace at path netns and returns the pod's
// addresses, the primary one first. An attachment that is still true is returned
// as it is; any other is undone and made anew.
func (n *Networks) Attach(ctx context.Context, pod *corev1.Pod, netns string) ([]netip.Addr, error) {
	if err := validUID(pod.UID); err != nil {
		return nil, err
	}
	defer n.lock(pod.UID)()
	limits, err := bandwidth(pod)
	if err != nil {
		return nil, fmt.Errorf("attach pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	list, err := n.network(limits != nil)
	if err != nil {
		return nil, fmt.Errorf("attach pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	addrs, err := n.attach(ctx, list, pod, netns, limits)
	if err != nil {
		return nil, fmt.Errorf("attach pod %s/%s to network %q: %w", pod.Namespace, pod.Name, list.Name, err)
	}
	return addrs, nil
}

func (n *Networks) attach(ctx context.Context, list *libcni.NetworkConfigList, pod *corev1.Pod, netns string, limits map[string]any) ([]netip.Addr, error) {
	if err := netspace.Do(netns, loopbackUp); err != nil {
		return nil, err
	}
	rt := &libcni.RuntimeConf{
		ContainerID: string(pod.UID), NetNS: netns, IfName: ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", pod.Namespace}, {"K8S_POD_NAME", pod.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", string(pod.UID)}, {"K8S_POD_UID", string(pod.UID)},
		},
	}
	if limits != nil {
		rt.CapabilityArgs = map[string]any{"bandwidth": limits}
	}
	have, err := n.cni.GetCachedAttachments(string(pod.UID))
	if err != nil {
		return nil, fmt.Errorf("read attachments: %w", err)
	}
	if len(have) == 1 && have[0].Network == list.Name && have[0].NetNS == netns {
		if addrs, err := n.standing(ctx, list, rt); err == nil {
			return addrs, nil
		} else {
			n.log.Info("pod attachment is not true any more", "pod", pod.Namespace+"/"+pod.Name, "err", err)
		}
	}
	if len(have) > 0 {
		if err := n.detach(ctx, pod.UID, netns); err != nil {
			return nil, err
		}
	}
	if err := n.cni.GetStatusNetworkList(ctx, list); err != nil {
		return nil, fmt.Errorf("the network cannot take pods now: %w", err)
	}
	addrs, err := n.add(ctx, list, rt)
	if err == nil || ctx.Err() != nil || isTryAgain(err) {
		return addrs, err
	}
	// What an interrupted attempt left is in the way: without a record, all that can
	// be done is to undo it blindly.
	if derr := n.cni.DelNetworkList(ctx, list, rt); derr != nil {
		return nil, errors.Join(err, derr)
	}
	return n.add(ctx, list, rt)
}

func (n *Networks) add(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) ([]netip.Addr, error) {
	r, err := n.cni.AddNetworkList(ctx, list, rt)
	if err != nil {
		return nil, err
	}
	addrs, err := addresses(r)
	if err != nil {
		return nil, errors.Join(err, n.cni.DelNetworkList(ctx, list, rt))
	}
	return addrs, nil
}

// standing returns the addresses of an attachment that its plugins confirm.
func (n *Networks) standing(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) ([]netip.Addr, error) {
	r, err := n.cni.GetNetworkListCachedResult(list, rt)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, errors.New("its result is gone")
	}
	addrs, err := addresses(r)
	if err != nil {
		return nil, err
	}
	return addrs, n.cni.CheckNetworkList(ctx, list, rt)
}

// Detach undoes Attach; netns may be gone already, or empty.
func (n *Networks) Detach(ctx context.Context, pod types.UID, netns string) error {
	if err := validUID(pod); err != nil {
		return err
	}
	defer n.lock(pod)()
	if err := n.detach(ctx, pod, netns); err != nil {
		return fmt.Errorf("detach pod %s: %w", pod, err)
	}
	return nil
}

func (n *Networks) detach(ctx context.Context, pod types.UID, netns string) error {
	have, err := n.cni.GetCachedAttachments(string(pod))
	if err != nil {
		return fmt.Errorf("read attachments: %w", err)
	}
	for _, a := range have {
		list, err := recordedConf(a.Config)
		if err != nil {
			return fmt.Errorf("recorded configuration of network %q: %w", a.Network, err)
		}
		rt := &libcni.RuntimeConf{ContainerID: a.ContainerID, NetNS: existing(netns, a.NetNS), IfName: a.IfName, Args: a.CniArgs, CapabilityArgs: a.CapabilityArgs}
		if err := n.cni.DelNetworkList(ctx, list, rt); err != nil {
			return err
		}
	}
	if len(have) > 0 {
		return nil
	}
	// An address without a record is from an attempt that was interrupted.
	if held, err := n.allocated(); err != nil || !slices.Contains(held, pod) {
		return err
	}
	b, err := os.ReadFile(n.cfg.confPath())
	if err != nil {
		return fmt.Errorf("read cni configuration: %w", err)
	}
	list, err := parseConf(b, true)
	if err == nil {
		list, err = limited(list) // it may have had limits
	}
	if err != nil {
		return fmt.Errorf("cni configuration %s: %w", n.cfg.confPath(), err)
	}
	return n.cni.DelNetworkList(ctx, list, &libcni.RuntimeConf{ContainerID: string(pod), NetNS: existing(netns), IfName: ifName})
}

// recordedConf reads what libcni recorded: a list, or one plugin made a list.
func recordedConf(b []byte) (*libcni.NetworkConfigList, error) {
	list, err := parseConf(b, true)
	if err != nil {
		return parseConf(b, false)
	}
	return list, nil
}

// existing returns the first path that exists, or "", which tells plugins that the
// namespace is gone.
func existing(paths ...string) string {
	for _, p := range paths {
		if p == "" {
			continue
		}
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}

// Attached lists the pods that hold network resources, also those whose attachment
// was interrupted, in order.
func (n *Networks) Attached(context.Context) ([]types.UID, error) {
	have, err := n.cni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("read attachments: %w", err)
	}
	uids, err := n.allocated()
	if err != nil {
		return nil, err
	}
	for _, a := range have {
		uids = append(uids, types.UID(a.ContainerID))
	}
	slices.Sort(uids)
	return slices.Compact(uids), nil
}

// Addresses returns those of all pods that an Attach, of any process, connected. The error
// is about those of which it could not be found out.
func (n *Networks) Addresses(context.Context) (map[types.UID][]netip.Addr, error) {
	have, err := n.cni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("read attachments: %w", err)
	}
	out := map[types.UID][]netip.Addr{}
	var errs []error
	for _, a := range have {
		addrs, err := n.recorded(a)
		if err != nil {
			errs = append(errs, fmt.Errorf("recorded addresses of pod %s in network %q: %w", a.ContainerID, a.Network, err))
			continue
		}
		out[types.UID(a.ContainerID)] = append(out[types.UID(a.ContainerID)], addrs...)
	}
	return out, errors.Join(errs...)
}

// Find returns the network namespace of a pod that is attached, and its addresses, the primary
// one first.
func (n *Networks) Find(pod types.UID) (netns string, addrs []netip.Addr, err error) {
	if err := validUID(pod); err != nil {
		return "", nil, err
	}
	have, err := n.cni.GetCachedAttachments(string(pod))
	if err != nil {
		return "", nil, fmt.Errorf("read attachments: %w", err)
	}
	if len(have) == 0 {
		return "", nil, fmt.Errorf("pod %s is not attached to the network", pod)
	}
	addrs, err = n.recorded(have[0])
	if err != nil {
		return "", nil, fmt.Errorf("recorded addresses of pod %s: %w", pod, err)
	}
	return have[0].NetNS, addrs, nil
}

// recorded returns the addresses that an attachment got.
func (n *Networks) recorded(a *libcni.NetworkAttachment) ([]netip.Addr, error) {
	list, err := recordedConf(a.Config)
	if err != nil {
		return nil, err
	}
	r, err := n.cni.GetNetworkListCachedResult(list, &libcni.RuntimeConf{ContainerID: a.ContainerID, NetNS: a.NetNS, IfName: a.IfName})
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, os.ErrNotExist
	}
	return addresses(r)
}

// allocated returns the pods that hold an address of the generated network:
// host-local keeps a file for each, named by address, with the holder in it.
func (n *Networks) allocated() ([]types.UID, error) {
	dir := filepath.Join(n.cfg.allocDir(), networkName)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list allocated addresses: %w", err)
	}
	var uids []types.UID
	for _, e := range entries {
		if _, err := netip.ParseAddr(strings.ReplaceAll(e.Name(), "_", ":")); err != nil {
			continue // its lock and its cursors
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read allocated address: %w", err)
		}
		holder, _, _ := strings.Cut(string(b), "\n")
		if uid := types.UID(strings.TrimSpace(holder)); validUID(uid) == nil {
			uids = append(uids, uid)
		}
	}
	return uids, nil
}

// Collect tells the plugins of the configuration in force which pods are attached, so
// that they let go of all else (GC, since CNI 1.1; older plugins are not asked). No pod
// is attached meanwhile.
func (n *Networks) Collect(ctx context.Context) error {
	n.collecting.Lock()
	defer n.collecting.Unlock()
	list, err := n.network(false)
	if errors.Is(err, ErrNotReady) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("collect unused network resources: %w", err)
	}
	have, err := n.cni.GetCachedAttachments("")
	if err != nil {
		return fmt.Errorf("read attachments: %w", err)
	}
	valid := []cnitypes.GCAttachment{}
	for _, a := range have {
		if a.Network == list.Name {
			valid = append(valid, cnitypes.GCAttachment{ContainerID: a.ContainerID, IfName: a.IfName})
		}
	}
	if err := n.cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		return fmt.Errorf("collect unused resources of network %q: %w", list.Name, err)
	}
	return nil
}

// Purge detaches every pod and removes the data folder. What a plugin does not let
// go of is an error, and stays for the next Purge.
func (n *Networks) Purge(ctx context.Context) error {
	uids, err := n.Attached(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, uid := range uids {
		errs = append(errs, n.Detach(ctx, uid, ""))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.RemoveAll(n.cfg.DataDir); err != nil {
		return fmt.Errorf("remove cni data: %w", err)
	}
	return nil
}

// validUID refuses what must not become part of a file name or a plugin's
// environment.
func validUID(uid types.UID) error {
	ok := len(uid) > 0 && len(uid) <= 128
	for i := 0; ok && i < len(uid); i++ {
		c := uid[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		ok = alnum || i > 0 && (c == '-' || c == '_' || c == '.')
	}
	if !ok {
		return fmt.Errorf("pod uid %q: want 1 to 128 letters, digits, dots, dashes and underscores, beginning with a letter or digit", uid)
	}
	return nil
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	return nil
}
