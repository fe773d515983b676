package dns

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxForwards bounds the queries that wait for upstreams.
	maxForwards = 256
	// maxUpstreams bounds how many upstreams one query is tried on.
	maxUpstreams = 2
	// tryTimeout bounds one try.
	tryTimeout = 2 * time.Second
	// maxCached bounds the answers remembered, and maxAge for how long.
	maxCached = 4096
	maxAge    = 30 * time.Second
	// reread is how often the list of upstreams is checked for changes.
	reread = 5 * time.Second
)

var errNoUpstream = errors.New("no upstream name server")

// question is what the cache tells answers apart by.
type question struct {
	name   string
	qtype  uint16
	dnssec bool
}

type remembered struct {
	msg        *dns.Msg
	at, expire time.Time
}

// forwarder asks the name servers of the node.
type forwarder struct {
	path  string // of resolv.conf
	loops func(netip.Addr) bool
	dial  func(ctx context.Context, network, address string) (net.Conn, error)
	slots chan struct{}

	mu        sync.Mutex
	checked   time.Time
	changed   time.Time
	upstreams []string
	cache     map[question]remembered
}

func newForwarder(path string, loops func(netip.Addr) bool, dial func(context.Context, string, string) (net.Conn, error)) *forwarder {
	return &forwarder{path: path, loops: loops, dial: dial, slots: make(chan struct{}, maxForwards), cache: map[question]remembered{}}
}

// exchange answers a question that is not the cluster's. The result is the
// caller's to change.
func (f *forwarder) exchange(ctx context.Context, q dns.Question, dnssec bool) (*dns.Msg, error) {
	key := question{dns.CanonicalName(q.Name), q.Qtype, dnssec}
	if m := f.recall(key, time.Now()); m != nil {
		return m, nil
	}
	ups, err := f.servers(time.Now())
	if err != nil {
		return nil, err
	}
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		return nil, fmt.Errorf("%d queries already wait for upstreams", maxForwards)
	}
	var errs []error
	for _, up := range ups[:min(len(ups), maxUpstreams)] {
		m, err := f.try(ctx, up, q, dnssec)
		if err == nil && m.Rcode != dns.RcodeServerFailure && m.Rcode != dns.RcodeRefused {
			f.remember(key, m, time.Now())
			return m.Copy(), nil
		}
		if err == nil {
			err = fmt.Errorf("upstream %s answered %s", up, dns.RcodeToString[m.Rcode])
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// try asks one upstream, by TCP when the answer does not fit into a datagram.
func (f *forwarder) try(ctx context.Context, up string, q dns.Question, dnssec bool) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	req := new(dns.Msg)
	req.Id = dns.Id()
	req.RecursionDesired = true
	req.Question = []dns.Question{q}
	req.SetEdns0(udpSize, dnssec)
	for _, network := range []string{"udp", "tcp"} {
		m, err := f.ask(ctx, network, up, req)
		if err != nil {
			return nil, fmt.Errorf("upstream %s over %s: %w", up, network, err)
		}
		if !m.Truncated || network == "tcp" {
			return m, nil
		}
	}
	return nil, nil // unreachable: tcp returns
}

func (f *forwarder) ask(ctx context.Context, network, up string, req *dns.Msg) (*dns.Msg, error) {
	conn, err := f.dial(ctx, network, up)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if t, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(t)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c := &dns.Conn{Conn: conn, UDPSize: udpSize}
	if err := c.WriteMsg(req); err != nil {
		return nil, err
	}
	for {
		m, err := c.ReadMsg()
		if err != nil {
			return nil, err
		}
		// Anything else is late, or forged.
		if m.Id == req.Id && m.Response && len(m.Question) == 1 && sameQuestion(m.Question[0], req.Question[0]) {
			return m, nil
		}
	}
}

func sameQuestion(a, b dns.Question) bool {
	return a.Qtype == b.Qtype && a.Qclass == b.Qclass && strings.EqualFold(a.Name, b.Name)
}

// recall returns a remembered answer with the time it has left, or nil.
func (f *forwarder) recall(key question, now time.Time) *dns.Msg {
	f.mu.Lock()
	r, ok := f.cache[key]
	f.mu.Unlock()
	if !ok || !now.Before(r.expire) {
		return nil
	}
	m := r.msg.Copy()
	age := uint32(now.Sub(r.at) / time.Second)
	for _, rrs := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range rrs {
			if h := rr.Header(); h.Rrtype != dns.TypeOPT {
				h.Ttl -= min(h.Ttl, age)
			}
		}
	}
	return m
}

func (f *forwarder) remember(key question, m *dns.Msg, now time.Time) {
	age := lifetime(m)
	if age <= 0 || m.Truncated {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.cache) >= maxCached {
		for k, r := range f.cache {
			if !now.Before(r.expire) {
				delete(f.cache, k)
			}
		}
	}
	for k := range f.cache { // any will do
		if len(f.cache) < maxCached {
			break
		}
		delete(f.cache, k)
	}
	f.cache[key] = remembered{m, now, now.Add(age)}
}

// lifetime is how long an answer may be remembered (RFC 2308 for those without
// records).
func lifetime(m *dns.Msg) time.Duration {
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return 0
	}
	age := maxAge
	n := 0
	for _, rr := range m.Answer {
		age = min(age, time.Duration(rr.Header().Ttl)*time.Second)
		n++
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok && len(m.Answer) == 0 {
			age = min(age, time.Duration(min(soa.Minttl, soa.Hdr.Ttl))*time.Second)
			n++
		}
	}
	if n == 0 {
		return 0
	}
	return age
}

// servers returns the upstreams, and reads resolv.conf again when it has changed.
func (f *forwarder) servers(now time.Time) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.path != "" && now.Sub(f.checked) >= reread {
		f.checked = now
		info, err := os.Stat(f.path)
		switch {
		case err != nil:
			f.upstreams = nil
		case !info.ModTime().Equal(f.changed):
			f.changed = info.ModTime()
			f.upstreams = readServers(f.path, f.loops)
		}
	}
	if len(f.upstreams) == 0 {
		return nil, fmt.Errorf("%w in %s", errNoUpstream, f.path)
	}
	return slices.Clone(f.upstreams), nil
}

// readServers returns the name servers in a resolv.conf, except for this one.
func readServers(path string, loops func(netip.Addr) bool) []string {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	var out []string
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		w := strings.Fields(lines.Text())
		if len(w) < 2 || w[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(w[1]); err == nil && !loops(a) {
			out = append(out, net.JoinHostPort(a.String(), "53"))
		}
	}
	return out
}
