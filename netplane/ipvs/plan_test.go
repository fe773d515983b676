package ipvs

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/netplane/wire"
)

// model is IPVS as far as commands go.
type model map[render.Port]*virtual

// do carries out a command and refuses what the kernel would refuse.
func (m model) do(c command) error {
	p := c.service.Port
	v := m[p]
	switch c.verb {
	case newService:
		if v != nil {
			return errors.New("service exists")
		}
		m[p] = &virtual{key: key{Port: p}, scheduler: c.service.scheduler, affinity: c.service.affinity}
		return nil
	case setService, delService:
		if v == nil {
			return errors.New("no such service")
		}
		if c.verb == delService {
			delete(m, p)
			return nil
		}
		v.scheduler, v.affinity, v.odd = c.service.scheduler, c.service.affinity, false
		return nil
	}
	if v == nil {
		return errors.New("no such service")
	}
	i := slices.IndexFunc(v.servers, func(s server) bool { return s.addr == c.server.addr })
	if (c.verb == newServer) != (i < 0) {
		return errors.New("server exists, or does not")
	}
	if i >= 0 {
		v.servers = slices.Delete(v.servers, i, i+1)
	}
	if c.verb != delServer {
		v.servers = append(v.servers, c.server)
		sortServers(v.servers)
	}
	return nil
}

// live are the servers that get connections.
func (v *virtual) lives() map[netip.AddrPort]bool {
	out := map[netip.AddrPort]bool{}
	if v != nil {
		for _, s := range v.servers {
			if s.weight > 0 {
				out[s.addr] = true
			}
		}
	}
	return out
}

func drawPort(t *rapid.T) render.Port {
	return render.Port{Addr: netip.MustParseAddr("10.97.0.1"), Proto: rapid.SampledFrom([]render.Proto{render.TCP, render.UDP, render.SCTP}).Draw(t, "proto"), Port: 80}
}

func drawEndpoints(t *rapid.T) []netip.AddrPort {
	n := rapid.SliceOfNDistinct(rapid.IntRange(1, 6), 0, 5, rapid.ID).Draw(t, "endpoints")
	slices.Sort(n)
	var out []netip.AddrPort
	for _, i := range n {
		out = append(out, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 98, 0, byte(i)}), 8080))
	}
	return out
}

// drawService may be nil.
func drawService(t *rapid.T, p render.Port) *render.Service {
	if rapid.IntRange(0, 3).Draw(t, "none") == 0 {
		return nil
	}
	return &render.Service{Port: p, Endpoints: drawEndpoints(t), Affinity: rapid.SampledFrom([]time.Duration{0, time.Minute}).Draw(t, "affinity")}
}

// drawVirtual is whatever may be found, ours or damaged; it may be nil.
func drawVirtual(t *rapid.T, p render.Port) *virtual {
	v := wanted(&render.Service{Port: p, Endpoints: drawEndpoints(t)}, always(rapid.SampledFrom([]string{"rr", "lc"}).Draw(t, "scheduler")))
	if v == nil {
		return nil
	}
	v.affinity = rapid.SampledFrom([]time.Duration{0, time.Minute}).Draw(t, "affinity")
	v.odd = rapid.Bool().Draw(t, "odd")
	for i := range v.servers {
		v.servers[i].weight = rapid.Uint32Range(0, 2).Draw(t, "weight")
		v.servers[i].odd = rapid.Bool().Draw(t, "odd server")
		v.servers[i].conns = rapid.Uint64Range(0, 1).Draw(t, "conns")
	}
	return v
}

// TestChange: whatever IPVS holds, the commands are accepted and lead to what is
// wanted; a service that has endpoints before and after has some all the time; what
// goes waits for its connections, unless there is nothing to wait for; and there is
// nothing to do twice.
func TestChange(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPort(t)
		have, svc := drawVirtual(t, p), drawService(t, p)
		lost := map[netip.Addr]bool{}
		for _, ep := range drawEndpoints(t) {
			lost[ep.Addr()] = true
		}
		cut := func(_ *virtual, a netip.Addr) bool { return lost[a] }
		want := wanted(svc, always("rr"))
		m := model{}
		if have != nil {
			clone := *have
			clone.servers = slices.Clone(have.servers)
			m[p] = &clone
		}
		before, after := have.lives(), want.lives()
		cmds, left := change(have, want, cut)
		for _, c := range cmds {
			if err := m.do(c); err != nil {
				t.Fatalf("%s: %v", c, err)
			}
			if now := m[p].lives(); len(before) > 0 && len(after) > 0 && len(now) == 0 {
				t.Fatalf("after %s no endpoint is left", c)
			}
		}
		if got := m[p].lives(); !maps.Equal(got, after) {
			t.Fatalf("leads to %v, want %v", got, after)
		}
		if fmt.Sprint(facts(m[p])) != fmt.Sprint(facts(left)) {
			t.Fatalf("holds %v, says %v", facts(m[p]), facts(left))
		}
		checkWaiting(t, have, m[p], after, lost)
		if again, _ := change(m[p], want, cut); len(again) > 0 {
			t.Fatalf("once more: %v", again)
		}
	})
}

// checkWaiting: what went is there without weight if it is not lost, and not at all
// if it is.
func checkWaiting(t *rapid.T, have, now *virtual, after map[netip.AddrPort]bool, lost map[netip.Addr]bool) {
	if have == nil {
		return
	}
	for _, s := range have.servers {
		if after[s.addr] {
			continue
		}
		there := now != nil && slices.ContainsFunc(now.servers, func(x server) bool { return x.addr == s.addr && x.weight == 0 })
		if there == lost[s.addr.Addr()] {
			t.Fatalf("%s waits: %v, lost: %v", s.addr, there, lost[s.addr.Addr()])
		}
	}
}

// facts is what counts of a virtual service.
func facts(v *virtual) []string {
	if v == nil {
		return nil
	}
	out := []string{fmt.Sprint(v.key, v.scheduler, v.affinity, v.odd)}
	for _, s := range v.servers {
		out = append(out, fmt.Sprint(s.addr, s.weight))
	}
	return out
}

// TestDrained: what drains is removed when its connections have ended or its time is
// over, never before, and a service that is not listed goes with the last of it.
func TestDrained(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPort(t)
		have := drawVirtual(t, p)
		if have == nil {
			return
		}
		listed, late := len(have.lives()) > 0, drawEndpoints(t)
		m := model{p: {key: key{Port: p}, scheduler: have.scheduler, affinity: have.affinity, odd: have.odd, servers: slices.Clone(have.servers)}}
		over := func(s server) bool { return slices.Contains(late, s.addr) }
		cmds, left := drained(have, listed, over)
		for _, c := range cmds {
			if err := m.do(c); err != nil {
				t.Fatalf("%s: %v", c, err)
			}
		}
		if fmt.Sprint(facts(m[p])) != fmt.Sprint(facts(left)) {
			t.Fatalf("holds %v, says %v", facts(m[p]), facts(left))
		}
		if !maps.Equal(m[p].lives(), have.lives()) {
			t.Fatalf("live were %v, are %v", have.lives(), m[p].lives())
		}
		stay := 0
		for _, s := range have.servers {
			if s.weight > 0 || s.conns > 0 && !over(s) {
				stay++
			}
		}
		if got := len(facts(left)) - 1; max(got, 0) != stay || (left == nil) != (stay == 0) {
			t.Fatalf("%d stay, want %d", got, stay)
		}
	})
}

// TestUDP: nothing waits for flows of UDP.
func TestUDP(t *testing.T) {
	eps := []netip.AddrPort{netip.MustParseAddrPort("10.98.0.1:1"), netip.MustParseAddrPort("10.98.0.2:1")}
	p := render.Port{Addr: netip.MustParseAddr("10.97.0.1"), Proto: render.UDP, Port: 53}
	have := wanted(&render.Service{Port: p, Endpoints: eps}, always("rr"))
	want := wanted(&render.Service{Port: p, Endpoints: eps[1:]}, always("rr"))
	cmds, left := change(have, want, cutFor(&render.Table{}))
	if fmt.Sprint(cmds) != "[remove endpoint 10.98.0.1:1 of udp 10.97.0.1:53]" || len(left.waiting()) > 0 {
		t.Errorf("%v, waiting for %v", cmds, left.waiting())
	}
	if cmds, left = change(have, nil, cutFor(&render.Table{})); fmt.Sprint(cmds) != "[remove service udp 10.97.0.1:53]" || left != nil {
		t.Errorf("%v, leaves %v", cmds, left)
	}
}

// TestWritten: what is written is what is read.
func TestWritten(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawVirtual(t, drawPort(t))
		if v == nil {
			return
		}
		v.odd = false
		if rapid.Bool().Draw(t, "v6") {
			v.Addr = netip.MustParseAddr("fd97::1")
			for i, s := range v.servers {
				v.servers[i].addr = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, 0x98, 15: byte(i)}), s.addr.Port())
			}
		}
		k := kernel{Conn: &wire.Conn{}}
		for i := range v.servers {
			k.Reset()
			k.command(&command{newServer, v, v.servers[i]})
			got := written(t, k.Buf, attrDest)
			s, ok := parseServer(got, v.Addr)
			if !ok || s.addr != v.servers[i].addr || s.weight != v.servers[i].weight || s.odd {
				t.Fatalf("wrote %+v, read %+v", v.servers[i], s)
			}
		}
		k.Reset()
		k.command(&command{verb: newService, service: v})
		if s := parseService(written(t, k.Buf, attrService)); s == nil || s.key != v.key || !s.sameHeader(v) {
			t.Fatalf("wrote %+v, read %+v", v, s)
		}
	})
}

// written takes one attribute out of a message.
func written(t *rapid.T, b []byte, attr uint16) (out []byte) {
	err := wire.Messages(b, func(_, _ uint16, _ uint32, body []byte) error {
		wire.Attributes(body[4:], func(kind uint16, v []byte) {
			if kind == attr {
				out = v
			}
		})
		return nil
	})
	if err != nil || out == nil {
		t.Fatalf("no attribute %d, %v", attr, err)
	}
	return out
}

// FuzzParse: nothing that a kernel sends breaks the readers.
func FuzzParse(f *testing.F) {
	k := kernel{Conn: &wire.Conn{}}
	v := wanted(&render.Service{Port: render.Port{Addr: netip.MustParseAddr("10.97.0.1"), Proto: render.TCP, Port: 80}, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.98.0.1:1")}}, always("rr"))
	k.service(v, true)
	f.Add(k.Buf[4:])
	k.Reset()
	k.dest(&v.servers[0], true)
	f.Add(k.Buf[4:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if s := parseService(b); s != nil && !s.Addr.IsValid() {
			t.Errorf("%x: a service without address", b)
		}
		for _, a := range []string{"10.97.0.1", "fd97::1"} {
			if s, ok := parseServer(b, netip.MustParseAddr(a)); ok && !s.addr.Addr().IsValid() {
				t.Errorf("%x: a server without address", b)
			}
		}
	})
}

// always chooses one scheduler.
func always(name string) func(string) string { return func(string) string { return name } }
