package dns

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// downAfter is how many tries in a row go wrong before an upstream counts as down.
	downAfter = 2
	// maxForged is how many answers to other questions are borne: an answer by TCP
	// cannot be guessed.
	maxForged = 8
)

// health is whether an upstream is of use.
type health int

const (
	unsure  health = iota // nothing is known against it
	failing               // it does not answer
	looping               // it asks this server
)

// upstream is a name server that is asked for names outside the cluster.
type upstream struct {
	addr  netip.AddrPort
	f     *forwarder
	ports ports

	mu       sync.Mutex
	state    health
	failures int
	// folds: it does not keep the case of names. plain: it does not know EDNS.
	folds, plain bool
	// due is when to probe it next, and wait how long after that once more.
	due, wait time.Duration
}

// newUpstream returns an upstream that is due for a probe.
func newUpstream(a netip.AddrPort, f *forwarder) *upstream { return &upstream{addr: a, f: f, due: 0} }

func (u *upstream) health() health {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state
}

// answered notes that the upstream works.
func (u *upstream) answered() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state == failing {
		u.f.log.Info("upstream name server answers again", "server", u.addr)
		u.state = unsure
	}
	u.failures = 0
}

// failed notes that it did not answer.
func (u *upstream) failed(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.failures++; u.failures < downAfter || u.state != unsure {
		return
	}
	u.f.log.Warn("upstream name server does not answer", "server", u.addr, "err", err)
	u.state = failing
	u.due, u.wait = u.f.now()+firstProbe, firstProbe
	select {
	case u.f.wake <- struct{}{}:
	default:
	}
}

var (
	errForged = errors.New("answers to other questions came")
	errCase   = errors.New("the name came back in another spelling")
)

// exchange asks the upstream, by TCP when the answer does not fit into a datagram or is
// not to be trusted. The result is spelled in lower case and without EDNS, and is the
// caller's.
func (u *upstream) exchange(ctx context.Context, name string, qtype uint16, flags byte) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	u.mu.Lock()
	folds, plain := u.folds, u.plain
	u.mu.Unlock()
	req := question(name, qtype, flags)
	if plain {
		req.Extra = nil
	}
	if !folds {
		req.Question[0].Name = shuffleCase(name)
	}
	m, err := u.ask(ctx, "udp", req)
	if err == nil && !plain && (m.Rcode == dns.RcodeFormatError || m.Rcode == dns.RcodeNotImplemented) && m.IsEdns0() == nil {
		req.Extra = nil // it may know no EDNS (RFC 6891, 7)
		if m, err = u.ask(ctx, "udp", req); err == nil && known(m.Rcode) {
			u.note(&u.plain)
		}
	}
	if errors.Is(err, errForged) || errors.Is(err, errCase) || err == nil && m.Truncated {
		folded := errors.Is(err, errCase)
		if m, err = u.ask(ctx, "tcp", req); err == nil && folded {
			u.note(&u.folds)
		}
	}
	if err != nil {
		if !errors.Is(ctx.Err(), context.Canceled) { // else the caller has had enough, not the upstream
			u.failed(err)
		}
		return nil, fmt.Errorf("upstream %s: %w", u.addr, err)
	}
	u.answered()
	return clean(m, name, qtype), nil
}

// note sets one of what is known about the upstream.
func (u *upstream) note(what *bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	*what = true
}

// question is a query for an upstream.
func question(name string, qtype uint16, flags byte) *dns.Msg {
	req := new(dns.Msg)
	req.Id = dns.Id()
	req.RecursionDesired = true
	req.AuthenticatedData = true // asks whether it is (RFC 6840, 5.7); the client may not
	req.CheckingDisabled = flags&flagCD != 0
	req.Question = []dns.Question{{Name: name, Qtype: qtype, Qclass: dns.ClassINET}}
	req.SetEdns0(udpSize, flags&flagDO != 0)
	return req
}

// shuffleCase spells a name at random, which one who guesses has to guess as well
// (draft-vixie-dnsext-dns0x20).
func shuffleCase(name string) string {
	b := []byte(name)
	var bits uint64
	for i, c := range b {
		if i%64 == 0 {
			bits = rand.Uint64()
		}
		if 'a' <= c && c <= 'z' && bits>>(i%64)&1 != 0 {
			b[i] = c - ('a' - 'A')
		}
	}
	return string(b)
}

// ask sends req and waits for the answer to it. Its port is random, by UDP that of one of
// some sockets.
func (u *upstream) ask(ctx context.Context, network string, req *dns.Msg) (*dns.Msg, error) {
	now := u.f.now()
	s, ok := port{}, false
	if network == "udp" {
		s, ok = u.ports.take(now)
	}
	if !ok {
		conn, err := u.f.dial(ctx, network, u.addr.String())
		if err != nil {
			return nil, err
		}
		s = port{Conn: conn, opened: now}
	}
	if t, ok := ctx.Deadline(); ok {
		_ = s.SetDeadline(t)
	}
	stop := context.AfterFunc(ctx, func() { _ = s.SetDeadline(time.Unix(1, 0)) })
	m, err := askOn(s.Conn, network, req)
	if stop() && err == nil && network == "udp" {
		u.ports.give(s)
	} else {
		s.Close()
	}
	return m, err
}

// askOn asks by a connection with a deadline.
func askOn(conn net.Conn, network string, req *dns.Msg) (*dns.Msg, error) {
	c := &dns.Conn{Conn: conn, UDPSize: maxQuery}
	if err := c.WriteMsg(req); err != nil {
		return nil, err
	}
	asked := req.Question[0]
	for forged := 0; ; {
		m, err := c.ReadMsg()
		if err != nil && (m == nil || network == "tcp") && !errors.Is(err, dns.ErrShortRead) {
			return nil, err
		}
		switch {
		case m != nil && m.Truncated && m.Id == req.Id: // whatever of it could be read
			return m, nil
		// Anything else is late, or forged.
		case err != nil || m.Id != req.Id || !m.Response || !sameQuestion(m, asked):
			if forged++; forged > maxForged || network == "tcp" {
				return nil, errForged
			}
		case network == "udp" && len(m.Question) == 1 && m.Question[0].Name != asked.Name:
			return nil, errCase
		default:
			return m, nil
		}
	}
}

func sameQuestion(m *dns.Msg, q dns.Question) bool {
	if len(m.Question) == 0 { // some leave it out of errors
		return m.Rcode == dns.RcodeFormatError || m.Rcode == dns.RcodeNotImplemented
	}
	got := m.Question[0]
	return len(m.Question) == 1 && got.Qtype == q.Qtype && got.Qclass == q.Qclass && strings.EqualFold(got.Name, q.Name)
}

// clean is what of an upstream's answer clients get to see: in lower case, as the
// spelling is that of our question at random, and without what was between us.
func clean(m *dns.Msg, name string, qtype uint16) *dns.Msg {
	out := &dns.Msg{Question: []dns.Question{{Name: name, Qtype: qtype, Qclass: dns.ClassINET}}}
	out.Rcode, out.AuthenticatedData, out.Truncated = m.Rcode, m.AuthenticatedData, m.Truncated
	out.Answer, out.Ns, out.Extra = lowered(m.Answer), lowered(m.Ns), lowered(m.Extra)
	return out
}

func lowered(rrs []dns.RR) []dns.RR {
	return slices.DeleteFunc(rrs, func(rr dns.RR) bool {
		h := rr.Header()
		h.Name = dns.CanonicalName(h.Name)
		if h.Ttl >= 1<<31 { // would be negative (RFC 2181, 8)
			h.Ttl = 0
		}
		if c, ok := rr.(*dns.CNAME); ok {
			c.Target = dns.CanonicalName(c.Target)
		}
		// EDNS and signatures of messages.
		return h.Rrtype == dns.TypeOPT || h.Rrtype == dns.TypeSIG || h.Rrtype >= dns.TypeTKEY && h.Rrtype <= dns.TypeANY
	})
}

// Sockets are used again, as opening one is most of the work of asking an upstream. For
// who wants to forge answers the port stays unknown: it is one of many, and is found out
// no sooner than it is closed.
const (
	maxPorts = 64
	portUses = 16
	portAge  = time.Second
)

// ports are the sockets to an upstream whose questions have all been answered.
type ports struct {
	mu   sync.Mutex
	free []port
}

type port struct {
	net.Conn
	opened time.Duration
	uses   int
}

// take returns any of the sockets that are not too old, if there is one.
func (p *ports) take(now time.Duration) (port, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n := len(p.free); n > 0; n = len(p.free) {
		i := rand.IntN(n)
		s := p.free[i]
		p.free[i] = p.free[n-1]
		p.free = p.free[:n-1]
		if now-s.opened <= portAge {
			return s, true
		}
		s.Close()
	}
	return port{}, false
}

// give takes a socket back. Nothing may be under way on it.
func (p *ports) give(s port) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.uses++; s.uses >= portUses || len(p.free) >= maxPorts {
		s.Close()
		return
	}
	p.free = append(p.free, s)
}

// close closes the sockets that are not in use.
func (p *ports) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.free {
		s.Close()
	}
	p.free = nil
}
