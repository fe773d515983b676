package dns

import (
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// answeredBy is where an answer is from.
type answeredBy int

const (
	byCluster answeredBy = iota
	byCache
	byUpstream
	byStale
	sources
)

func (b answeredBy) String() string { return [...]string{"cluster", "cache", "upstream", "stale"}[b] }

// countedRcodes are those with a series of their own.
const countedRcodes = dns.RcodeNotZone + 1

type metrics struct {
	queries [sources][countedRcodes + 1]prometheus.Counter // the last one is for all others
	latency prometheus.Histogram
	dropped prometheus.Counter
}

func newMetrics(r prometheus.Registerer, c *cache) *metrics {
	queries := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "decree_dns_queries_total", Help: "Queries answered, by response code and by who answered (cluster, cache, upstream, or stale: the cache, as upstreams did not).",
	}, []string{"rcode", "by"})
	m := &metrics{
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "decree_dns_query_seconds", Help: "Time to answer a query.", Buckets: prometheus.ExponentialBuckets(20e-6, 4, 10),
		}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "decree_dns_queries_dropped_total", Help: "Queries and connections not answered because there were too many.",
		}),
	}
	// Looked up once, as there is a query every few microseconds.
	for by := range sources {
		for rcode := range m.queries[by] {
			label := "other" // keeps the number of series bounded whatever upstreams answer
			if rcode < countedRcodes {
				label = dns.RcodeToString[rcode]
			}
			m.queries[by][rcode] = queries.WithLabelValues(label, by.String())
		}
	}
	if r != nil {
		r.MustRegister(queries, m.latency, m.dropped, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "decree_dns_cache_bytes", Help: "Memory taken by remembered answers.",
		}, func() float64 { _, n := c.size(); return float64(n) }))
	}
	return m
}

func (m *metrics) count(by answeredBy, rcode int) {
	m.queries[by][min(rcode, countedRcodes)].Inc()
}
