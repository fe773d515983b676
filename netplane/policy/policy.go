// Package policy turns NetworkPolicy objects (networking.k8s.io/v1) into what a kernel can
// look up: which addresses are isolated, by which policies, and which addresses and ports
// each rule of those allows. The same plan says why a connection is allowed or not.
//
// It is pure: no clock, no I/O, no goroutines. How a kernel holds a plan is for
// netplane/enforce; who calls for a plan, and when, is for netplane.
package policy

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/netplane/render"
)

// Cluster is everything that policies speak about. The objects are shared and never
// modified.
type Cluster struct {
	Policies   []*networkingv1.NetworkPolicy
	Namespaces []*corev1.Namespace
	Pods       []Pod
	// DNS is the cluster DNS address. Every node answers there itself, so that no pod
	// stands for it; policies find it as a pod of the namespace kube-system with the label
	// k8s-app=kube-dns and the ports dns and dns-tcp, as they do elsewhere.
	DNS netip.Addr
	// Unknown are addresses of pods on this node of which nothing else is known: nobody
	// but the node talks to them until it is.
	Unknown []netip.Addr
}

// Pod is what policies see of a pod that has a network of its own.
type Pod struct {
	Namespace, Name string
	Labels          map[string]string
	Addrs           []netip.Addr
	Ports           []NamedPort
	// Here: its traffic is to be judged. All other pods are only peers.
	Here bool
}

// NamedPort is a container's port with a name.
type NamedPort struct {
	Name   string
	Proto  render.Proto
	Number uint16
}

// PodOf is how policies see a pod, with the addresses that its status names. Pods in the
// network of their node are none: they are the node. Those that have ended have no address
// any more.
func PodOf(p *corev1.Pod) (Pod, bool) {
	if p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return Pod{}, false
	}
	out := Pod{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels}
	texts := []string{p.Status.PodIP}
	for _, ip := range p.Status.PodIPs {
		texts = append(texts, ip.IP)
	}
	for _, text := range texts {
		if a, err := netip.ParseAddr(text); err == nil && !slices.Contains(out.Addrs, a.Unmap()) {
			out.Addrs = append(out.Addrs, a.Unmap())
		}
	}
	// Sidecars are init containers that stay.
	for _, cs := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range cs {
			for _, port := range cs[i].Ports {
				if proto, ok := render.ProtoOf(port.Protocol); ok && port.Name != "" && port.ContainerPort >= 1 && port.ContainerPort <= 65535 {
					out.Ports = append(out.Ports, NamedPort{port.Name, proto, uint16(port.ContainerPort)})
				}
			}
		}
	}
	return out, true
}

// Everywhere is all of pods as policies see them, each to be judged: for who asks about a whole
// cluster.
func Everywhere(pods []*corev1.Pod) (out []Pod) {
	for _, pod := range pods {
		if p, ok := PodOf(pod); ok {
			p.Here = true
			out = append(out, p)
		}
	}
	return out
}

// Plan is what a kernel has to hold of all policies. Equal clusters give equal plans, in
// the same order.
type Plan struct {
	// Subjects are the addresses that policies isolate, in order.
	Subjects []Subject
	// Peers, Blocks and Names are the sets that rules refer to, ordered by ID.
	Peers  []*Peer
	Blocks []*Block
	Names  []*Name
	// known are the addresses of all pods; nil if there were no policies to ask for them.
	known map[netip.Addr]bool
}

// Known reports whether a is an address of a pod, as far as the plan knows: one of a
// cluster without policies does not.
func (p *Plan) Known(a netip.Addr) bool { return p.known == nil || p.known[a] }

// Size is how many policy objects the plan has, and how many rules they have in it, each counted
// once for all pods that they isolate.
func (p *Plan) Size() (policies, rules int) {
	groups, parts, objects := map[*Group]bool{}, map[*Policy]bool{}, map[*networkingv1.NetworkPolicy]bool{}
	for i := range p.Subjects {
		for _, g := range []*Group{p.Subjects[i].Ingress, p.Subjects[i].Egress} {
			if g == nil || groups[g] {
				continue
			}
			groups[g] = true
			for _, part := range g.Policies {
				if !parts[part] {
					parts[part], objects[part.Object] = true, true
					rules += len(part.Rules)
				}
			}
		}
	}
	return len(objects), rules
}

// Subject is one address of a pod that is isolated in one direction at least.
type Subject struct {
	Addr netip.Addr
	// Pod is namespace/name; empty for an address of which no more is known.
	Pod string
	// Ingress and Egress are nil where the pod is not isolated.
	Ingress, Egress *Group
}

// Group is all policies that isolate some pods in one direction; pods isolated by the same
// ones share it. Without policies it allows nothing.
type Group struct{ Policies []*Policy }

// Policy is one object, as far as rules for one direction go.
type Policy struct {
	Object *networkingv1.NetworkPolicy
	Rules  []*Rule
}

// Rule allows traffic between the subject and any of its peers, at any of its ports.
type Rule struct {
	Policy *Policy
	// Index is the rule's place in spec.ingress or spec.egress.
	Index int
	// Anyone: it does not matter who the peer is.
	Anyone bool
	Peers  []*Peer
	// Block is nil without an ipBlock.
	Block *Block
	// AnyPort: neither port nor protocol matter.
	AnyPort bool
	Ports   []Ports
}

// Ports is a range of ports, or those that pods call by a name.
type Ports struct {
	Proto       render.Proto
	First, Last uint16
	Name        *Name
}

// Peer is the addresses of all pods that a selector finds. ID says what it looks for, so
// that it stays the same while pods come and go.
type Peer struct {
	ID    string
	Addrs []netip.Addr // in order
}

// Has reports whether a is one of the addresses.
func (p *Peer) Has(a netip.Addr) bool {
	_, ok := slices.BinarySearchFunc(p.Addrs, a, netip.Addr.Compare)
	return ok
}

// Name is everything that listens at a port of a name. ID says which.
type Name struct {
	ID    string
	Ports []render.Port // in order
}

// Has reports whether p is one of the ports.
func (n *Name) Has(p render.Port) bool {
	_, ok := slices.BinarySearchFunc(n.Ports, p, render.Port.Compare)
	return ok
}

// Find returns the subject with an address.
func (p *Plan) Find(a netip.Addr) (*Subject, bool) {
	i, ok := slices.BinarySearchFunc(p.Subjects, a, func(s Subject, a netip.Addr) int { return s.Addr.Compare(a) })
	if !ok {
		return nil, false
	}
	return &p.Subjects[i], true
}

// Types says which directions a policy isolates; what it leaves out is what Kubernetes
// would fill in.
func Types(p *networkingv1.NetworkPolicy) (ingress, egress bool) {
	if len(p.Spec.PolicyTypes) == 0 {
		return true, len(p.Spec.Egress) > 0
	}
	return slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress), slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
}

func comparePolicies(a, b *networkingv1.NetworkPolicy) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
