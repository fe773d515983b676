package netplanetest

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
)

// Policies is what enforces network policies in a World. netplane/enforce is the one for
// kernels.
type Policies interface {
	Set(ctx context.Context, p *policy.Plan, ranges []netip.Prefix) (int, error)
	Read(ctx context.Context) (bool, error)
	Purge(ctx context.Context) error
}

// Sender is as much of a World as policies need.
type Sender interface {
	sender
	Services() (netplane.Services, error)
}

// sending is a World that can do no more than that.
type sending struct {
	World
	Sender
}

func (s sending) Services() (netplane.Services, error) { return s.Sender.Services() }

func (s sending) Send(from Host, proto render.Proto, to netip.AddrPort) (Verdict, error) {
	return s.Sender.Send(from, proto, to)
}

// portNames are the ports of a World by the names that policies and packets of this suite
// give them.
var portNames = map[string]render.Port{
	"tcp": {Proto: render.TCP, Port: TCPPort}, "second": {Proto: render.TCP, Port: SecondPort},
	"udp": {Proto: render.UDP, Port: UDPPort}, "sctp": {Proto: render.SCTP, Port: SCTPPort},
}

// RunPolicies tries the cases of recipes.go in one family, each as what follows the one
// before. Every packet to a pod is also sent to a service in front of it, so that w shows
// where its backend translates addresses.
func RunPolicies(t *testing.T, w Sender, p Policies, n Net) {
	s := &suite{w: sending{Sender: w}, n: n}
	s.open(t)
	var services []render.Service
	for i, h := range Pods {
		services = append(services, s.inFront(n.Service(i+1), h)...)
		services = append(services, s.inFront(n.Balanced(i+1), h)...)
	}
	s.sync(t, s.table(services...))
	for _, r := range recipes {
		t.Run(r.name, func(t *testing.T) {
			plan := s.set(t, p, r.cluster(t, n))
			s.try(t, r.allowed, true)
			s.try(t, r.blocked, false)
			if changed, err := p.Set(s.ctx(t), plan, []netip.Prefix{n.Range}); err != nil || changed != 0 {
				t.Errorf("the same once more: %d changes, %v", changed, err)
			}
			if ok, err := p.Read(s.ctx(t)); err != nil || !ok {
				t.Errorf("read back: %v, %v", ok, err)
			}
		})
	}
	if err := p.Purge(s.ctx(t)); err != nil {
		t.Fatal(err)
	}
	s.try(t, []string{"pod1 pod2 tcp", "outside pod3 udp"}, true)
}

// inFront are services with one endpoint, for all ports of a pod.
func (s *suite) inFront(at netip.Addr, h Host) (out []render.Service) {
	for _, p := range portNames {
		out = append(out, render.Service{
			Port: render.Port{Addr: at, Proto: p.Proto, Port: p.Port - 8000}, Endpoints: s.n.Endpoints(p.Port, h),
		})
	}
	return out
}

func (s *suite) set(t *testing.T, p Policies, c policy.Cluster) *policy.Plan {
	t.Helper()
	plan := policy.New(c)
	if _, err := p.Set(s.ctx(t), plan, []netip.Prefix{s.n.Range}); err != nil {
		t.Fatal(err)
	}
	return plan
}

// try sends packets, such as "pod1 pod2 tcp", all at once.
func (s *suite) try(t *testing.T, packets []string, allowed bool) {
	t.Helper()
	var wg sync.WaitGroup
	for _, p := range parse(packets, allowed) {
		via := []netip.AddrPort{netip.AddrPortFrom(s.n.Addr[p.To], p.Port)}
		if i := slices.Index(Pods, p.To); i >= 0 && p.Proto != render.ICMP {
			via = append(via, netip.AddrPortFrom(s.n.Balanced(i+1), p.Port-8000))
			if p.From != Outside { // which has no business there
				via = append(via, netip.AddrPortFrom(s.n.Service(i+1), p.Port-8000))
			}
		}
		for _, at := range via {
			wg.Go(func() { p.Try(t, s.w, at) })
		}
	}
	wg.Wait()
}

// Packet is what somebody sends, and whether it arrives.
type Packet struct {
	Text     string // "from to port"
	From, To Host
	Proto    render.Proto
	Port     uint16
	Allowed  bool
}

func parse(packets []string, allowed bool) (out []Packet) {
	for _, text := range packets {
		f := strings.Fields(text)
		p := Packet{Text: text, From: Host(f[0]), To: Host(f[1]), Proto: render.ICMP, Allowed: allowed}
		if f[2] != "ping" {
			p.Proto, p.Port = portNames[f[2]].Proto, portNames[f[2]].Port
		}
		out = append(out, p)
	}
	return out
}

// sender sends packets, as a World does.
type sender interface {
	Send(from Host, proto render.Proto, to netip.AddrPort) (Verdict, error)
}

// insist sends a packet. Where it should arrive, a few are sent before it is taken for dropped:
// the answer of a machine that is busy may be late.
func insist(w sender, from Host, proto render.Proto, to netip.AddrPort, arrives bool) (v Verdict, err error) {
	for range 4 {
		if v, err = w.Send(from, proto, to); err != nil || !v.Dropped || !arrives {
			break
		}
	}
	return v, err
}

// Try sends the packet to an address, and compares what comes of it.
func (p *Packet) Try(t *testing.T, w sender, at netip.AddrPort) {
	t.Helper()
	v, err := insist(w, p.From, p.Proto, at, p.Allowed)
	switch {
	case err != nil:
		t.Errorf("%s by %s: %v", p.Text, at, err)
	case v.To.IsValid() != p.Allowed:
		t.Errorf("%s by %s: %+v, want it allowed: %v", p.Text, at, v, p.Allowed)
	case !p.Allowed && v.Rejected:
		t.Errorf("%s by %s: the sender was told", p.Text, at)
	}
}

// Recipe is a case of policies as objects, for who has them enforced by whole nodes.
type Recipe struct {
	Name       string
	Policies   []*networkingv1.NetworkPolicy
	Namespaces []*corev1.Namespace
	Pods       map[Host]*corev1.Pod
	Packets    []Packet
}

// Recipes are the cases that RunPolicies tries, with the addresses that hosts have in n.
func Recipes(t *testing.T, n Net) (out []Recipe) {
	for i := range recipes {
		r := &recipes[i]
		out = append(out, Recipe{
			Name: r.name, Policies: r.objects(t, n), Namespaces: r.spaces(t), Pods: r.placed(t, n),
			Packets: append(parse(r.allowed, true), parse(r.blocked, false)...),
		})
	}
	return out
}

// recipe is a case of policies: who is who, and what may be sent.
type recipe struct {
	name string
	// pods are "namespace label=value,...".
	pods map[Host]string
	// namespaces are labels.
	namespaces map[string]string
	policies   string
	// allowed and blocked are packets: "from to port".
	allowed, blocked []string
}

// cluster is the recipe's cluster.
func (r *recipe) cluster(t *testing.T, n Net) policy.Cluster {
	t.Helper()
	return policy.Cluster{Policies: r.objects(t, n), Namespaces: r.spaces(t), Pods: policy.Everywhere(slices.Collect(maps.Values(r.placed(t, n))))}
}

func (r *recipe) spaces(t *testing.T) (out []*corev1.Namespace) {
	for name, text := range r.namespaces {
		out = append(out, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labelsOf(t, text)}})
	}
	return out
}

// placed are the recipe's pods.
func (r *recipe) placed(t *testing.T, n Net) map[Host]*corev1.Pod {
	out := map[Host]*corev1.Pod{}
	for h, text := range r.pods {
		ns, text, _ := strings.Cut(text, " ")
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: string(h), Labels: labelsOf(t, text)}, Status: corev1.PodStatus{PodIP: n.Addr[h].String()}}
		pod.Spec.Containers = []corev1.Container{{}}
		for name, p := range portNames {
			if name != "second" || h != Pod3 { // which calls no port so
				ports := &pod.Spec.Containers[0].Ports
				*ports = append(*ports, corev1.ContainerPort{Name: name, Protocol: corev1.Protocol(strings.ToUpper(p.Proto.String())), ContainerPort: int32(p.Port)})
			}
		}
		out[h] = pod
	}
	return out
}

// objects are the recipe's policies. In them NODE, POD3 and OUTSIDE stand for addresses with
// the length of the whole address, and ALL for every address.
func (r *recipe) objects(t *testing.T, n Net) (out []*networkingv1.NetworkPolicy) {
	t.Helper()
	whole := fmt.Sprint("/", n.Addr[Outside].BitLen())
	text := strings.NewReplacer("NODE", n.Addr[Node].String()+whole, "POD3", n.Addr[Pod3].String()+whole, "OUTSIDE", n.Addr[Outside].String()+whole,
		"ALL", netip.PrefixFrom(n.Addr[Outside], 0).Masked().String()).Replace(r.policies)
	for i, doc := range strings.Split(text, "---\n") {
		var np networkingv1.NetworkPolicy
		if err := yaml.UnmarshalStrict([]byte(doc), &np); err != nil {
			t.Fatalf("%s, policy %d: %v", r.name, i, err)
		}
		out = append(out, &np)
	}
	return out
}

func labelsOf(t *testing.T, text string) map[string]string {
	t.Helper()
	set, err := labels.ConvertSelectorToLabelsMap(text)
	if err != nil {
		t.Fatal(err)
	}
	return set
}
