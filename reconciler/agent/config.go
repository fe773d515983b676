package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent/volume"
)

// Config says what an [Agent] works with. Node, Runtime, Network, ControlPlane and
// Dir are required.
type Config struct {
	Node         string // name of the Node object
	Runtime      Runtime
	Network      Network
	ControlPlane ControlPlane
	// Dir holds one folder per pod for volumes and generated files. It must lie on
	// a disk file system and be the agent's own.
	Dir string

	// HostIPs are the node's addresses, the primary one first.
	HostIPs []netip.Addr
	// ClusterDNS is the address of the cluster's DNS server; not valid: none.
	ClusterDNS    netip.Addr
	ClusterDomain string // "cluster.local"
	// ResolvConf is the node's own; "/etc/resolv.conf" when empty.
	ResolvConf string

	// Labels are put on the Node object besides the well-known ones.
	Labels map[string]string
	// Annotations are put on the Node object; those that are empty are taken off.
	Annotations map[string]string
	// Capacity replaces measured values by name (cpu, memory, …).
	Capacity corev1.ResourceList
	MaxPods  int64 // 110 when zero
	// Heartbeat is the interval of node reports without changes; 10 s when zero.
	Heartbeat time.Duration
	// Pulls and Starts bound what happens at once; 4 and 8 when zero.
	Pulls, Starts int
	Version       string // of Decree, for nodeInfo

	// Mounter is the running kernel when nil, Dial a net.Dialer.
	Mounter volume.Mounter
	Dial    func(ctx context.Context, network, address string) (net.Conn, error)

	Logger     *slog.Logger          // slog.Default() when nil
	Registerer prometheus.Registerer // nil: metrics are not exported
}

// complete checks the required fields and fills the rest.
func (c *Config) complete() error {
	switch {
	case c.Node == "":
		return errors.New("agent: no node name")
	case c.Runtime == nil, c.Network == nil, c.ControlPlane == nil:
		return errors.New("agent: Runtime, Network and ControlPlane are required")
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("agent: folder %q: must be absolute", c.Dir)
	}
	if err := os.MkdirAll(filepath.Join(c.Dir, "pods"), 0o711); err != nil {
		return fmt.Errorf("agent: make folder: %w", err)
	}
	c.ResolvConf = cmp.Or(c.ResolvConf, "/etc/resolv.conf")
	c.MaxPods = cmp.Or(c.MaxPods, 110)
	c.Heartbeat = cmp.Or(c.Heartbeat, 10*time.Second)
	c.Pulls, c.Starts = cmp.Or(c.Pulls, 4), cmp.Or(c.Starts, 8)
	if c.Mounter == nil {
		c.Mounter = volume.Kernel{}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return nil
}
