package netplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/render"
)

// dial opens a connection from the node.
func (p *Plane) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = netspace.Do(p.cfg.NetNS, func() error {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// listen opens a port on all addresses of the node.
func (p *Plane) listen(ctx context.Context, port uint16) (ln net.Listener, err error) {
	err = netspace.Do(p.cfg.NetNS, func() error {
		ln, err = (&net.ListenConfig{}).Listen(ctx, "tcp", fmt.Sprintf(":%d", port))
		return err
	})
	return ln, err
}

// answer tells load balancers how it is now. A port that another process has is that
// service's misfortune, not the network's; the next Set or Repair tries it again. The caller
// holds mu.
func (p *Plane) answer(ctx context.Context) {
	text := ""
	if err := p.health.Set(ctx, p.checks); err != nil {
		text = err.Error()
	}
	if text != p.unchecked && text != "" {
		p.log.Error("load balancers cannot ask this node about all services; will try again", "err", text)
	}
	p.unchecked = text
}

// errMoved ends a server whose address changed.
var errMoved = errors.New("cluster DNS has another address")

// serveDNS keeps a server on the cluster DNS address, whatever that is at a time.
func (p *Plane) serveDNS(ctx context.Context) {
	const first, longest = 100 * time.Millisecond, 10 * time.Second
	retry := first
	for ctx.Err() == nil {
		p.mu.Lock()
		addr := p.address
		select {
		case <-p.moved: // this is about to be served
		default:
		}
		p.mu.Unlock()
		var again <-chan time.Time
		if addr.IsValid() {
			start := time.Now()
			err := p.serveAt(ctx, addr)
			if ctx.Err() != nil {
				return
			}
			if errors.Is(err, errMoved) {
				retry = first
				continue
			}
			p.log.Error("cluster DNS does not answer; will try again", "address", addr, "in", retry, "err", err)
			if time.Since(start) > longest {
				retry = first
			}
			again = time.After(retry)
			retry = min(2*retry, longest)
		}
		select {
		case <-ctx.Done():
		case <-p.moved:
		case <-again:
		}
	}
}

// serveAt serves until ctx ends, the address changes or a socket fails.
func (p *Plane) serveAt(ctx context.Context, addr netip.Addr) error {
	at := netip.AddrPortFrom(addr, render.DNSPort).String()
	var pc net.PacketConn
	var ln net.Listener
	err := netspace.Do(p.cfg.NetNS, func() (err error) {
		var lc net.ListenConfig
		if pc, err = lc.ListenPacket(ctx, "udp", at); err != nil {
			return err
		}
		if ln, err = lc.Listen(ctx, "tcp", at); err != nil {
			return errors.Join(err, pc.Close())
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan error, 1)
	go func() { ended <- p.dns.Serve(ctx, pc, ln) }()
	p.log.Info("cluster DNS answers", "address", at)
	select {
	case err = <-ended:
		return err
	case <-p.moved:
		cancel(errMoved)
	case <-ctx.Done():
	}
	return <-ended
}

// metrics of the plane; those of DNS are its own.
type metrics struct {
	sync                        prometheus.Histogram
	operations, failures, drift prometheus.Counter
	services                    prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		sync: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "decree_netplane_sync_seconds", Help: "Time to bring the kernel's service tables up to date.",
			Buckets: prometheus.ExponentialBuckets(100e-6, 4, 10),
		}),
		operations: counter("decree_netplane_operations_total", "Service ports changed in the kernel."),
		failures:   counter("decree_netplane_sync_failures_total", "Times that the service tables could not be brought up to date."),
		drift:      counter("decree_netplane_drift_total", "Service ports that somebody else had changed, and that were repaired."),
		services:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "decree_netplane_services", Help: "Service ports in the kernel."}),
	}
	if r != nil {
		r.MustRegister(m.sync, m.operations, m.failures, m.drift, m.services)
	}
	return m
}
