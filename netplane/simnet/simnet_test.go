package simnet

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/render"
)

// world is a Kernel with the suite's hosts.
type world struct{ k *Kernel }

func (w world) Services() (netplane.Services, error) { return w.k, nil }

func (w world) Send(from netplanetest.Host, proto render.Proto, to netip.AddrPort) (netplanetest.Verdict, error) {
	for _, n := range netplanetest.Nets {
		if n.Addr[from].Is4() != to.Addr().Is4() {
			continue
		}
		src := n.Addr[from]
		switch {
		case from != netplanetest.Node:
		case n.Range.Contains(to.Addr()) || to.Addr() == n.Uplink:
			src = to.Addr() // service addresses are local to a node
		case !n.Cluster.Contains(to.Addr()):
			src = n.Uplink
		}
		v, err := w.k.Send(src, render.Port{Addr: to.Addr(), Proto: proto, Port: to.Port()})
		return netplanetest.Verdict{To: v.To, From: v.From, Rejected: v.Rejected, Dropped: v.Dropped}, err
	}
	return netplanetest.Verdict{}, fmt.Errorf("no family for %s", to)
}

func (w world) Tamper(p render.Port) error {
	w.k.Tamper(func(t *render.Table) {
		svc, _ := t.Find(p)
		svc.Endpoints = svc.Endpoints[:len(svc.Endpoints)-1]
	})
	return nil
}

func (w world) Break() error {
	w.k.Tamper(func(t *render.Table) { t.Range = nil })
	return nil
}

func (w world) Leftovers() (string, error) {
	if w.k.Made() {
		return "a table", nil
	}
	return "", nil
}

func newKernel(now func() time.Time) *Kernel {
	var node []Address
	for _, n := range netplanetest.Nets {
		node = append(node, Address{n.Addr[netplanetest.Node], n.Cluster})
	}
	for _, n := range netplanetest.Nets {
		node = append(node, Address{n.Uplink, netip.PrefixFrom(n.Uplink, 0).Masked()})
	}
	k := New(1, now, node...)
	k.Serve(render.TCP, netplanetest.TCPPort)
	k.Serve(render.TCP, netplanetest.SecondPort)
	k.Serve(render.UDP, netplanetest.UDPPort)
	for _, n := range netplanetest.Nets {
		for h, a := range n.Addr {
			if h != netplanetest.Node {
				k.AddHost(a)
			}
		}
	}
	return k
}

func TestConformance(t *testing.T) { netplanetest.Run(t, world{newKernel(time.Now)}) }

func TestAffinityEnds(t *testing.T) {
	now := time.Unix(0, 0)
	k := newKernel(func() time.Time { return now })
	n := netplanetest.Nets[0]
	svc := render.Service{
		Port:      render.Port{Addr: n.Service(1), Proto: render.TCP, Port: 80},
		Endpoints: n.Endpoints(8080, netplanetest.Pods...), Affinity: time.Minute,
	}
	if _, err := k.Sync(context.Background(), render.Table{Services: []render.Service{svc}, Cluster: []netip.Prefix{n.Cluster}}); err != nil {
		t.Fatal(err)
	}
	draws := func(gap time.Duration) int {
		got := map[netip.AddrPort]bool{}
		for range 40 {
			v, err := k.Send(n.Addr[netplanetest.Outside], svc.Port)
			if err != nil || !v.To.IsValid() {
				t.Fatalf("%+v, %v", v, err)
			}
			got[v.To] = true
			now = now.Add(gap)
		}
		return len(got)
	}
	if got := draws(59 * time.Second); got != 1 {
		t.Errorf("within the timeout: %d endpoints, want 1", got)
	}
	if got := draws(time.Minute); got != 3 {
		t.Errorf("beyond the timeout: %d endpoints, want 3", got)
	}
}
