package ipvs

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"decree.dev/decree/netplane/render"
)

// server is an endpoint as IPVS holds it. Weight zero: no new connections.
type server struct {
	addr   netip.AddrPort
	weight uint32
	// conns is how many connections there are, those about to end included.
	conns uint64
	// odd: not as this package makes them, in ways that are of no interest here.
	odd bool
}

// key is what IPVS finds a service by: its port or, if that is not zero, a packet mark,
// together with the family of Addr.
type key struct {
	render.Port
	mark uint32
}

// String is the port, or "mark 0x12000 of ipv4".
func (k key) String() string {
	switch {
	case k.mark == 0:
		return k.Port.String()
	case k.Addr.Is4():
		return fmt.Sprintf("mark %#x of ipv4", k.mark)
	}
	return fmt.Sprintf("mark %#x of ipv6", k.mark)
}

func (k key) compare(o key) int { return cmp.Or(cmp.Compare(k.mark, o.mark), k.Port.Compare(o.Port)) }

// byMark is the key of services found by a mark; Addr stands for its family.
func byMark(mark uint32, family netip.Addr) key {
	k := key{mark: mark}
	if k.Addr = netip.IPv6Unspecified(); family.Is4() {
		k.Addr = netip.IPv4Unspecified()
	}
	return k
}

// virtual is a service as IPVS holds it.
type virtual struct {
	key
	scheduler string
	affinity  time.Duration
	odd       bool
	used      bool     // it has had connections
	servers   []server // in the order of their addresses
}

// sameHeader reports whether both agree in all but their servers.
func (v *virtual) sameHeader(w *virtual) bool {
	return v.scheduler == w.scheduler && v.affinity == w.affinity && v.odd == w.odd
}

// verb is what a command does.
type verb uint8

const (
	newService verb = iota
	setService
	delService // and its servers
	newServer
	setServer
	delServer
)

// command is one change of what IPVS holds. server counts for verbs of servers only.
type command struct {
	verb    verb
	service *virtual // of its servers nothing counts
	server  server
}

// String says what a command does, for errors.
func (c command) String() string {
	what := [...]string{"new service", "change service", "remove service", "new endpoint", "change endpoint", "remove endpoint"}[c.verb]
	if c.verb < newServer {
		return what + " " + c.service.key.String()
	}
	return fmt.Sprintf("%s %s of %s", what, c.server.addr, c.service.key)
}

// wanted is what IPVS shall hold of a service; nothing if it has no endpoints. choose
// returns the scheduler for what a service asks for.
func wanted(s *render.Service, choose func(asked string) string) *virtual {
	if s == nil || len(s.Endpoints) == 0 {
		return nil
	}
	return balanced(key{Port: s.Port}, choose(s.Scheduler), s.Affinity, s.Endpoints)
}

// apart are the endpoints of clients from outside, if they have a virtual service of their
// own: where they are led elsewhere, and for UDP at addresses outside all ranges, where they
// may be tomorrow. IPVS looks for a flow that it knows before it looks at marks, and a flow
// of the service for all could not be led away without taking the endpoint from everybody.
func apart(s *render.Service, ranges []netip.Prefix) []netip.AddrPort {
	switch {
	case s == nil:
		return nil
	case s.Split:
		return s.Outside
	case s.Proto == render.UDP && !contains(ranges, s.Addr):
		return s.Endpoints
	}
	return nil
}

// wantedOutside is what IPVS shall hold for clients from outside that are led to eps; they
// are found by a mark. Services of marks cannot keep clients and change ports, so that
// affinity is by the hash of the client there, which few lose when endpoints change.
func wantedOutside(s *render.Service, eps []netip.AddrPort, choose func(asked string) string, mark uint32) *virtual {
	if len(eps) == 0 {
		return nil
	}
	asked := s.Scheduler
	if s.Affinity > 0 {
		asked = "mh"
	}
	return balanced(byMark(mark, s.Addr), choose(asked), 0, eps)
}

func balanced(k key, scheduler string, affinity time.Duration, eps []netip.AddrPort) *virtual {
	v := &virtual{key: k, scheduler: scheduler, affinity: affinity, servers: make([]server, 0, len(eps))}
	for _, ep := range eps {
		v.servers = append(v.servers, server{addr: ep, weight: 1})
	}
	return v
}

// change returns the commands that lead from have to want, either of which may be
// nil, and what IPVS holds then.
//
// Servers that are not wanted any more get weight zero and stay, for the sake of
// their connections, unless cut says that there is nothing to wait for. What is new
// comes first, so that a service that has endpoints before and after has some all
// the time.
func change(have, want *virtual, cut func(*virtual, netip.Addr) bool) (cmds []command, left *virtual) {
	if have == nil && want == nil {
		return nil, nil
	}
	if want == nil {
		return retire(have, cut)
	}
	left = &virtual{key: want.key, scheduler: want.scheduler, affinity: want.affinity}
	var old []server
	if have == nil {
		cmds = append(cmds, command{verb: newService, service: left})
	} else {
		old = have.servers
		if !have.sameHeader(want) {
			cmds = append(cmds, command{verb: setService, service: left})
		}
	}
	var ended []command
	both(old, want.servers, func(o, w *server) {
		switch {
		case o == nil:
			cmds = append(cmds, command{newServer, left, *w})
		case w == nil:
			if c, stays := end(left, o, cut); stays {
				ended = append(ended, c...)
				left.servers = append(left.servers, server{addr: o.addr})
			} else {
				ended = append(ended, c...)
			}
			return
		case o.weight != w.weight || o.odd:
			cmds = append(cmds, command{setServer, left, *w})
		}
		left.servers = append(left.servers, *w)
	})
	return append(cmds, ended...), left
}

// retire ends a service.
func retire(have *virtual, cut func(*virtual, netip.Addr) bool) (cmds []command, left *virtual) {
	left = &virtual{key: have.key, scheduler: have.scheduler, affinity: have.affinity, odd: have.odd}
	for i := range have.servers {
		c, stays := end(left, &have.servers[i], cut)
		cmds = append(cmds, c...)
		if stays {
			left.servers = append(left.servers, server{addr: have.servers[i].addr})
		}
	}
	if len(left.servers) == 0 {
		return []command{{verb: delService, service: left}}, nil
	}
	return cmds, left
}

// end ends a server, at once or by giving it no more connections.
func end(of *virtual, s *server, cut func(*virtual, netip.Addr) bool) (cmds []command, stays bool) {
	switch {
	case cut(of, s.addr.Addr()):
		return []command{{delServer, of, *s}}, false
	case s.weight != 0 || s.odd:
		return []command{{setServer, of, server{addr: s.addr}}}, true
	}
	return nil, true
}

// both walks two lists of servers, in order; either argument of each may be nil.
func both(a, b []server, each func(a, b *server)) {
	for len(a) > 0 || len(b) > 0 {
		c := 0
		switch {
		case len(a) == 0:
			c = 1
		case len(b) == 0:
			c = -1
		default:
			c = a[0].addr.Compare(b[0].addr)
		}
		switch {
		case c < 0:
			each(&a[0], nil)
			a = a[1:]
		case c > 0:
			each(nil, &b[0])
			b = b[1:]
		default:
			each(&a[0], &b[0])
			a, b = a[1:], b[1:]
		}
	}
}

// drained returns the commands that remove the servers without weight whose
// connections ended, or that over says have had their time, and what is left. listed:
// the service itself stays.
func drained(have *virtual, listed bool, over func(server) bool) (cmds []command, left *virtual) {
	left = &virtual{key: have.key, scheduler: have.scheduler, affinity: have.affinity, odd: have.odd}
	for _, s := range have.servers {
		if s.weight == 0 && (s.conns == 0 || over(s)) {
			cmds = append(cmds, command{delServer, left, s})
		} else {
			left.servers = append(left.servers, s)
		}
	}
	if len(left.servers) == 0 && !listed {
		return []command{{verb: delService, service: left}}, nil
	}
	return cmds, left
}

// live are the endpoints that get connections.
func (v *virtual) live() (out []netip.AddrPort) {
	if v != nil {
		for _, x := range v.servers {
			if x.weight > 0 {
				out = append(out, x.addr)
			}
		}
	}
	return out
}

// waiting are the servers without weight.
func (v *virtual) waiting() []netip.AddrPort {
	var out []netip.AddrPort
	if v != nil {
		for _, x := range v.servers {
			if x.weight == 0 {
				out = append(out, x.addr)
			}
		}
	}
	return out
}

func sortServers(s []server) {
	slices.SortFunc(s, func(a, b server) int { return a.addr.Compare(b.addr) })
}

func sortServices(s []render.Service) {
	slices.SortFunc(s, func(a, b render.Service) int { return a.Compare(b.Port) })
}
