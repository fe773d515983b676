package backup

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what scheduled snapshots tell Prometheus. A nil one takes everything and
// tells nothing.
type Metrics struct {
	last, size, seconds prometheus.Gauge
	failures            prometheus.Counter
}

// NewMetrics registers the metrics, or returns those that are registered already.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "decree", Subsystem: "snapshot", Name: name, Help: help}
	}
	m := &Metrics{
		last:     prometheus.NewGauge(prometheus.GaugeOpts(opts("last_success_timestamp_seconds", "Unix time of the newest scheduled snapshot that is in the target."))),
		size:     prometheus.NewGauge(prometheus.GaugeOpts(opts("size_bytes", "Size of that snapshot."))),
		seconds:  prometheus.NewGauge(prometheus.GaugeOpts(opts("duration_seconds", "Time that the last scheduled snapshot of this server took."))),
		failures: prometheus.NewCounter(prometheus.CounterOpts(opts("failures_total", "Scheduled snapshots of this server that failed."))),
	}
	return m, errors.Join(register(r, &m.last), register(r, &m.size), register(r, &m.seconds), register(r, &m.failures))
}

func register[T prometheus.Collector](r prometheus.Registerer, c *T) error {
	err := r.Register(*c)
	var twice prometheus.AlreadyRegisteredError
	if errors.As(err, &twice) {
		*c, _ = twice.ExistingCollector.(T)
		return nil
	}
	return err
}

// seen notes what the target holds, for servers that did not put it there.
func (m *Metrics) seen(e Entry) {
	if m != nil {
		m.last.Set(float64(e.Name.Time.Unix()))
		m.size.Set(float64(e.Size))
	}
}

func (m *Metrics) succeeded(at time.Time, size int64, took time.Duration) {
	if m != nil {
		m.last.Set(float64(at.Unix()))
		m.size.Set(float64(size))
		m.seconds.Set(took.Seconds())
	}
}

func (m *Metrics) failed() {
	if m != nil {
		m.failures.Inc()
	}
}
