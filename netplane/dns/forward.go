package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
)

const (
	// maxTries bounds how often upstreams are asked one question, and tryTimeout the wait
	// for each.
	maxTries, tryTimeout = 3, 1500 * time.Millisecond
	// maxAge and maxAbsent bound how long answers, and the news that there is none, are
	// taken for fresh, whatever upstreams say (RFC 2308, 5: hours are too long).
	maxAge, maxAbsent = time.Hour, 5 * time.Minute
	// failureAge is how long it is remembered that upstreams do not know (RFC 9520, 3.2).
	failureAge = 2 * time.Second
	// An answer is better late than never (RFC 8767): when upstreams do not answer,
	// what has been true within maxStale is, for staleTTL seconds; clients are told that
	// after stalePatience, and upstreams are left alone for staleAgain.
	maxStale, staleTTL        = 24 * time.Hour, 30
	stalePatience, staleAgain = 1800 * time.Millisecond, 30 * time.Second
)

var (
	errNoUpstream = errors.New("no upstream name server")
	errAllDown    = errors.New("no upstream name server answers")
)

// group is the name servers for a domain.
type group struct {
	domain  string
	servers []*upstream
	// rotate makes them take turns; else the first one is asked as long as it answers.
	rotate bool
	turn   atomic.Uint32
}

// order is in which order to ask: those that do not answer come last, and those that
// ask this server in return not at all.
func (g *group) order(self func(netip.Addr) bool) (list []*upstream, allDown bool) {
	var first int
	if g.rotate && len(g.servers) > 0 {
		first = int(g.turn.Add(1)) % len(g.servers)
	}
	var down []*upstream
	for i := range g.servers {
		u := g.servers[(first+i)%len(g.servers)]
		switch h := u.health(); {
		case h == looping || self(u.addr.Addr()):
		case h == failing:
			down = append(down, u)
		default:
			list = append(list, u)
		}
	}
	return append(list, down...), len(list) == 0
}

// forwarder asks the name servers of the node, and those of stub domains.
type forwarder struct {
	log   *slog.Logger
	cache *cache
	now   func() time.Duration
	self  func(netip.Addr) bool
	dial  func(ctx context.Context, network, address string) (net.Conn, error)

	stubs    []*group // the longest domain first
	upstream atomic.Pointer[group]
	conf     resolvConf
	flights  singleflight.Group
	// busy are the refreshes that nobody waits for any more.
	busy sync.WaitGroup
	// wake is signalled when an upstream ceases to answer or another one appears.
	wake   chan struct{}
	probes probes
}

func newForwarder(cfg *Config, s *Server) *forwarder {
	f := &forwarder{
		log: cfg.Log, cache: s.cache, now: s.now, self: s.isSelf, dial: cfg.Dial,
		conf: resolvConf{path: cfg.ResolvConf}, wake: make(chan struct{}, 1),
	}
	for _, stub := range cfg.Stubs {
		f.stubs = append(f.stubs, &group{domain: dns.CanonicalName(stub.Domain), servers: f.upstreams(stub.Servers)})
	}
	slices.SortStableFunc(f.stubs, func(a, b *group) int { return dns.CountLabel(b.domain) - dns.CountLabel(a.domain) })
	f.upstream.Store(&group{domain: ".", servers: f.upstreams(cfg.Upstreams)})
	f.reload()
	return f
}

func (f *forwarder) upstreams(addrs []netip.AddrPort) (list []*upstream) {
	for _, a := range addrs {
		list = append(list, newUpstream(a, f))
	}
	return list
}

// reload reads resolv.conf if it has changed. Upstreams that stay keep their health.
func (f *forwarder) reload() {
	servers, rotate, changed, err := f.conf.read()
	if err != nil {
		f.log.Warn("names outside the cluster: nobody new to ask", "err", err)
	}
	if !changed {
		return
	}
	old := f.upstream.Load().servers
	next := &group{domain: ".", rotate: rotate}
	for _, a := range servers {
		if i := slices.IndexFunc(old, func(u *upstream) bool { return u.addr == a }); i >= 0 {
			next.servers = append(next.servers, old[i])
		} else {
			next.servers = append(next.servers, newUpstream(a, f))
		}
	}
	f.upstream.Store(next)
	for _, u := range old {
		u.ports.close() // also of those that stay: how they are reached may have changed
	}
	if len(servers) == 0 {
		f.log.Warn("names outside the cluster are not known: there is no nameserver line", "file", f.conf.path)
		return
	}
	f.log.Info("upstream name servers", "file", f.conf.path, "servers", servers, "rotate", rotate)
}

// group is who to ask about a name.
func (f *forwarder) group(name string) *group {
	for _, g := range f.stubs {
		if dns.IsSubDomain(g.domain, name) {
			return g
		}
	}
	return f.upstream.Load()
}

// resolve answers a question that is not the cluster's. key is that of its query.
func (f *forwarder) resolve(ctx context.Context, name string, qtype uint16, key []byte) (*entry, answeredBy, error) {
	if f.probes.seen(name) {
		return nil, byCluster, errors.New("a probe came back: an upstream asks this server in return")
	}
	old := f.cache.get(key)
	now := f.now()
	if old != nil && old.generation != 0 {
		old = nil
	}
	switch {
	case old == nil:
	case now < old.dies:
		return old, byCache, nil
	case now > old.dies+maxStale || old.rcode == dns.RcodeServerFailure:
		old = nil
	case now < old.again:
		return old, byStale, nil
	}
	ask := asking{name: name, qtype: qtype, key: string(key), flags: key[len(key)-1], stale: old}
	if old == nil {
		e, err := f.once(ctx, ask)
		return e, byUpstream, err
	}
	return f.orStale(ctx, ask)
}

// asking is a question on its way.
type asking struct {
	name  string
	qtype uint16
	key   string
	flags byte
	stale *entry // what was true before, or nil
}

// once fetches what is asked; whoever asks the same meanwhile gets the same answer.
func (f *forwarder) once(ctx context.Context, a asking) (*entry, error) {
	v, err, _ := f.flights.Do(a.key, func() (any, error) { return f.fetch(ctx, a) })
	if err != nil {
		return nil, err
	}
	return v.(*entry), nil
}

// orStale answers with what is stale if the fresh answer does not come in time.
func (f *forwarder) orStale(ctx context.Context, a asking) (*entry, answeredBy, error) {
	type result struct {
		*entry
		error
	}
	fresh := make(chan result, 1)
	f.busy.Go(func() {
		e, err := f.once(ctx, a)
		fresh <- result{e, err}
	})
	patience := time.NewTimer(stalePatience)
	defer patience.Stop()
	select {
	case r := <-fresh:
		if r.error == nil {
			return r.entry, byUpstream, nil
		}
	case <-patience.C:
	}
	return a.stale, byStale, nil
}

// fetch asks upstreams, and remembers the answer or that there is none.
func (f *forwarder) fetch(ctx context.Context, a asking) (*entry, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	m, err := f.ask(ctx, a)
	wireName := []byte(a.key[:len(a.key)-3])
	now := f.now()
	e := &entry{key: a.key, born: now}
	if err == nil {
		e.rcode, e.dies = m.Rcode, now+lifetime(m)
		if e.packed, err = repack(m, wireName); err == nil {
			if e.dies > now {
				f.cache.put(e)
			}
			return e, nil
		}
	}
	switch {
	case errors.Is(ctx.Err(), context.Canceled): // this server ends
	case a.stale != nil:
		old := a.stale // whose links are the cache's, and may change meanwhile
		f.cache.put(&entry{key: old.key, packed: old.packed, born: old.born, dies: old.dies, again: now + staleAgain, rcode: old.rcode})
	default:
		e.rcode, e.dies = dns.RcodeServerFailure, now+failureAge
		e.packed = &packed{wire: append(appendRcode(nil, &query{}, e.rcode), wireName...)}
		e.packed.wire = append(e.packed.wire, byte(a.qtype>>8), byte(a.qtype), 0, dns.ClassINET)
		e.packed.wire[5] = 1 // the question
		f.cache.put(e)
	}
	return nil, err
}

// repack packs an upstream's answer, if clients will be able to read it: there are records
// that can be read and, once written, cannot.
func repack(m *dns.Msg, name []byte) (*packed, error) {
	p, err := pack(m, name)
	if err != nil {
		return nil, err
	}
	if err := new(dns.Msg).Unpack(p.wire); err != nil {
		return nil, fmt.Errorf("%w: %w", errUnpackable, err)
	}
	return p, nil
}

// ask asks one upstream after the other.
func (f *forwarder) ask(ctx context.Context, a asking) (*dns.Msg, error) {
	g := f.group(a.name)
	list, allDown := g.order(f.self)
	switch {
	case len(list) == 0:
		return nil, fmt.Errorf("%w for %s", errNoUpstream, g.domain)
	case allDown && a.stale != nil: // probes tell when it is worth while again
		return nil, errAllDown
	}
	var errs []error
	for range maxTries {
		u := list[0]
		m, err := u.exchange(ctx, a.name, a.qtype, a.flags)
		list = list[1:]
		switch {
		case err == nil && known(m.Rcode):
			return m, nil
		case err == nil: // and it would say that again
			err = fmt.Errorf("upstream %s answered %s", u.addr, dns.RcodeToString[m.Rcode])
		default:
			list = append(list, u)
		}
		errs = append(errs, err)
		if ctx.Err() != nil || len(list) == 0 {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// known reports whether a response code is an answer, and not an excuse.
func known(rcode int) bool { return rcode == dns.RcodeSuccess || rcode == dns.RcodeNameError }

// lifetime is how long an answer may be remembered (RFC 2308 for those without
// records).
func lifetime(m *dns.Msg) time.Duration {
	if m.Truncated {
		return 0
	}
	age := maxAge
	// A chain of aliases that leads nowhere is absence as well (RFC 2308, 2.1).
	absent, dated := m.Rcode == dns.RcodeNameError || len(m.Answer) == 0, false
	for _, rr := range m.Answer {
		age = min(age, time.Duration(rr.Header().Ttl)*time.Second)
		dated = true
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			age = min(age, time.Duration(min(soa.Minttl, soa.Hdr.Ttl))*time.Second)
			absent, dated = true, true
		}
	}
	switch {
	case !dated:
		return 0
	case absent:
		return min(age, maxAbsent)
	}
	return age
}
