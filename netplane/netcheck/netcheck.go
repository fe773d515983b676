// Package netcheck plans a check of a cluster's network and says what came of it: which
// node sends which probes, what the answers mean, and what to look at where there was none.
//
// It is pure: no clock, no I/O, no goroutines. netplane/reach sends the probes of one node;
// who asks the nodes, and for whom, is for the caller.
package netcheck

import (
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The bounds of one check, so that it stays small in a large cluster.
const (
	// MaxTargets is how many other nodes each node tries. In larger clusters every node
	// is tried by as many others.
	MaxTargets = 16
	// MaxServices is how many services each node tries.
	MaxServices = 8
)

// Kind is what a probe is about.
type Kind string

// The kinds of probes. The first three are ICMP echoes (RFC 792, RFC 4443), small ones and
// one as large as the way is said to take; a service is a TCP connection, or a datagram where
// it takes UDP, and DNS a query.
const (
	NodeToNode   Kind = "nodeToNode"
	NodeToPod    Kind = "nodeToPod"
	PodToPod     Kind = "podToPod"
	PodToService Kind = "podToService"
	PodToUDP     Kind = "podToServiceUDP"
	NodeToDNS    Kind = "nodeToDNS"
	PodToDNS     Kind = "podToDNS"
)

// Kinds are all kinds, in the order of what builds on what.
var Kinds = []Kind{NodeToNode, NodeToPod, PodToPod, PodToService, PodToUDP, NodeToDNS, PodToDNS}

// FromPod reports whether probes of this kind come from the network namespace of a pod, and
// not from that of the node.
func (k Kind) FromPod() bool {
	return k == PodToPod || k == PodToService || k == PodToUDP || k == PodToDNS
}

// Cluster is everything that a check is planned from. The objects are shared and never
// modified.
type Cluster struct {
	Nodes      []*corev1.Node
	Pods       []*corev1.Pod
	Services   []*corev1.Service
	Slices     []*discoveryv1.EndpointSlice
	Policies   []*networkingv1.NetworkPolicy
	Namespaces []*corev1.Namespace
	DNS        netip.Addr
	Domain     string // of cluster DNS
}

// The conversation with one node: it gets Begin and answers with End; it gets a list of
// probes and answers with an Outcome for each, in their order. When the other side closes,
// the node takes away what it made.

// Begin asks a node to take part.
type Begin struct {
	// Pod is the pod of the node whose network namespace is used, by uid; empty: the node
	// makes a namespace and attaches it like that of a pod.
	Pod types.UID `json:"pod,omitempty"`
}

// End is the pod's end of a node's part.
type End struct {
	// Addresses are those of the namespace, the primary family first.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Error is why there is none; the node itself takes part all the same.
	Error string `json:"error,omitempty"`
}

// Probe is something to try.
type Probe struct {
	Kind Kind `json:"kind"`
	// To is whom it is to reach: a node, NAMESPACE/NAME:PORT of a service (with /UDP
	// behind it if that is meant), a DNS name.
	To      string     `json:"to"`
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port,omitempty"` // none for echoes
	// Want is the address that a name should have; invalid where any answer will do.
	Want netip.Addr `json:"want,omitzero"`
	// Names says that a service which takes UDP is one of names: it gets a query for the root,
	// which every name server answers with something, and has to answer. Others get an empty
	// datagram.
	Names bool `json:"names,omitempty"`
}

// Outcome is what came of a probe.
type Outcome struct {
	// Latency is the quickest answer's; zero if there was none.
	Latency time.Duration `json:"latencyNanoseconds,omitempty"`
	// Lost of Sent packets, counted for echoes, were not answered.
	Sent int `json:"sent,omitempty"`
	Lost int `json:"lost,omitempty"`
	// Silent says that nobody answered a datagram, and that nobody refused it: it may have been
	// lost, or come to who has nothing to say to it. No more is known without the protocol of
	// a service; this is neither success nor failure.
	Silent bool `json:"silent,omitempty"`
	// TooLarge is the size in bytes of an IP packet that was lost where small ones pass.
	TooLarge int `json:"tooLarge,omitempty"`
	// Error is why the probe failed; empty if it did not.
	Error string `json:"error,omitempty"`
}

// Check is a probe with its outcome.
type Check struct {
	From string `json:"from"` // node
	Probe
	Outcome
}

// Node is a node's part.
type Node struct {
	Name string `json:"name"`
	// Pod is NAMESPACE/NAME of the pod that stands for the node's pods; empty: a namespace
	// was made for the check.
	Pod string `json:"pod,omitempty"`
	End
}

// Report is what came of a check.
type Report struct {
	OK    bool   `json:"ok"`
	Nodes []Node `json:"nodes"` // by name
	// Checks are ordered by kind, then by the nodes that they come from.
	Checks []Check `json:"checks"`
	// Services are those that were tried; Skipped says why others were not.
	Services []string `json:"services"`
	Skipped  []string `json:"skipped,omitempty"`
	// Advice says what to look at, the most basic trouble first.
	Advice []string `json:"advice,omitempty"`
}
