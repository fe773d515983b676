package netbench

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"

	"decree.dev/decree/netplane/render"
)

// Addresses: services are in 10.96.0.0/12, endpoints in 10.128.0.0/9.
const (
	serviceBase  = 10<<24 | 96<<16
	endpointBase = 10<<24 | 128<<16
	// served is the address of the pod that answers, called that of the one that asks.
	served, caller = "10.250.0.2", "10.250.0.3"
)

func ip4(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// maker makes endpoints that nobody has yet.
type maker struct {
	rnd  *rand.Rand
	next uint32
}

func (m *maker) endpoint() netip.AddrPort {
	m.next++
	return netip.AddrPortFrom(ip4(endpointBase+m.next%(1<<22)), 8080)
}

// makeTable is a table with n services of one to most endpoints, the same each time.
func makeTable(n, most int) render.Table {
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	t := render.Table{Range: p("10.96.0.0/12"), Cluster: p("10.128.0.0/9"), Pods: p("10.250.0.0/24")}
	m := &maker{rnd: rand.New(rand.NewPCG(1, 2))}
	for i := range n {
		s := render.Service{Port: render.Port{Addr: ip4(serviceBase + uint32(i) + 1), Proto: render.TCP, Port: 80}}
		for range 1 + m.rnd.IntN(most) {
			s.Endpoints = append(s.Endpoints, m.endpoint())
		}
		slices.SortFunc(s.Endpoints, netip.AddrPort.Compare)
		t.Services = append(t.Services, s)
	}
	return t
}

// endpoints is how many there are.
func endpoints(t *render.Table) (n int) {
	for i := range t.Services {
		n += len(t.Services[i].Endpoints)
	}
	return n
}

// change is a table in which the services at some places differ.
func change(t render.Table, places []int, how func(*render.Service)) render.Table {
	t.Services = slices.Clone(t.Services)
	for _, i := range places {
		s := &t.Services[i]
		s.Endpoints = slices.Clone(s.Endpoints)
		how(s)
		slices.SortFunc(s.Endpoints, netip.AddrPort.Compare)
	}
	return t
}
