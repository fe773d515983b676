package dns

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane/render"
)

func BenchmarkQuick(b *testing.B) {
	s := New(Config{})
	s.Set(fixture())
	for _, c := range []struct {
		what, name string
	}{
		{"service", "web.default.svc.cluster.local."}, {"absent", "nope.default.svc.cluster.local."}, {"headless200", "many.default.svc.cluster.local."},
	} {
		msg, err := new(dns.Msg).SetQuestion(c.name, dns.TypeA).Pack()
		if err != nil {
			b.Fatal(err)
		}
		b.Run(c.what, func(b *testing.B) {
			w := &worker{}
			b.ReportAllocs()
			for b.Loop() {
				s.quick(w, msg, true)
			}
		})
		b.Run(c.what+"/first", func(b *testing.B) {
			w := &worker{}
			b.ReportAllocs()
			for b.Loop() {
				if w.q.read(msg) != 0 || s.local(s.zone.Load(), &w.q) == nil {
					b.Fatal("no answer")
				}
			}
		})
	}
}

func large(n int) render.Desired {
	d := fixture()
	for i := range n {
		d.Services = append(d.Services, svc(fmt.Sprintf("ns%d", i%100), fmt.Sprintf("svc-%d", i), corev1.ServiceSpec{
			ClusterIP: netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}).String(), Ports: []corev1.ServicePort{{Name: "http", Port: 80}},
		}))
	}
	return d
}

func BenchmarkNewZone(b *testing.B) {
	for _, n := range []int{1000, 30_000} {
		d := large(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				newZone(d)
			}
		})
	}
}
