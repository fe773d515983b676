package ingress

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/netplane/ingress/route"
)

type metrics struct {
	requests  *prometheus.CounterVec   // namespace, ingress, code
	latency   *prometheus.HistogramVec // namespace, ingress
	failures  *prometheus.CounterVec   // namespace, ingress, code
	unrouted  prometheus.Counter
	unlogged  prometheus.Counter
	listening *prometheus.GaugeVec // port
}

func newMetrics(r prometheus.Registerer, s *Server) *metrics {
	of := []string{"namespace", "ingress"}
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decree_ingress_requests_total", Help: "Requests that an ingress has served, by the class of the response's code.",
		}, append(of, "code")),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "decree_ingress_request_seconds", Help: "Time from a request's headers to the end of its response.", Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 12),
		}, of),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decree_ingress_upstream_errors_total", Help: "Requests that no backend has answered, by what the client was told.",
		}, append(of, "code")),
		unrouted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "decree_ingress_unrouted_total", Help: "Requests that are not for any ingress.",
		}),
		unlogged: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "decree_ingress_unlogged_total", Help: "Requests that are not in the access log because it was too slow.",
		}),
		listening: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "decree_ingress_listening", Help: "Whether a port is open (http, https, http3).",
		}, []string{"port"}),
	}
	if r != nil {
		r.MustRegister(m.requests, m.latency, m.failures, m.unrouted, m.unlogged, m.listening, &tableMetrics{s})
	}
	return m
}

// forget drops the series of an ingress that is gone.
func (m *metrics) forget(name ingressName) {
	of := prometheus.Labels{"namespace": name.namespace, "ingress": name.name}
	m.requests.DeletePartialMatch(of)
	m.latency.DeletePartialMatch(of)
	m.failures.DeletePartialMatch(of)
}

// tableMetrics are read from the table in force.
type tableMetrics struct{ server *Server }

var (
	expiryDesc   = prometheus.NewDesc("decree_ingress_certificate_expiry_seconds", "When a certificate ends, in seconds since 1970.", []string{"namespace", "secret"}, nil)
	warningsDesc = prometheus.NewDesc("decree_ingress_warnings", "Parts of ingresses that have no effect.", nil, nil)
)

// Describe implements [prometheus.Collector].
func (t *tableMetrics) Describe(ch chan<- *prometheus.Desc) { ch <- expiryDesc; ch <- warningsDesc }

// Collect implements [prometheus.Collector].
func (t *tableMetrics) Collect(ch chan<- prometheus.Metric) {
	g := t.server.now.Load()
	for _, c := range g.Certificates {
		ch <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(c.NotAfter.Unix()), c.Namespace, c.Secret)
	}
	ch <- prometheus.MustNewConstMetric(warningsDesc, prometheus.GaugeValue, float64(len(g.Warnings)))
}

// ingress is one that is served, with what is counted of it.
type ingress struct {
	route.Ingress
	name    ingressName
	limits  *limits
	codes   [6]prometheus.Counter // by the first digit; 0 is for all others
	latency prometheus.Observer
	metrics *metrics
}

func newIngress(m *metrics, of *route.Ingress) *ingress {
	in := &ingress{Ingress: *of, name: ingressName{of.Namespace, of.Name}, limits: newLimits(of), metrics: m}
	for i := range in.codes {
		class := strconv.Itoa(i) + "xx"
		if i == 0 {
			class = "other"
		}
		in.codes[i] = m.requests.WithLabelValues(of.Namespace, of.Name, class)
	}
	in.latency = m.latency.WithLabelValues(of.Namespace, of.Name)
	return in
}

// count notes one request.
func (in *ingress) count(code int, took time.Duration) {
	class := code / 100
	if class >= len(in.codes) {
		class = 0
	}
	in.codes[class].Inc()
	in.latency.Observe(took.Seconds())
}

// failed notes that no backend has answered.
func (in *ingress) failed(code int) {
	in.metrics.failures.WithLabelValues(in.name.namespace, in.name.name, strconv.Itoa(code)).Inc()
}
