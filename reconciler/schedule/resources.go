package schedule

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// defaultMaxPods is how many pods a node runs that does not say.
const defaultMaxPods = 110

// The requests assumed in scores (not in filters) for a pod that states none, so
// that many such pods do not all land on one node. They are those of kube-scheduler.
const (
	assumedCPU    = 100               // thousandths of a core
	assumedMemory = 200 * 1024 * 1024 // bytes
)

// amounts are quantities of resources.
type amounts struct {
	cpu     int64 // thousandths of a core
	memory  int64 // bytes
	storage int64 // bytes of ephemeral storage
	pods    int64
	extra   map[corev1.ResourceName]int64 // anything else; shared, never modified in place
}

func amountsOf(list corev1.ResourceList) amounts {
	var a amounts
	for name, q := range list {
		switch name {
		case corev1.ResourceCPU:
			a.cpu = q.MilliValue()
		case corev1.ResourceMemory:
			a.memory = q.Value()
		case corev1.ResourceEphemeralStorage:
			a.storage = q.Value()
		case corev1.ResourcePods:
			a.pods = q.Value()
		default:
			if a.extra == nil {
				a.extra = map[corev1.ResourceName]int64{}
			}
			a.extra[name] = q.Value()
		}
	}
	return a
}

// add adds b times sign.
func (a *amounts) add(b amounts, sign int64) {
	a.cpu += sign * b.cpu
	a.memory += sign * b.memory
	a.storage += sign * b.storage
	a.pods += sign * b.pods
	if len(b.extra) > 0 {
		a.extra = maps.Clone(a.extra)
		if a.extra == nil {
			a.extra = map[corev1.ResourceName]int64{}
		}
		for name, n := range b.extra {
			a.extra[name] += sign * n
		}
	}
}

// atLeast raises every amount to that of b.
func (a *amounts) atLeast(b amounts) {
	a.cpu, a.memory, a.storage, a.pods = max(a.cpu, b.cpu), max(a.memory, b.memory), max(a.storage, b.storage), max(a.pods, b.pods)
	if len(b.extra) > 0 {
		a.extra = maps.Clone(a.extra)
		if a.extra == nil {
			a.extra = map[corev1.ResourceName]int64{}
		}
		for name, n := range b.extra {
			a.extra[name] = max(a.extra[name], n)
		}
	}
}

// needsOf is what a pod takes from a node: the sum of its containers and sidecars,
// or what an init container needs beside the sidecars started before it, whichever
// is more; pod-level requests in place of these; and the overhead.
func needsOf(p *corev1.Pod) amounts {
	var sum, peak, sidecars amounts
	for i := range p.Spec.InitContainers {
		c := &p.Spec.InitContainers[i]
		r := amountsOf(c.Resources.Requests)
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			sidecars.add(r, 1)
			peak.atLeast(sidecars)
			continue
		}
		r.add(sidecars, 1)
		peak.atLeast(r)
	}
	sum.add(sidecars, 1)
	for i := range p.Spec.Containers {
		sum.add(amountsOf(p.Spec.Containers[i].Resources.Requests), 1)
	}
	sum.atLeast(peak)
	if p.Spec.Resources != nil {
		whole := amountsOf(p.Spec.Resources.Requests)
		if _, set := p.Spec.Resources.Requests[corev1.ResourceCPU]; set {
			sum.cpu = whole.cpu
		}
		if _, set := p.Spec.Resources.Requests[corev1.ResourceMemory]; set {
			sum.memory = whole.memory
		}
	}
	sum.add(amountsOf(p.Spec.Overhead), 1)
	sum.pods = 1
	if ports := hostPorts(&p.Spec); ports != nil {
		sum.add(amounts{extra: ports}, 1)
	}
	return sum
}

// portPrefix begins the names of what every node has one of: its ports. No resource's
// name has a space.
const portPrefix = "host port "

// hostPorts are the ports of a node that a pod takes, as resources; nil for none. Two
// pods with the same port do not share a node, whatever addresses (hostIP) they name.
func hostPorts(s *corev1.PodSpec) map[corev1.ResourceName]int64 {
	var out map[corev1.ResourceName]int64
	for _, containers := range [][]corev1.Container{s.InitContainers, s.Containers} {
		for i := range containers {
			for _, p := range containers[i].Ports {
				if p.HostPort == 0 {
					continue
				}
				if out == nil {
					out = map[corev1.ResourceName]int64{}
				}
				protocol := cmp.Or(p.Protocol, corev1.ProtocolTCP)
				out[corev1.ResourceName(fmt.Sprintf("%s%d/%s", portPrefix, p.HostPort, protocol))] = 1
			}
		}
	}
	return out
}

// extra is how much a node has of a resource without a field of its own.
func (n *node) extra(name corev1.ResourceName) int64 {
	if strings.HasPrefix(string(name), portPrefix) {
		return 1
	}
	return n.allocatable.extra[name]
}

// lack is a resource of which a node has too little.
type lack struct {
	name       string
	need, free int64
	format     func(int64) string
}

// lacking lists what is missing on n for a pod that needs a, nil if it fits.
func (n *node) lacking(a *amounts) []lack {
	var out []lack
	check := func(name string, need, have, used int64, format func(int64) string) {
		if need > 0 && need > have-used {
			out = append(out, lack{name, need, max(0, have-used), format})
		}
	}
	check("pods", a.pods, n.allocatable.pods, n.used.pods, plain)
	check("cpu", a.cpu, n.allocatable.cpu, n.used.cpu, cores)
	check("memory", a.memory, n.allocatable.memory, n.used.memory, bytes)
	check("ephemeral-storage", a.storage, n.allocatable.storage, n.used.storage, bytes)
	for _, name := range slices.Sorted(maps.Keys(a.extra)) {
		check(string(name), a.extra[name], n.extra(name), n.used.extra[name], plain)
	}
	return out
}

// fits is lacking without the explanation.
func (n *node) fits(a *amounts) bool {
	if a.pods > n.allocatable.pods-n.used.pods ||
		a.cpu > 0 && a.cpu > n.allocatable.cpu-n.used.cpu ||
		a.memory > 0 && a.memory > n.allocatable.memory-n.used.memory ||
		a.storage > 0 && a.storage > n.allocatable.storage-n.used.storage {
		return false
	}
	for name, need := range a.extra {
		if need > 0 && need > n.extra(name)-n.used.extra[name] {
			return false
		}
	}
	return true
}

func plain(n int64) string { return strconv.FormatInt(n, 10) }

// cores is "2" or "250m".
func cores(milli int64) string {
	if milli%1000 == 0 {
		return plain(milli / 1000)
	}
	return plain(milli) + "m"
}

// bytes is exact in the largest fitting unit, or rounded down to a tenth of it.
func bytes(n int64) string {
	for _, u := range []struct {
		name string
		size int64
	}{{"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10}} {
		if n < u.size {
			continue
		}
		whole, tenth := n/u.size, n%u.size*10/u.size
		if tenth == 0 || whole >= 100 {
			return plain(whole) + u.name
		}
		return plain(whole) + "." + plain(tenth) + u.name
	}
	return plain(n)
}
