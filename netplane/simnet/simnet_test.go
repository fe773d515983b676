package simnet_test

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/render"
)

func TestConformance(t *testing.T) { netplanetest.Run(t, netplanetest.NewModel(1, time.Now)) }

func TestAffinityEnds(t *testing.T) {
	now := time.Unix(0, 0)
	k := netplanetest.NewModel(1, func() time.Time { return now }).Kernel
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
