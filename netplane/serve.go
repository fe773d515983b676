package netplane

import (
	"context"
	"fmt"
	"net"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/netplane/netspace"
)

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

// metrics of the plane.
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
