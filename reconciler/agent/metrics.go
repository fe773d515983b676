package agent

import "github.com/prometheus/client_golang/prometheus"

// metrics are what the agent counts.
type metrics struct {
	started  prometheus.Counter
	restarts prometheus.Counter
	pods     prometheus.Gauge
	steps    *prometheus.HistogramVec // by action, result
	probes   *prometheus.CounterVec   // by kind, result
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		started: prometheus.NewCounter(prometheus.CounterOpts{Name: "decree_agent_containers_started_total",
			Help: "Containers started."}),
		restarts: prometheus.NewCounter(prometheus.CounterOpts{Name: "decree_agent_container_restarts_total",
			Help: "Containers started that are not the first attempt."}),
		pods: prometheus.NewGauge(prometheus.GaugeOpts{Name: "decree_agent_pods",
			Help: "Pods the agent takes care of."}),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "decree_agent_step_seconds",
			Help: "Duration of the steps of pods.", Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 12)}, []string{"action", "result"}),
		probes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "decree_agent_probes_total",
			Help: "Probes made."}, []string{"kind", "result"}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.started, m.restarts, m.pods, m.steps, m.probes} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) step(r stepResult) {
	result := "ok"
	if r.err != nil {
		result = "error"
	}
	m.steps.WithLabelValues(r.step.Action.String(), result).Observe(r.took.Seconds())
	if r.step.Action == StartContainer && r.err == nil {
		m.started.Inc()
		if r.step.Attempt > 0 {
			m.restarts.Inc()
		}
	}
}
