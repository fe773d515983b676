package dns

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane/render"
)

// TestSetWhileAsked: whoever asks gets the old answer or the new one, and after Set the
// new one only.
func TestSetWhileAsked(t *testing.T) {
	d := fixture()
	at := func(ip string) render.Desired {
		next := d
		next.Services = append(slices.Clone(d.Services), svc("default", "moves", corev1.ServiceSpec{ClusterIP: ip}))
		return next
	}
	s := New(Config{})
	s.Set(at("10.97.1.0"))
	addr := serve(t, s)
	var asking sync.WaitGroup
	ended := make(chan struct{})
	for range 3 {
		asking.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				if m := exchange(t, "udp", addr, new(dns.Msg).SetQuestion("moves.default.svc.cluster.local.", dns.TypeA)); len(m.Answer) != 1 {
					t.Error(brief(m))
				}
			}
		})
	}
	for i := range 200 {
		ip := fmt.Sprintf("10.97.1.%d", i)
		s.Set(at(ip))
		if got := brief(exchange(t, "udp", addr, new(dns.Msg).SetQuestion("moves.default.svc.cluster.local.", dns.TypeA))); got != "NOERROR, A "+ip {
			t.Errorf("after Set: %s, want %s", got, ip)
		}
	}
	close(ended)
	asking.Wait()
}

// TestDomainChanges: what upstream said of a name is not said of it once it is the
// cluster's.
func TestDomainChanges(t *testing.T) {
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.1")}
	})
	s := New(Config{Upstreams: addrPorts(up)})
	s.Set(fixture())
	ask := asker(t, s)
	if got := ask("web.default.svc.other.test."); got != "NOERROR, A 192.0.2.1 for 60 s" {
		t.Error(got)
	}
	d := fixture()
	d.Domain = "other.test"
	s.Set(d)
	if got := ask("web.default.svc.other.test."); got != "NOERROR, A 10.97.0.80 for 5 s" {
		t.Error(got)
	}
	if got := ask("web.default.svc.cluster.local."); got != "NOERROR, A 192.0.2.1 for 60 s" {
		t.Error(got)
	}
}
