// Package front is what a node serves by itself: cluster DNS and Ingresses. It runs in a
// process of its own that outlives the agent, as containers do: who asks notices neither a
// restart of the agent nor a new version of it.
//
// [Servers] are the servers, in whatever process. [Main] is their own process, and [Keeper]
// the agent's hold on it: it starts or adopts the process, tells it what to serve, and has it
// replaced when the program or the configuration is another one. DESIGN.md says how.
package front

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/netplane/dns"
	"decree.dev/decree/netplane/ingress"
	"decree.dev/decree/netplane/ingress/route"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/render"
)

// Objects are what is served. They are shared and never modified.
type Objects = route.Objects

// Config says how to serve.
type Config struct {
	// ResolvConf lists the name servers for all names outside the cluster; empty:
	// /etc/resolv.conf.
	ResolvConf string
	// Stubs are domains with name servers of their own.
	Stubs []dns.Stub
	// Ingress; nil: Ingresses are not served.
	Ingress *Ingress
	// NetNS is the network namespace to serve in; empty: that of the process.
	NetNS string
	// Level is the least level of what is logged.
	Level slog.Level
}

// Ingress says how Ingresses are served.
type Ingress struct {
	HTTP, HTTPS string // host:port; empty: ":80" and ":443"
	AccessLog   string // file that gets a line for every request; empty: none
	// ACMEDirectory is the URL of a CA that certificates are obtained from, ACMEEmail whom
	// it tells about them; with neither of them none are obtained. With an address alone it
	// is Let's Encrypt. ACMERoots are the CAs that its own server is verified with, in PEM;
	// empty: those of the system. ACMEDir is the folder of what is obtained.
	ACMEDirectory, ACMEEmail, ACMERoots, ACMEDir string
}

// drain is how long requests of a process may take that has a successor.
const drain = 5 * time.Minute

// Servers are the servers. All methods are safe for concurrent use.
type Servers struct {
	cfg     Config
	sockets *Sockets
	log     *slog.Logger
	names   *dns.Server
	proxy   *ingress.Server // nil: Ingresses are not served
	access  io.Closer       // nil: there is no access log

	mu      sync.Mutex
	address netip.Addr    // where DNS shall be
	moved   chan struct{} // holds one signal: it is another one
}

// New returns servers that have nothing to serve yet, and open no port before Run. Metrics
// may be nil; sockets are closed with the servers.
func New(cfg Config, sockets *Sockets, metrics prometheus.Registerer, log *slog.Logger) (*Servers, error) {
	if cfg.ResolvConf == "" {
		cfg.ResolvConf = "/etc/resolv.conf"
	}
	s := &Servers{cfg: cfg, sockets: sockets, log: log, moved: make(chan struct{}, 1)}
	s.names = dns.New(dns.Config{
		ResolvConf: cfg.ResolvConf, Stubs: cfg.Stubs, Dial: s.dial, Registerer: metrics, Log: log.With("part", "dns"),
	})
	if cfg.Ingress == nil {
		return s, nil
	}
	in := *cfg.Ingress
	in.HTTP, in.HTTPS = cmp.Or(in.HTTP, ":80"), cmp.Or(in.HTTPS, ":443")
	s.cfg.Ingress = &in
	proxy, access, err := in.config()
	if err != nil {
		return nil, err
	}
	proxy.Listen, proxy.ListenPacket, proxy.Dial = sockets.ListenHere, s.listenQUIC, s.dial
	proxy.Registerer, proxy.Log, proxy.Drain = metrics, log.With("part", "ingress"), drain
	if s.proxy, err = ingress.New(proxy); err != nil {
		if access != nil {
			access.Close()
		}
		return nil, err
	}
	s.access = access
	return s, nil
}

// Validate reports what New would fail on.
func (c *Ingress) Validate() error {
	cfg, access, err := c.config()
	if access != nil {
		access.Close()
	}
	if err == nil {
		_, err = ingress.New(cfg)
	}
	return err
}

// config opens the access log.
func (c *Ingress) config() (cfg ingress.Config, access io.Closer, err error) {
	cfg = ingress.Config{HTTP: c.HTTP, HTTPS: c.HTTPS}
	if c.ACMEDirectory != "" || c.ACMEEmail != "" {
		cfg.ACME = &ingress.ACME{Directory: c.ACMEDirectory, Email: c.ACMEEmail, Dir: c.ACMEDir}
		if c.ACMERoots != "" {
			cfg.ACME.Roots = x509.NewCertPool()
			if !cfg.ACME.Roots.AppendCertsFromPEM([]byte(c.ACMERoots)) {
				return cfg, nil, errors.New("CAs of the ACME server: there is no certificate in PEM")
			}
		}
	}
	if c.AccessLog != "" {
		f, err := os.OpenFile(c.AccessLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			return cfg, nil, fmt.Errorf("access log of Ingresses: %w", err)
		}
		cfg.AccessLog, access = f, f
	}
	return cfg, access, nil
}

// Set makes o what is served. When it returns, no request is led to an endpoint that o does
// not have.
func (s *Servers) Set(o Objects) {
	if s.proxy != nil {
		s.proxy.Set(o)
	}
	s.names.Set(o.Desired)
	s.sockets.drop(s.wanted(&o)) // or clients would wait at a port of the predecessor that nobody serves
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.address != o.DNS {
		s.address = o.DNS
		select {
		case s.moved <- struct{}{}:
		default:
		}
	}
}

// Run serves until ctx ends, and returns when what was under way then has ended, too.
func (s *Servers) Run(ctx context.Context) {
	var all sync.WaitGroup
	all.Go(func() { s.serveDNS(ctx) })
	if s.proxy != nil {
		all.Go(func() { _ = s.proxy.Run(ctx) }) // it always ends with ctx
	}
	all.Wait()
	if s.access != nil {
		s.access.Close()
	}
}

// wanted are the sockets that o asks for, which is set.
func (s *Servers) wanted(o *Objects) []string {
	at := netip.AddrPortFrom(o.DNS, render.DNSPort).String()
	keys := []string{socketKey("udp", at), socketKey("tcp", at)}
	if in := s.cfg.Ingress; in != nil && s.proxy.Wanted() {
		keys = append(keys, socketKey("tcp", in.HTTP), socketKey("tcp", in.HTTPS))
	}
	return keys
}

// listenQUIC opens a port that is not handed over: packets do not tell which process knows
// their connection.
func (s *Servers) listenQUIC(ctx context.Context, network, address string) (conn net.PacketConn, err error) {
	err = netspace.Do(s.cfg.NetNS, func() error {
		conn, err = (&net.ListenConfig{}).ListenPacket(ctx, network, address)
		return err
	})
	return conn, err
}

// dial opens a connection from the node.
func (s *Servers) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = netspace.Do(s.cfg.NetNS, func() error {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// errMoved ends a server whose address changed.
var errMoved = errors.New("cluster DNS has another address")

// serveDNS keeps a server on the cluster DNS address, whatever that is at a time.
func (s *Servers) serveDNS(ctx context.Context) {
	const first, longest = 100 * time.Millisecond, 10 * time.Second
	retry := first
	for ctx.Err() == nil {
		s.mu.Lock()
		addr := s.address
		select {
		case <-s.moved: // this is about to be served
		default:
		}
		s.mu.Unlock()
		var again <-chan time.Time
		if addr.IsValid() {
			start := time.Now()
			err := s.serveAt(ctx, addr)
			if ctx.Err() != nil {
				return
			}
			if errors.Is(err, errMoved) {
				retry = first
				continue
			}
			s.log.Error("cluster DNS does not answer; will try again", "address", addr, "in", retry, "err", err)
			if time.Since(start) > longest {
				retry = first
			}
			again = time.After(retry)
			retry = min(2*retry, longest)
		}
		select {
		case <-ctx.Done():
		case <-s.moved:
		case <-again:
		}
	}
}

// serveAt serves until ctx ends, the address changes or a socket fails.
func (s *Servers) serveAt(ctx context.Context, addr netip.Addr) error {
	at := netip.AddrPortFrom(addr, render.DNSPort).String()
	pc, err := s.sockets.ListenPacket(ctx, "udp", at)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	ln, err := s.sockets.Listen(ctx, "tcp", at)
	if err != nil {
		return errors.Join(fmt.Errorf("listen: %w", err), pc.Close())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan error, 1)
	go func() { ended <- s.names.Serve(ctx, pc, ln) }()
	s.log.Info("cluster DNS answers", "address", at)
	select {
	case err = <-ended:
		return err
	case <-s.moved:
		cancel(errMoved)
	case <-ctx.Done():
	}
	return <-ended
}
