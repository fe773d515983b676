package netplanetest

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/render"
)

// Compare gives random services to a kernel and to the model, and sends both random
// packets: what becomes of them must be the same, and every endpoint that the model may
// choose must be reached. Cases follow each other on the same tables, so that each is a
// random change as well.
func Compare(t *testing.T, w World) {
	model := NewModel(1, time.Now)
	real, err := w.Services()
	if err != nil {
		t.Fatal(err)
	}
	past := map[render.Port]bool{} // listed once
	rapid.Check(t, func(rt *rapid.T) {
		s := &suite{w: w, n: rapid.SampledFrom(Nets).Draw(rt, "family")}
		table := render.Render(s.drawDesired(rt))
		for _, k := range []netplane.Services{real, model.Kernel} {
			if _, err := k.Sync(rt.Context(), table); err != nil {
				rt.Fatal(err)
			}
		}
		if got, err := real.Read(rt.Context()); err != nil || !got.Equal(table) {
			rt.Fatalf("read back\n%+v\nafter sync of\n%+v\n%v", got, table, err)
		}
		if l, ok := w.(Rememberer); ok {
			s.checkRemembered(rt, l, &table)
		}
		var wg sync.WaitGroup
		failures := make([]string, 6)
		d, ok := real.(interface{ Draining() int })
		draining := ok && d.Draining() > 0
		sent := map[string]bool{} // first packets at a time may each find a place for a client that is to have one
		for i := range failures {
			from, to := s.drawPacket(rt, &table)
			if what := fmt.Sprint(from, to); !sent[what] {
				sent[what] = true
				_, listed := table.Find(to)
				ending := draining && past[to] && !listed
				wg.Go(func() { failures[i] = compare(w, model, &table, from, to, ending) })
			}
		}
		wg.Wait()
		for i := range table.Services {
			past[table.Services[i].Port] = true
		}
		for _, f := range failures {
			if f != "" {
				rt.Errorf("%s; near %v, services\n%+v", f, table.Near, table.Services)
			}
		}
	})
}

// checkRemembered fails if a UDP flow goes where its service does not lead: a client that gets
// its port again would follow it.
func (s *suite) checkRemembered(t *rapid.T, w Rememberer, table *render.Table) {
	flows, err := w.Remembered()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		p := render.Port{Addr: f.Orig.Dst.Addr(), Proto: render.Proto(f.Proto), Port: f.Orig.Dst.Port()}
		if p.Proto != render.UDP {
			continue
		}
		svc, found := table.Find(p)
		allowed := []netip.AddrPort{f.Orig.Dst}
		if found && len(svc.Endpoints)+len(svc.Outside) > 0 {
			allowed = slices.Concat(svc.Endpoints, svc.Outside)
		}
		if !slices.Contains(allowed, f.Reply.Src) {
			t.Errorf("a flow is left: %v, answered as %v; service: %v, may lead to %v", f.Orig, f.Reply, found, allowed)
		}
	}
}

// compare sends packets from one client to one port, and says what is wrong. A service that is
// ending may refuse, until its last connections have gone.
func compare(w World, m Model, table *render.Table, from Host, to render.Port, ending bool) string {
	want, err := m.Outcomes(from, to)
	if err != nil {
		return err.Error()
	}
	if from == Node && to.Proto != render.TCP && want[0].Dropped {
		// Dropped on the way out is an error of sending, dropped by the next host is not.
		want = []Verdict{{Dropped: true}, {Rejected: true}}
	}
	if ending && want[0].Dropped {
		want = []Verdict{{Dropped: true}, {Rejected: true}}
	}
	for i := range want {
		want[i] = m.unified(want[i])
	}
	svc, _ := table.Find(to)
	sticky := svc != nil && svc.Affinity > 0
	seen := map[Verdict]bool{}
	lost := 0
	// One of five is missed 100 times once in five thousand million.
	for range 100 {
		v, err := w.Send(from, to.Proto, netip.AddrPortFrom(to.Addr, to.Port))
		if err != nil {
			return fmt.Sprintf("from %s to %s: %v", from, to, err)
		}
		if v.Dropped && !slices.Contains(want, v) && lost < 2 { // by a machine that is busy
			lost++
			continue
		}
		if v = m.unified(v); !slices.Contains(want, v) {
			return fmt.Sprintf("from %s to %s: %+v, the model has %+v", from, to, v, want)
		}
		seen[v] = true
		if len(seen) == len(want) || v.Dropped || v.Rejected || sticky && len(seen) == 1 && len(want) > 1 && lost > 3 {
			return ""
		}
		if sticky {
			lost = max(lost, 3) + 1 // two more, which have to go the same way
		}
	}
	return fmt.Sprintf("from %s to %s only %v, the model has %+v", from, to, seen, want)
}

// unified is v with one address for all of the node's, if the node sent to itself: which one
// it takes then is nobody's business.
func (Model) unified(v Verdict) Verdict {
	for _, n := range Nets {
		own := func(a netip.Addr) bool { return a == n.Addr[Node] || a == n.Uplink }
		if own(v.To.Addr()) && own(v.From) {
			v.From = n.Uplink
		}
	}
	return v
}

// pool are the addresses that packets go to and services may want.
func (s *suite) pool() []netip.Addr {
	return []netip.Addr{s.n.Service(1), s.n.Service(2), s.n.Service(3), s.n.Balanced(1), s.n.Balanced(2), s.n.Uplink}
}

func (s *suite) drawPacket(t *rapid.T, table *render.Table) (Host, render.Port) {
	from := rapid.SampledFrom([]Host{Pod1, Pod2, Pod3, Node, Outside}).Draw(t, "from")
	if len(table.Services) > 0 && rapid.IntRange(0, 3).Draw(t, "listed") > 0 {
		return from, table.Services[rapid.IntRange(0, len(table.Services)-1).Draw(t, "to")].Port
	}
	to := render.Port{
		Addr:  rapid.SampledFrom(s.pool()).Draw(t, "to address"),
		Proto: rapid.SampledFrom([]render.Proto{render.TCP, render.UDP, render.SCTP}).Draw(t, "to protocol"),
		Port:  rapid.SampledFrom([]uint16{80, 81, 30080, 30081, TCPPort}).Draw(t, "to port"),
	}
	if _, listed := table.Find(to); !listed && to.Addr == s.n.Uplink && to.Proto == render.SCTP {
		to.Proto = render.TCP // whether a node without SCTP says so depends on who else listens
	}
	return from, to
}

func (s *suite) drawDesired(t *rapid.T) render.Desired {
	d := s.desired(&serviceCase{name: "none"})
	d.Services, d.Slices = nil, nil
	if rapid.Bool().Draw(t, "nothing announced") {
		d.Announced = nil
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "services") {
		svc := s.drawService(t, i)
		d.Services = append(d.Services, svc)
		for _, p := range svc.Spec.Ports {
			d.Slices = append(d.Slices, s.drawSlice(t, svc.Name, p))
		}
	}
	return d
}

func (s *suite) drawService(t *rapid.T, i int) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprint("s", i)}}
	spec := &svc.Spec
	spec.ClusterIP = s.n.Service(i + 1).String()
	if rapid.IntRange(0, 9).Draw(t, "headless") == 0 {
		spec.ClusterIP = corev1.ClusterIPNone
	}
	spec.Type = rapid.SampledFrom([]corev1.ServiceType{"ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"}).Draw(t, "type")
	for j := range rapid.IntRange(1, 2).Draw(t, "ports") {
		spec.Ports = append(spec.Ports, corev1.ServicePort{
			Name: fmt.Sprint("p", j), Port: int32(servicePort + j), NodePort: rapid.SampledFrom([]int32{0, 30080, 30081}).Draw(t, "node port"),
			Protocol: rapid.SampledFrom([]corev1.Protocol{"TCP", "TCP", "UDP", "SCTP"}).Draw(t, "protocol"),
		})
	}
	for _, a := range s.drawAddrs(t, "ingress") {
		svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
	}
	spec.ExternalIPs = s.drawAddrs(t, "external")
	if rapid.IntRange(0, 2).Draw(t, "guarded") == 0 {
		from(rapid.SliceOfDistinct(rapid.SampledFrom([]Host{Pod1, Pod3, Node, Outside}), rapid.ID).Draw(t, "sources")...)(s, spec)
	}
	if rapid.Bool().Draw(t, "external local") {
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	}
	if rapid.IntRange(0, 3).Draw(t, "internal local") == 0 {
		local := corev1.ServiceInternalTrafficPolicyLocal
		spec.InternalTrafficPolicy = &local
	}
	if p := rapid.SampledFrom([]string{"", "", "PreferClose", "PreferSameNode"}).Draw(t, "preference"); p != "" {
		spec.TrafficDistribution = &p
	}
	if rapid.IntRange(0, 3).Draw(t, "affinity") == 0 {
		spec.SessionAffinity = corev1.ServiceAffinityClientIP
	}
	return svc
}

func (s *suite) drawAddrs(t *rapid.T, what string) (out []string) {
	for _, a := range rapid.SliceOfNDistinct(rapid.SampledFrom(s.pool()), 0, 2, rapid.ID).Draw(t, what) {
		out = append(out, a.String())
	}
	return out
}

func (s *suite) drawSlice(t *rapid.T, svc string, p corev1.ServicePort) *discoveryv1.EndpointSlice {
	port := map[corev1.Protocol]int32{"TCP": TCPPort, "UDP": UDPPort, "SCTP": SCTPPort}[p.Protocol]
	hosts := []string{"pod1", "pod2", "pod3", "outside", "node"}
	if p.Protocol == corev1.ProtocolSCTP {
		hosts = hosts[:4]
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Labels: map[string]string{discoveryv1.LabelServiceName: svc}},
		AddressType: cmp.Or(map[bool]discoveryv1.AddressType{true: discoveryv1.AddressTypeIPv6}[s.n.Uplink.Is6()], discoveryv1.AddressTypeIPv4),
		Ports:       []discoveryv1.EndpointPort{{Name: &p.Name, Protocol: &p.Protocol, Port: &port}},
	}
	for _, host := range rapid.SliceOfDistinct(rapid.SampledFrom(hosts), rapid.ID).Draw(t, "endpoints") {
		state := rapid.SampledFrom([]string{"", "", "", " ending", " unready"}).Draw(t, "state")
		slice.Endpoints = append(slice.Endpoints, s.endpoint(host+state))
	}
	return slice
}
