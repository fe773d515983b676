package state

import (
	"fmt"
	"hash/fnv"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// placePorts settles the node ports of svc, which the caller owns, and updates the pool.
//
// A number belongs to one service, whatever the protocol, as in Kubernetes; the service
// may use it for several protocols. A port that names no number keeps the one that the
// port of its name had, shares that of its twin of another protocol, or gets a free one.
// Where the search for that begins follows from the names: who was deleted and comes
// back most likely gets what clients know, and the pool needs no memory of its own.
func (d *draft) placePorts(key api.Key, old, svc *corev1.Service) *command.Rejection {
	held := portsOf(old)
	if !hasNodePorts(svc) {
		d.releasePorts(held)
		return nil // also of one whose type has none, and which was stored with numbers all the same
	}
	d.releasePorts(held)
	p := &portPlan{draft: d, key: key, svc: svc}
	svc.Spec.Ports = slices.Clone(svc.Spec.Ports)
	if rejection := p.named(); rejection != nil {
		return rejection
	}
	p.keep(old)
	if rejection := p.assign(); rejection != nil {
		return rejection
	}
	return p.healthCheck(old)
}

// hasNodePorts reports whether the type of svc is one that node ports belong to.
func hasNodePorts(svc *corev1.Service) bool {
	return svc != nil && (svc.Spec.Type == corev1.ServiceTypeNodePort || svc.Spec.Type == corev1.ServiceTypeLoadBalancer)
}

// portsOf are the numbers that a stored service holds; svc may be nil.
func portsOf(svc *corev1.Service) (held []uint16) {
	if !hasNodePorts(svc) {
		return nil
	}
	add := func(n int32) {
		if n > 0 && n <= 65535 && !slices.Contains(held, uint16(n)) {
			held = append(held, uint16(n))
		}
	}
	for i := range svc.Spec.Ports {
		add(svc.Spec.Ports[i].NodePort)
	}
	add(svc.Spec.HealthCheckNodePort)
	return held
}

func (d *draft) releasePorts(held []uint16) {
	for _, n := range held {
		d.next.ports.release(d.edit, uint64(n))
	}
}

// portPlan gives one service its node ports. What it held before is free again.
type portPlan struct {
	*draft
	key api.Key
	svc *corev1.Service
}

// claim takes a number that the service names in a field.
func (p *portPlan) claim(field string, n int32) *command.Rejection {
	r := p.next.settings.NodePortRange()
	if n < int32(r.First) || n > int32(r.Last) {
		return invalid(p.key, "%s %d is not in the range of node ports %s", field, n, r)
	}
	if holder, taken := p.next.ports.holder(uint64(n)); taken && holder != holderOf(p.key) {
		return invalid(p.key, "%s %d is in use by services %q, choose another or none", field, n, holder)
	}
	p.take(n)
	return nil
}

func (p *portPlan) take(n int32) { p.next.ports.take(p.edit, uint64(n), holderOf(p.key)) }

// named takes the numbers that the service names.
func (p *portPlan) named() *command.Rejection {
	type use struct {
		number   int32
		protocol corev1.Protocol
	}
	seen := map[use]bool{}
	for i := range p.svc.Spec.Ports {
		port := &p.svc.Spec.Ports[i]
		if port.NodePort == 0 {
			continue
		}
		if u := (use{port.NodePort, protocolOf(port)}); seen[u] {
			return invalid(p.key, "spec.ports[%d].nodePort %d is that of another %s port of the service", i, u.number, u.protocol)
		} else {
			seen[u] = true
		}
		if rejection := p.claim(fmt.Sprintf("spec.ports[%d].nodePort", i), port.NodePort); rejection != nil {
			return rejection
		}
	}
	return nil
}

func protocolOf(p *corev1.ServicePort) corev1.Protocol {
	if p.Protocol == "" {
		return corev1.ProtocolTCP
	}
	return p.Protocol
}

// keep gives ports without a number the one that the port of their name had before.
func (p *portPlan) keep(old *corev1.Service) {
	if !hasNodePorts(old) || !p.allocates() {
		return
	}
	for i := range p.svc.Spec.Ports {
		port := &p.svc.Spec.Ports[i]
		before := slices.IndexFunc(old.Spec.Ports, func(o corev1.ServicePort) bool { return o.Name == port.Name })
		if port.NodePort != 0 || before < 0 {
			continue
		}
		if n := old.Spec.Ports[before].NodePort; n > 0 && p.usable(n, port) {
			port.NodePort = n
			p.take(n)
		}
	}
}

// usable reports whether port may have the number n.
func (p *portPlan) usable(n int32, port *corev1.ServicePort) bool {
	if holder, taken := p.next.ports.holder(uint64(n)); taken && holder != holderOf(p.key) {
		return false
	}
	return !slices.ContainsFunc(p.svc.Spec.Ports, func(o corev1.ServicePort) bool { return o.NodePort == n && protocolOf(&o) == protocolOf(port) })
}

func (p *portPlan) allocates() bool {
	s := &p.svc.Spec
	return s.Type == corev1.ServiceTypeNodePort || s.AllocateLoadBalancerNodePorts == nil || *s.AllocateLoadBalancerNodePorts
}

// assign gives the rest of the ports a number.
func (p *portPlan) assign() *command.Rejection {
	if !p.allocates() {
		return nil
	}
	for i := range p.svc.Spec.Ports {
		port := &p.svc.Spec.Ports[i]
		if port.NodePort != 0 {
			continue
		}
		twin := slices.IndexFunc(p.svc.Spec.Ports, func(o corev1.ServicePort) bool { return o.NodePort != 0 && o.Port == port.Port })
		if twin >= 0 && p.usable(p.svc.Spec.Ports[twin].NodePort, port) {
			port.NodePort = p.svc.Spec.Ports[twin].NodePort
			continue
		}
		n, rejection := p.allocate(port.Name)
		if rejection != nil {
			return rejection
		}
		port.NodePort = n
	}
	return nil
}

// healthCheck settles healthCheckNodePort, which load balancers ask for the state of a
// node when it matters to them which nodes have endpoints.
func (p *portPlan) healthCheck(old *corev1.Service) *command.Rejection {
	s := &p.svc.Spec
	if s.Type != corev1.ServiceTypeLoadBalancer || s.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		s.HealthCheckNodePort = 0
		return nil
	}
	if s.HealthCheckNodePort != 0 {
		if _, taken := p.next.ports.holder(uint64(s.HealthCheckNodePort)); taken && slices.ContainsFunc(s.Ports, func(o corev1.ServicePort) bool { return o.NodePort == s.HealthCheckNodePort }) {
			return invalid(p.key, "spec.healthCheckNodePort %d is the node port of one of the service's ports", s.HealthCheckNodePort)
		}
		return p.claim("spec.healthCheckNodePort", s.HealthCheckNodePort)
	}
	if hasNodePorts(old) && old.Spec.HealthCheckNodePort > 0 {
		if _, taken := p.next.ports.holder(uint64(old.Spec.HealthCheckNodePort)); !taken {
			s.HealthCheckNodePort = old.Spec.HealthCheckNodePort
			p.take(s.HealthCheckNodePort)
			return nil
		}
	}
	n, rejection := p.allocate("/health")
	s.HealthCheckNodePort = n
	return rejection
}

// chosenPorts is how many of the first numbers of the range are left to those who choose
// theirs, for as long as there are others: KEP-3668.
func chosenPorts(size uint64) uint64 { return min(max(16, size/32), 128) }

// allocate takes a free number for something of the service that has this name.
func (p *portPlan) allocate(name string) (int32, *command.Rejection) {
	r := p.next.settings.NodePortRange()
	first, size := uint64(r.First), uint64(r.Last-r.First)+1
	if uint64(p.next.ports.used.Len()) < size {
		h := fnv.New64a()
		fmt.Fprintf(h, "%s\x00%s", holderOf(p.key), name) // never fails
		low := min(chosenPorts(size), size)
		for _, part := range [][2]uint64{{low, size}, {0, low}} {
			n := part[1] - part[0]
			for i := range n {
				number := first + part[0] + (h.Sum64()+i)%n
				if _, taken := p.next.ports.holder(number); !taken {
					p.take(int32(number))
					return int32(number), nil
				}
			}
		}
	}
	return 0, invalid(p.key, "no node port is left in the range %s: all %d are in use, delete a service that is not needed or let allocateLoadBalancerNodePorts be false", r, size)
}
