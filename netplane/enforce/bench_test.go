package enforce_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/policy"
)

// crowd is 1,000 policies over 5,000 pods, the first of which are here: each policy lets one
// application of a namespace reach another one, at two ports.
func crowd(here int) policy.Cluster {
	var c policy.Cluster
	app := func(i int) map[string]string { return map[string]string{"app": fmt.Sprint("app", i)} }
	for i := range 5000 {
		a := netip.AddrFrom4([4]byte{10, 98, byte(i / 250), byte(i%250 + 1)})
		p := podAt(fmt.Sprint("p", i), app(i/5%20), a)
		p.Namespace, p.Here = fmt.Sprint("ns", i/100), i < here
		c.Pods = append(c.Pods, p)
	}
	for i := range 1000 {
		np := deny(fmt.Sprint("ns", i/20))
		np.Name = fmt.Sprint("p", i)
		np.Spec.PodSelector = metav1.LabelSelector{MatchLabels: app(i % 20)}
		np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{
			From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: app((i + 1) % 20)}}},
			Ports: []networkingv1.NetworkPolicyPort{{Port: portOf("8080")}, {Port: portOf("http")}},
		}}
		c.Policies = append(c.Policies, np)
	}
	return c
}

// BenchmarkCold: planning and programming 1,000 policies over 5,000 pods, all of which are
// on this node, or a hundred.
func BenchmarkCold(b *testing.B) {
	for _, here := range []int{100, 5000} {
		c := crowd(here)
		b.Run(fmt.Sprintf("plan/%d here", here), func(b *testing.B) {
			for b.Loop() {
				policy.New(c)
			}
		})
		b.Run(fmt.Sprintf("program/%d here", here), func(b *testing.B) {
			p := open(b, netplanetest.NewLab(b).Path[netplanetest.Node])
			plan := policy.New(c)
			for b.Loop() {
				set(b, p, plan)
				b.StopTimer()
				if err := p.Purge(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkOneChange: a pod comes or goes that one policy lets in; the plan is part of it or
// is not.
func BenchmarkOneChange(b *testing.B) {
	for _, here := range []int{100, 5000} {
		b.Run(fmt.Sprintf("%d here", here), func(b *testing.B) {
			c := crowd(here)
			more := c
			extra := podAt("extra", map[string]string{"app": "app1"}, netip.MustParseAddr("10.98.200.1"))
			extra.Namespace, extra.Here = "ns0", false
			more.Pods = append(c.Pods[:len(c.Pods):len(c.Pods)], extra)
			plans := [2]*policy.Plan{policy.New(c), policy.New(more)}
			p := open(b, netplanetest.NewLab(b).Path[netplanetest.Node])
			set(b, p, plans[0])
			for i := 1; b.Loop(); i++ {
				if n := set(b, p, plans[i%2]); n == 0 {
					b.Fatal("nothing changed")
				}
			}
		})
	}
}

// BenchmarkConnect: a TCP connection from one pod to another and a byte back, without
// policies, and with the last of some that isolate the server letting the client in.
func BenchmarkConnect(b *testing.B) {
	n := netplanetest.Nets[0]
	w := newWorld(b)
	p := open(b, w.Path[netplanetest.Node])
	to := netip.AddrPortFrom(n.Addr[netplanetest.Pod2], netplanetest.TCPPort).String()
	connect := func(b *testing.B) {
		err := netspace.Do(w.Path[netplanetest.Pod1], func() error {
			for b.Loop() {
				c, err := net.Dial("tcp", to)
				if err != nil {
					return err
				}
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	for round := range 3 { // by turns: the machine is shared
		for _, policies := range []int{0, 1, 50} {
			b.Run(fmt.Sprintf("%d policies/%d", policies, round), func(b *testing.B) {
				set(b, p, isolating(n, policies))
				connect(b)
			})
		}
	}
}

// BenchmarkStream is the same for what is sent over one connection.
func BenchmarkStream(b *testing.B) {
	n := netplanetest.Nets[0]
	w := newWorld(b)
	p := open(b, w.Path[netplanetest.Node])
	for round := range 3 {
		for _, policies := range []int{0, 1, 50} {
			b.Run(fmt.Sprintf("%d policies/%d", policies, round), func(b *testing.B) {
				set(b, p, isolating(n, policies))
				c := dial(b, w, netplanetest.Pod1, n.Addr[netplanetest.Pod2])
				go func() { _, _ = io.Copy(io.Discard, c.tcp[1]) }()
				buf := make([]byte, 64<<10)
				b.SetBytes(int64(len(buf)))
				for b.Loop() {
					if _, err := c.tcp[0].Write(buf); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// isolating are some policies that isolate a pod, of which the last lets the client in.
func isolating(n netplanetest.Net, policies int) *policy.Plan {
	c := policy.Cluster{Pods: []policy.Pod{podAt("one", nil, n.Addr[netplanetest.Pod1]), podAt("two", nil, n.Addr[netplanetest.Pod2])}}
	for i := range policies {
		np := deny("shop", fmt.Sprintf("172.16.%d.0/24", i))
		np.Name = fmt.Sprintf("p%02d", i)
		if i == policies-1 {
			np.Spec.Ingress[0].From = []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}
		}
		c.Policies = append(c.Policies, np)
	}
	return policy.New(c)
}
