// Package dns is the cluster's name server, one on each node: it answers for
// services and pods from this node's copy of the cluster, and asks the node's own
// name servers, or those of a stub domain, for everything else.
//
// It reads and writes packets itself, as most answers are ready to be sent; messages
// are made and taken apart by miekg/dns. DESIGN.md says why.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/netplane/render"
)

const (
	// udpSize is the datagram size offered, and the most that is sent whatever a
	// client says it takes (DNS flag day 2020).
	udpSize = 1232
	// answerTimeout bounds the work on one query: resolvers ask again after 5 s.
	answerTimeout = 4500 * time.Millisecond
	// DefaultCacheBytes is room for about 20,000 answers.
	DefaultCacheBytes = 8 << 20
)

// Config is what a Server needs. Zero fields have working defaults.
type Config struct {
	// ResolvConf is the file that lists the upstreams; it is read again when it changes.
	ResolvConf string
	// Upstreams are used when ResolvConf is empty.
	Upstreams []netip.AddrPort
	// Stubs are domains with name servers of their own. The longest one that a name is
	// in counts; those of the cluster stay the cluster's.
	Stubs []Stub
	// Dial opens connections to upstreams, each from a port that the system chooses.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// CacheBytes bounds the answers remembered; zero: DefaultCacheBytes.
	CacheBytes int
	// Registerer takes the metrics; nil: they go nowhere.
	Registerer prometheus.Registerer
	Log        *slog.Logger
}

// Server answers queries. Set and Serve may be called concurrently.
type Server struct {
	log     *slog.Logger
	epoch   time.Time // what times in the cache are counted from
	zone    atomic.Pointer[inForce]
	cache   *cache
	forward *forwarder
	waiting quota
	metrics *metrics
	setting sync.Mutex
}

// inForce is a zone with a number that no other one of this server has.
type inForce struct {
	*zone
	generation uint64
}

// New returns a Server that knows no names yet: until the first Set it answers
// SERVFAIL, so that nobody takes a name for absent.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	if cfg.CacheBytes == 0 {
		cfg.CacheBytes = DefaultCacheBytes
	}
	s := &Server{
		log: cfg.Log, epoch: time.Now(), cache: newCache(cfg.CacheBytes), waiting: quota{most: maxWaiting, each: maxClientWaiting},
	}
	s.metrics = newMetrics(cfg.Registerer, s.cache)
	s.forward = newForwarder(&cfg, s)
	return s
}

// now is the time that the cache goes by.
func (s *Server) now() time.Duration { return time.Since(s.epoch) }

// isSelf: this server must not ask itself.
func (s *Server) isSelf(a netip.Addr) bool {
	z := s.zone.Load()
	return z != nil && a.Unmap() == z.server
}

// Set makes the names of d what is answered from now on. It keeps d's objects and lists,
// which must not be modified. It is quick if d has most of its objects in common with that
// of the last Set.
func (s *Server) Set(d render.Desired) {
	s.setting.Lock()
	defer s.setting.Unlock()
	old := s.zone.Load()
	if old == nil {
		s.zone.Store(&inForce{newZone(d), 1})
		return
	}
	next := old.next(d)
	if next == old.zone {
		return
	}
	s.zone.Store(&inForce{next, old.generation + 1})
	if !old.sameNames(next) {
		s.cache.clear() // it may have answers from upstream for what is the cluster's now
	}
}

// worker is what one loop needs to answer without allocating.
type worker struct {
	q   query
	out []byte
}

// limit is how many bytes the answer to q may have over a network.
func (q *query) limit(udp bool) int {
	switch {
	case !udp:
		return dns.MaxMsgSize
	case !q.edns:
		return dns.MinMsgSize
	}
	return int(min(max(q.size, dns.MinMsgSize), udpSize))
}

// quick answers msg if that needs nobody else. The answer is in w.out until the next
// call; nil means that there is none, or, with wait, that slow must be called.
func (s *Server) quick(w *worker, msg []byte, udp bool) (answer []byte, wait bool) {
	q := &w.q
	rcode := q.read(msg)
	if rcode == silent {
		return nil, false
	}
	z := s.zone.Load()
	if rcode == dns.RcodeSuccess {
		rcode = refusal(q, z)
	}
	if rcode != dns.RcodeSuccess {
		s.metrics.count(byCluster, rcode)
		w.out = appendRcode(w.out[:0], q, rcode)
		return w.out, false
	}
	by := byCluster
	e := s.cache.get(q.key())
	now := s.now()
	switch {
	case e != nil && e.generation == z.generation:
	case e != nil && e.generation == 0 && now < e.dies:
		by = byCache
	default:
		if e = s.local(z, q); e == nil {
			return nil, true
		}
	}
	s.metrics.count(by, e.rcode)
	d := e.delivery(q, now, udp)
	w.out = e.append(w.out[:0], q, d)
	return w.out, false
}

// refusal is the response code for what is not answered at all.
func refusal(q *query, z *inForce) int {
	switch {
	case z == nil:
		return dns.RcodeServerFailure
	case q.class != dns.ClassINET:
		return dns.RcodeRefused
	case q.qtype == dns.TypeAXFR || q.qtype == dns.TypeIXFR:
		return dns.RcodeRefused
	case q.qtype == dns.TypeNone || q.qtype == dns.TypeOPT:
		return dns.RcodeFormatError
	case q.qtype >= dns.TypeTKEY && q.qtype < dns.TypeANY: // of a message or a transfer, not of a name
		return dns.RcodeNotImplemented
	}
	return dns.RcodeSuccess
}

func (e *entry) delivery(q *query, now time.Duration, udp bool) delivery {
	d := delivery{limit: q.limit(udp)}
	if e.run.n > 1 {
		d.turn = rand.Uint32()
	}
	if e.generation == 0 {
		d.age = uint32((now - e.born) / time.Second)
	}
	return d
}

// slow answers what has to be asked elsewhere.
func (s *Server) slow(ctx context.Context, q *query, udp bool) []byte {
	e, by, err := s.elsewhere(ctx, q)
	if err != nil {
		name, _ := q.text()
		s.log.Debug("dns query not answered", "name", name, "type", dns.Type(q.qtype).String(), "err", err)
		s.metrics.count(by, dns.RcodeServerFailure)
		return appendRcode(nil, q, dns.RcodeServerFailure)
	}
	s.metrics.count(by, e.rcode)
	d := e.delivery(q, s.now(), udp)
	if by == byStale {
		d.ttl = staleTTL
	}
	return e.append(nil, q, d)
}

// local answers from the zone, and remembers that. It returns nil if others have to
// be asked.
func (s *Server) local(z *inForce, q *query) *entry {
	name, err := q.text()
	if err != nil {
		return nil // and slow says why
	}
	var resp *dns.Msg
	switch {
	case z.owns(name):
		var outside string
		if resp, outside = z.answer(name, q.qtype); outside != "" {
			return nil
		}
	case q.qtype == dns.TypeANY:
		resp = &dns.Msg{Question: []dns.Question{{Name: name, Qtype: q.qtype, Qclass: q.class}}, Answer: []dns.RR{anything(name)}}
	default:
		return nil
	}
	e := &entry{key: string(q.key()), generation: z.generation, rcode: resp.Rcode}
	if e.packed, err = pack(resp, q.name()); err != nil {
		s.log.Error("cluster DNS has no answer", "name", name, "err", err)
		return nil
	}
	s.cache.put(e)
	return e
}

// elsewhere answers what local does not.
func (s *Server) elsewhere(ctx context.Context, q *query) (*entry, answeredBy, error) {
	name, err := q.text()
	if err != nil {
		return nil, byCluster, err
	}
	z := s.zone.Load()
	if !z.owns(name) {
		return s.forward.resolve(ctx, name, q.qtype, q.key())
	}
	e, err := s.throughAlias(ctx, z, name, q)
	return e, byCluster, err
}

// throughAlias answers for a name of the cluster that is an alias for one outside. The
// parts of the answer are remembered, the whole is not.
func (s *Server) throughAlias(ctx context.Context, z *inForce, name string, q *query) (*entry, error) {
	resp, outside := z.answer(name, q.qtype)
	if outside != "" {
		if err := s.goOn(ctx, resp, outside, q); err != nil {
			return nil, fmt.Errorf("alias %s: %w", outside, err)
		}
	}
	p, err := pack(resp, q.name())
	return &entry{packed: p, generation: z.generation, rcode: resp.Rcode}, err
}

// goOn adds to resp what is known of name, for which its last answer is an alias.
func (s *Server) goOn(ctx context.Context, resp *dns.Msg, name string, q *query) error {
	k := make([]byte, maxName+3)
	n, err := dns.PackDomainName(name, k[:maxName], 0, nil, false)
	if err != nil {
		return err
	}
	k = append(k[:n], q.key()[q.nameLen:]...)
	e, by, err := s.forward.resolve(ctx, name, q.qtype, k)
	if err != nil {
		return err
	}
	m := new(dns.Msg)
	if err := m.Unpack(e.wire); err != nil {
		return err
	}
	age := uint32((s.now() - e.born) / time.Second)
	for _, rrs := range [][]dns.RR{m.Answer, m.Ns} {
		for _, rr := range rrs {
			h := rr.Header()
			if h.Ttl -= min(h.Ttl, age); by == byStale {
				h.Ttl = staleTTL
			}
		}
	}
	resp.Answer, resp.Ns, resp.Rcode = append(resp.Answer, m.Answer...), append(resp.Ns, m.Ns...), m.Rcode
	return nil
}

// Serve answers on both sockets until ctx ends. Queries that have come by then are still
// answered, which takes 10 seconds at most; then both are closed. An error means that one of
// them stopped working. Only one Serve may run at a time.
func (s *Server) Serve(ctx context.Context, pc net.PacketConn, ln net.Listener) error {
	udp, ok := pc.(*net.UDPConn)
	if !ok {
		return errors.Join(fmt.Errorf("dns server: %T is not a UDP socket", pc), pc.Close(), ln.Close())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work, drop := context.WithCancel(context.WithoutCancel(ctx))
	defer drop()
	var busy, watching sync.WaitGroup
	busy.Go(func() { cancel(s.serveUDP(work, udp, &busy)) })
	busy.Go(func() { cancel(s.serveTCP(ctx, work, ln, &busy)) })
	watching.Go(func() { s.forward.watch(work) })
	<-ctx.Done()
	_, _ = ln.Close(), udp.SetReadDeadline(time.Unix(1, 0)) // others may have the same socket
	busy.Wait()
	drop()
	watching.Wait()
	s.forward.busy.Wait()
	s.forward.close()
	_ = pc.Close()
	return fmt.Errorf("dns server: %w", context.Cause(ctx))
}
