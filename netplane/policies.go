package netplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane/cni"
	"decree.dev/decree/netplane/enforce"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/policy"
)

// policyPatience is how long Attach waits for the first Set: it comes when the agent's view
// does, as pods do.
const policyPatience = 10 * time.Second

// errPoliciesUnknown is why a pod is not started rather than let it talk to anybody.
var errPoliciesUnknown = errors.New("network policies are not known yet; will be tried again")

// keeper keeps network policies in force, for the pods that the cluster knows and those
// that it does not know the addresses of yet. Its methods are safe for concurrent use.
type keeper struct {
	log      *slog.Logger
	networks *cni.Networks
	tables   *enforce.Policies
	metrics  *policyMetrics
	// known is closed at the first set.
	known chan struct{}

	mu sync.Mutex
	// want is the last set's; nil before the first.
	want *Desired
	// pods are those that are attached here; nil before the first set.
	pods map[types.UID]attachment
}

// attachment is a pod with the addresses that it got, which its status may not say yet.
type attachment struct {
	pod   *corev1.Pod // nil: an earlier process attached it, and nobody has named it since
	addrs []netip.Addr
}

func openKeeper(cfg *Config, networks *cni.Networks) (*keeper, error) {
	k := &keeper{log: cfg.Log, networks: networks, known: make(chan struct{}), metrics: newPolicyMetrics(cfg.Registerer)}
	name := ""
	if cfg.Table != "" {
		name = cfg.Table + "-policy"
	}
	err := netspace.Do(cfg.NetNS, func() (err error) {
		k.tables, err = enforce.New(name, cfg.Log)
		return err
	})
	return k, err
}

func (k *keeper) close() error { return k.tables.Close() }

// set makes the policies of d those in force.
func (k *keeper) set(ctx context.Context, d Desired) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.pods == nil {
		addrs, err := k.networks.Addresses(ctx)
		if err != nil {
			k.log.Warn("pods are judged by the addresses in their status", "err", err)
		}
		k.pods = map[types.UID]attachment{}
		for uid, a := range addrs {
			k.pods[uid] = attachment{addrs: a}
		}
	}
	if k.want == nil {
		close(k.known)
	}
	k.want = &d
	return k.enforce(ctx)
}

// enforce makes the kernel hold what is wanted. The caller holds mu.
func (k *keeper) enforce(ctx context.Context) error {
	begun := time.Now()
	plan := policy.New(k.cluster())
	changes, err := k.tables.Set(ctx, plan, k.want.ServiceCIDR)
	k.metrics.note(plan, changes, time.Since(begun), err)
	return err
}

// policyMetrics are about the policies in force on this node.
type policyMetrics struct {
	policies, rules, isolated, last prometheus.Gauge
	seconds                         prometheus.Histogram
	changes, failures               prometheus.Counter
}

func newPolicyMetrics(r prometheus.Registerer) *policyMetrics {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &policyMetrics{
		policies: gauge("decree_netplane_policies", "Network policies in force for pods of this node."),
		rules:    gauge("decree_netplane_policy_rules", "Rules of those policies, ingress and egress."),
		isolated: gauge("decree_netplane_policy_isolated_addresses", "Addresses of pods of this node that policies isolate."),
		last:     gauge("decree_netplane_policy_last_apply_seconds", "How long it took to plan policies and to bring the kernel up to date, the last time."),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "decree_netplane_policy_apply_seconds", Help: "Time to plan policies and to bring the kernel up to date.",
			Buckets: prometheus.ExponentialBuckets(100e-6, 4, 10),
		}),
		changes:  counter("decree_netplane_policy_changes_total", "Rules and elements of policies changed in the kernel."),
		failures: counter("decree_netplane_policy_failures_total", "Times that policies could not be brought into force."),
	}
	if r != nil {
		r.MustRegister(m.policies, m.rules, m.isolated, m.last, m.seconds, m.changes, m.failures)
	}
	return m
}

// note counts what a plan brought into force. After an error the one before may still be.
func (m *policyMetrics) note(plan *policy.Plan, changes int, took time.Duration, err error) {
	m.last.Set(took.Seconds())
	m.seconds.Observe(took.Seconds())
	m.changes.Add(float64(changes))
	if err != nil {
		m.failures.Inc()
		return
	}
	policies, rules := plan.Size()
	m.policies.Set(float64(policies))
	m.rules.Set(float64(rules))
	m.isolated.Set(float64(len(plan.Subjects)))
}

// cluster is what policies speak about: of pods that are attached here the addresses that
// they really have, whatever else claims those.
func (k *keeper) cluster() policy.Cluster {
	d := k.want
	c := policy.Cluster{Policies: d.Policies, Namespaces: d.Namespaces, DNS: d.DNS}
	if len(d.Policies) == 0 {
		return c
	}
	taken := map[netip.Addr]bool{}
	for _, a := range k.pods {
		for _, addr := range a.addrs {
			taken[addr] = true
		}
	}
	named := map[types.UID]bool{}
	add := func(pod *corev1.Pod, here bool) {
		q, ok := policy.PodOf(pod)
		if !ok {
			return
		}
		q.Here = here
		if a, ok := k.pods[pod.UID]; ok && here {
			q.Addrs = a.addrs
		} else {
			q.Addrs = slices.DeleteFunc(q.Addrs, func(a netip.Addr) bool { return taken[a] })
		}
		c.Pods = append(c.Pods, q)
	}
	for _, pod := range d.Pods {
		if a, ok := k.pods[pod.UID]; ok {
			named[pod.UID] = true
			k.pods[pod.UID] = attachment{pod, a.addrs} // with the labels that it has now
		}
		add(pod, pod.Spec.NodeName == d.Node)
	}
	for uid, a := range k.pods {
		switch {
		case named[uid]:
		case a.pod != nil:
			add(a.pod, true)
		default:
			c.Unknown = append(c.Unknown, a.addrs...)
		}
	}
	return c
}

// await waits for the first set, but not long.
func (k *keeper) await(ctx context.Context) error {
	patience := time.NewTimer(policyPatience)
	defer patience.Stop()
	select {
	case <-k.known:
	case <-patience.C:
		return errPoliciesUnknown
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errPoliciesUnknown, context.Cause(ctx))
	}
	return nil
}

// attached makes what policies say about a pod be in force. The first set has been.
func (k *keeper) attached(ctx context.Context, pod *corev1.Pod, addrs []netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pods[pod.UID] = attachment{pod, addrs}
	if len(k.want.Policies) == 0 {
		return nil
	}
	return k.enforce(ctx)
}

// detached forgets a pod whose addresses others may get now.
func (k *keeper) detached(uid types.UID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.pods, uid)
}

// repair makes the kernel hold what it should, if somebody changed it.
func (k *keeper) repair(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.want == nil {
		return nil
	}
	ok, err := k.tables.Read(ctx)
	if err != nil || ok {
		return err
	}
	k.log.Warn("somebody changed the tables of network policies; repaired")
	return k.enforce(ctx)
}

// purge removes the tables.
func (k *keeper) purge(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tables.Purge(ctx)
}
