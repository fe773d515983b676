package raftstore

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// metrics are what the store tells Prometheus about itself.
type metrics struct {
	transactions   *prometheus.CounterVec // by outcome
	batchTxns      prometheus.Histogram
	proposeSeconds prometheus.Histogram
	commitSeconds  prometheus.Histogram
	applySeconds   prometheus.Histogram
	slowWatchers   prometheus.Counter
	diskSeconds    *prometheus.HistogramVec // by what is written
	collectors     []prometheus.Collector
}

func newMetrics(s *Store) *metrics {
	seconds := prometheus.ExponentialBuckets(50e-6, 2, 18) // 50 µs to 6.5 s
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "decree", Subsystem: "store", Name: name, Help: help, Buckets: buckets})
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "decree", Subsystem: "store", Name: name, Help: help}, value)
	}
	m := &metrics{
		transactions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "decree", Subsystem: "store", Name: "transactions_total",
			Help: "Transactions that this server applied, by outcome.",
		}, []string{"outcome"}),
		batchTxns:      histogram("batch_transactions", "Transactions in one proposed log entry.", prometheus.ExponentialBuckets(1, 2, 13)),
		proposeSeconds: histogram("propose_seconds", "From entering the queue to durable and applied.", seconds),
		commitSeconds:  histogram("commit_seconds", "From handing an entry to raft to durable and applied.", seconds),
		applySeconds:   histogram("apply_seconds", "Decoding and applying one log entry.", seconds),
		slowWatchers: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "decree", Subsystem: "store", Name: "slow_watchers_total",
			Help: "Watches that the history overtook.",
		}),
	}
	m.diskSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "decree", Subsystem: "store", Name: "disk_seconds", Help: "Writing to disk, fsync included, by what is written.", Buckets: seconds,
	}, []string{"what"})
	m.collectors = []prometheus.Collector{m.diskSeconds, m.transactions, m.batchTxns, m.proposeSeconds, m.commitSeconds, m.applySeconds, m.slowWatchers,
		gauge("revision", "Revision of the state.", func() float64 { return float64(s.View().Revision()) }),
		gauge("leader", "1 while this server leads.", func() float64 {
			if s.IsLeader() {
				return 1
			}
			return 0
		}),
		gauge("term", "Raft's term: it rises with every election.", func() float64 { return float64(s.raft.CurrentTerm()) }),
		gauge("disk_trouble", "1 while the disk is full, slow or broken.", func() float64 {
			if s.Trouble() != "" {
				return 1
			}
			return 0
		}),
		objectsCollector{s},
	}
	return m
}

func (m *metrics) outcome(r command.Result) {
	if r.Rejected == nil {
		m.transactions.WithLabelValues("applied").Inc()
		return
	}
	m.transactions.WithLabelValues(r.Rejected.Code.String()).Inc()
}

func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	for _, c := range m.collectors {
		if err := r.Register(c); err != nil {
			m.unregister(r)
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

func (m *metrics) unregister(r prometheus.Registerer) {
	if r == nil {
		return
	}
	for _, c := range m.collectors {
		r.Unregister(c)
	}
}

// objectsCollector counts the objects of every resource when it is asked.
type objectsCollector struct{ store *Store }

var objectsDesc = prometheus.NewDesc("decree_store_objects", "Objects in the state.", []string{"resource"}, nil)

// Describe implements prometheus.Collector.
func (objectsCollector) Describe(ch chan<- *prometheus.Desc) { ch <- objectsDesc }

// Collect implements prometheus.Collector.
func (c objectsCollector) Collect(ch chan<- prometheus.Metric) {
	view := c.store.View()
	for _, k := range api.Kinds() {
		ch <- prometheus.MustNewConstMetric(objectsDesc, prometheus.GaugeValue, float64(view.Len(k.Resource)), string(k.Resource))
	}
}
