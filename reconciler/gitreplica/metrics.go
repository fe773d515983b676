package gitreplica

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	pulls *prometheus.CounterVec
}

// register registers the metrics of r with reg, which may be nil.
func (m *metrics) register(reg prometheus.Registerer, r *Replica) error {
	m.pulls = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "decree_git_pulls_total", Help: "Pulls from other servers into built-in repositories, by result.",
	}, []string{"result"})
	behind := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "decree_git_repositories_behind", Help: "Built-in repositories that lack what is in force on this server.",
	}, func() float64 { return float64(len(r.Behind())) })
	failing := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "decree_git_repositories_failing", Help: "Built-in repositories that lack what is in force, and whose last attempt to get it failed.",
	}, func() float64 {
		n := 0
		for _, b := range r.Behind() {
			if b.Err != nil {
				n++
			}
		}
		return float64(n)
	})
	lag := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "decree_git_behind_seconds", Help: "For how long the repository that is behind longest has been so.",
	}, func() float64 {
		longest := time.Duration(0)
		for _, b := range r.Behind() {
			longest = max(longest, time.Since(b.Since))
		}
		return longest.Seconds()
	})
	if reg == nil {
		return nil
	}
	return errors.Join(reg.Register(m.pulls), reg.Register(behind), reg.Register(failing), reg.Register(lag))
}

func (m *metrics) pulled(err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.pulls.WithLabelValues(result).Inc()
}
