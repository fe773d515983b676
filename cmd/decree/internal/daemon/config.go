// Package daemon wires the roles of decree: it is the only place that knows all
// rooms. Up runs a server and an agent in one process on one machine.
package daemon

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/validation"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/dns"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/pki"
)

// Config is what `decree up` can be told. Zero values take the defaults of
// [Config.complete].
type Config struct {
	Data    string // data folder
	Run     string // folder for sockets and namespace mounts; must be short
	Address string // host:port of the API
	Node    string // name of this node

	Seed   string // folder whose content becomes the first commit of the built-in repository
	Images string // folder of image archives (*.tar) to import
	Zone   string // the node's zone; empty: it says none

	// Join are servers of the cluster to join, host:port, with Token; none: found one.
	Join  []string
	Token string
	// Advertise is host:port that other machines reach this server at.
	Advertise string
	Site      string // where this machine stands
	NonVoter  bool   // hold everything, never vote
	// Grace is how long a dead server is waited for before it is given up; zero: an
	// hour, negative: for ever.
	Grace time.Duration
	// Heartbeat is how long a server waits for its leader; zero: the store's default.
	Heartbeat time.Duration
	// MasterKey is the file with the key that wraps the keys of everything on disk;
	// empty: one in the data folder.
	MasterKey string
	// Snapshots are those that are taken by themselves.
	Snapshots SnapshotConfig
	// TrustEvery is the time between two looks at which CAs to trust; zero: join's.
	TrustEvery time.Duration
	// CAOverlap is how long two CAs stand beside each other at least when one is
	// replaced, for kubeconfigs that were copied away.
	CAOverlap time.Duration

	NoAgent bool   // control plane only
	Version string // of this build

	Containerd string // socket of an existing containerd; empty: run one under Data

	// ServiceCIDRs and PodCIDRs are where addresses come from, one range of each address
	// family, the primary family first. DNS lies in the first of ServiceCIDRs.
	ServiceCIDRs, PodCIDRs []netip.Prefix
	DNS                    netip.Addr
	Domain                 string
	// NodePorts are the ports that services get on nodes; zero: the store's default.
	NodePorts command.PortRange

	Backend    netplane.Backend // balances services; empty: what the kernel has
	Encryption netplane.Encryption
	IPVS       ipvs.Config // how that backend works
	ResolvConf string      // file with the name servers for names outside the cluster
	DNSStubs   []dns.Stub  // domains with name servers of their own

	Ingress IngressConfig

	Log *slog.Logger
}

// IngressConfig says how a node serves Ingresses.
type IngressConfig struct {
	Off         bool
	HTTP, HTTPS string // host:port; empty: the ports 80 and 443
	AccessLog   string // file that gets a line for every request; empty: none
	// ACMEDirectory is the URL of a CA that certificates are obtained from, ACMEEmail whom
	// it tells about them; with neither of them none are obtained. With an address alone it
	// is Let's Encrypt. ACMERoots is a file with the CAs that its own server is verified
	// with; empty: those of the system.
	ACMEDirectory, ACMEEmail, ACMERoots string
}

// DefaultData is the data folder when neither --data nor DECREE_DATA says else.
const DefaultData = "/var/lib/decree"

// DataFolder returns the data folder that applies when flag is what --data says.
func DataFolder(flag string) string {
	if flag != "" {
		return flag
	}
	if env := os.Getenv("DECREE_DATA"); env != "" {
		return env
	}
	return DefaultData
}

// complete fills in the defaults and checks the rest.
func (c *Config) complete() error {
	abs, err := filepath.Abs(DataFolder(c.Data))
	if err != nil {
		return err
	}
	c.Data = abs
	if c.Run == "" {
		c.Run = filepath.Join(c.Data, "run")
		if c.Data == DefaultData {
			c.Run = "/run/decree"
		}
	}
	if c.Run, err = filepath.Abs(c.Run); err != nil {
		return err
	}
	if len(c.Run) > 60 {
		return fmt.Errorf("run folder %s: longer than 60 characters, too long for unix sockets below it: choose --run", c.Run)
	}
	if c.Address == "" {
		c.Address = "127.0.0.1:7443"
	}
	if _, _, err := net.SplitHostPort(c.Address); err != nil {
		return fmt.Errorf("--address %s: %w (expected host:port)", c.Address, err)
	}
	if c.Node == "" {
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		c.Node = strings.ToLower(host)
	}
	if err := pki.ValidNode(c.Node); err != nil {
		return fmt.Errorf("--node: %w", err)
	}
	if wrong := validation.IsValidLabelValue(c.Zone); len(wrong) > 0 {
		return fmt.Errorf("--zone %q: %s", c.Zone, wrong[0])
	}
	if err := c.completeRanges(); err != nil {
		return err
	}
	if c.Domain == "" {
		c.Domain = "cluster.local"
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// advertise settles where others reach this server, from where it listens.
func (c *Config) advertise(listening string) {
	if c.Advertise != "" {
		return
	}
	c.Advertise = listening
	host, port, err := net.SplitHostPort(listening)
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		c.Advertise = net.JoinHostPort(c.hostIPs()[0].String(), port)
	}
}

// policy says when servers are given up.
func (c *Config) policy() membership.Policy {
	p := membership.DefaultPolicy
	switch {
	case c.Grace > 0:
		p.Grace = c.Grace
	case c.Grace < 0:
		p.Grace = 0
	}
	return p
}

// instance tells this cluster from others on the same machine, which have other data
// folders. It names the containerd namespace and the parent of all pods' cgroups.
func (c *Config) instance() string {
	if c.Data == DefaultData {
		return "decree"
	}
	return fmt.Sprintf("decree-%x", sha256.Sum256([]byte(c.Data)))[:15]
}

// dir returns a folder below the data folder.
func (c *Config) dir(parts ...string) string {
	return filepath.Join(append([]string{c.Data}, parts...)...)
}

// containerdRun and sandboxRun are the folders below Run; whatever else lies there is
// not ours.
func (c *Config) containerdRun() string { return filepath.Join(c.Run, "containerd") }
func (c *Config) sandboxRun() string    { return filepath.Join(c.Run, "sandboxes") }

// Kubeconfig is where `decree up` writes the administrator's credentials.
func Kubeconfig(data string) string { return filepath.Join(data, "admin.kubeconfig") }

// ErrRunning means that another decree uses the data folder.
var ErrRunning = errors.New("already running")

// lockFile is held as long as a decree uses the data folder, and holds its pid.
const lockFile = "decree.pid"

// lock takes the data folder for this process. The kernel drops it when the
// process ends, however it ends.
func lock(data string) (release func(), err error) {
	if err := os.MkdirAll(data, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(data, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("data folder %s: decree is %w (pid %d): decree down stops it, --data names another folder", data, ErrRunning, lockedBy(data))
		}
		return nil, err
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// lockPatience is how long a process that was just killed may take to be gone.
const lockPatience = time.Second

// flock returns syscall.EWOULDBLOCK when another process keeps the lock.
func flock(f *os.File) error {
	for end := time.Now().Add(lockPatience); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
	}
}

// lockedBy returns the pid that last took the data folder, 0 if none is known.
func lockedBy(data string) int {
	b, err := os.ReadFile(filepath.Join(data, lockFile))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return pid
}
