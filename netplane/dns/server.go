// Package dns is the cluster's name server, one on each node: it answers for
// services and pods from this node's copy of the cluster, and asks the node's own
// name servers for everything else.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// udpSize is the datagram size offered and accepted (DNS flag day 2020).
	udpSize = 1232
	// maxInFlight bounds the queries that are worked on; more are not answered, which
	// is what makes clients back off.
	maxInFlight = 1024
	// answerTimeout bounds the work on one query.
	answerTimeout = 5 * time.Second
)

// Config is what a Server needs. Zero fields have working defaults.
type Config struct {
	// ResolvConf is the file that lists the upstreams.
	ResolvConf string
	// Dial opens connections to upstreams.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Upstreams, as address:port, are used when ResolvConf is empty.
	Upstreams []string
	// Registerer takes the metrics; nil: they go nowhere.
	Registerer prometheus.Registerer
	Log        *slog.Logger
}

// Server answers queries. Set and Run may be called concurrently.
type Server struct {
	log      *slog.Logger
	zone     atomic.Pointer[Zone]
	forward  *forwarder
	inFlight chan struct{}
	queries  *prometheus.CounterVec
	latency  prometheus.Histogram
	refused  prometheus.Counter
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
	s := &Server{
		log: cfg.Log, inFlight: make(chan struct{}, maxInFlight),
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decree_dns_queries_total", Help: "Queries answered, by response code and by who answered (cluster or upstream).",
		}, []string{"rcode", "by"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "decree_dns_query_seconds", Help: "Time to answer a query.", Buckets: prometheus.ExponentialBuckets(20e-6, 4, 10),
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "decree_dns_queries_dropped_total", Help: "Queries not answered because too many were being worked on.",
		}),
	}
	s.forward = newForwarder(cfg.ResolvConf, s.isSelf, cfg.Dial)
	s.forward.upstreams = cfg.Upstreams
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(s.queries, s.latency, s.refused)
	}
	return s
}

// isSelf: this server must not ask itself.
func (s *Server) isSelf(a netip.Addr) bool {
	z := s.zone.Load()
	return z != nil && a.Unmap() == z.server
}

// Set makes z what is answered from now on.
func (s *Server) Set(z *Zone) { s.zone.Store(z) }

// Serve answers on both sockets until ctx ends, and then closes them. An error
// means that one of them stopped working.
func (s *Server) Serve(ctx context.Context, pc net.PacketConn, ln net.Listener) error {
	udp := &dns.Server{PacketConn: pc, Handler: s, UDPSize: udpSize, MsgAcceptFunc: accept}
	tcp := &dns.Server{Listener: ln, Handler: s, MaxTCPQueries: 128, MsgAcceptFunc: accept,
		ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: func() time.Duration { return 10 * time.Second }}
	started := make(chan struct{}, 2)
	errs := make(chan error, 2)
	for _, srv := range []*dns.Server{udp, tcp} {
		srv.NotifyStartedFunc = func() { started <- struct{}{} }
		go func() { errs <- srv.ActivateAndServe() }()
	}
	running := 2
	var first error
	for range 2 { // Shutdown works on a started server only
		select {
		case <-started:
		case first = <-errs:
			running--
		}
	}
	if first == nil {
		select {
		case <-ctx.Done():
		case first = <-errs:
			running--
		}
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
	defer cancel()
	_ = udp.ShutdownContext(stop) // what it complains about is that it is closed
	_ = tcp.ShutdownContext(stop)
	_, _ = pc.Close(), ln.Close()
	for ; running > 0; running-- {
		<-errs
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if first == nil {
		first = errors.New("it stopped")
	}
	return fmt.Errorf("dns server: %w", first)
}

// accept refuses early what no client of a resolver sends.
func accept(h dns.Header) dns.MsgAcceptAction {
	const response, opcode = 1 << 15, 0xf << 11
	switch {
	case h.Bits&response != 0:
		return dns.MsgIgnore
	case h.Bits&opcode != 0:
		return dns.MsgRejectNotImplemented
	case h.Qdcount != 1 || h.Ancount != 0 || h.Nscount > 1 || h.Arcount > 2:
		return dns.MsgReject
	}
	return dns.MsgAccept
}

// ServeDNS implements dns.Handler.
func (s *Server) ServeDNS(w dns.ResponseWriter, req *dns.Msg) {
	select {
	case s.inFlight <- struct{}{}:
		defer func() { <-s.inFlight }()
	default:
		s.refused.Inc()
		return
	}
	start := time.Now()
	resp, by := s.Answer(req)
	fit(w, req, resp)
	if err := w.WriteMsg(resp); err != nil {
		s.log.Debug("dns answer not sent", "to", w.RemoteAddr(), "err", err)
	}
	s.latency.Observe(time.Since(start).Seconds())
	s.queries.WithLabelValues(rcodeLabel(resp.Rcode), by).Inc()
}

// rcodeLabel keeps the number of series bounded whatever upstreams answer.
func rcodeLabel(rcode int) string {
	if name, ok := dns.RcodeToString[rcode]; ok {
		return name
	}
	return "other"
}

// fit makes resp fit the way it goes: what is too long for the client's datagrams
// is cut and marked, and the client asks again over TCP.
func fit(w dns.ResponseWriter, req, resp *dns.Msg) {
	size := dns.MaxMsgSize
	opt := req.IsEdns0()
	if _, tcp := w.RemoteAddr().(*net.TCPAddr); !tcp {
		size = dns.MinMsgSize
		if opt != nil {
			size = int(min(max(opt.UDPSize(), dns.MinMsgSize), udpSize))
		}
	}
	if opt != nil {
		resp.SetEdns0(udpSize, opt.Do())
	}
	resp.Compress = true
	resp.Truncate(size)
}

// Answer works out the answer to a query with one question, and who gave it.
func (s *Server) Answer(req *dns.Msg) (resp *dns.Msg, by string) {
	resp = new(dns.Msg)
	resp.SetReply(req)
	resp.RecursionAvailable = true
	q := req.Question[0]
	opt := req.IsEdns0()
	z := s.zone.Load()
	switch {
	case opt != nil && opt.Version() != 0:
		resp.Rcode = dns.RcodeBadVers
	case z == nil:
		resp.Rcode = dns.RcodeServerFailure
	case q.Qclass != dns.ClassINET:
		resp.Rcode = dns.RcodeRefused
	case q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR || q.Qtype == dns.TypeANY:
		resp.Rcode = dns.RcodeRefused
	case z.owns(dns.CanonicalName(q.Name)):
		s.local(z, q, resp)
	default:
		s.remote(q, opt != nil && opt.Do(), resp)
		return resp, "upstream"
	}
	return resp, "cluster"
}

// local answers from the zone.
func (s *Server) local(z *Zone, q dns.Question, resp *dns.Msg) {
	resp.Authoritative = true
	a := z.lookup(dns.CanonicalName(q.Name), q.Qtype)
	resp.Answer, resp.Extra = a.rrs, a.extra
	for _, rr := range resp.Answer {
		rr.Header().Name = q.Name // spelled as the client did
	}
	switch {
	case !a.exists:
		resp.Rcode = dns.RcodeNameError
	case a.alias != "" && q.Qtype != dns.TypeCNAME:
		s.follow(z, a.alias, q, resp)
	}
	if len(resp.Answer) == 0 {
		resp.Ns = []dns.RR{z.soa()}
	}
}

// maxAliases bounds a chain of aliases within the cluster.
const maxAliases = 8

// follow adds what an alias stands for.
func (s *Server) follow(z *Zone, alias string, q dns.Question, resp *dns.Msg) {
	for range maxAliases {
		if !z.owns(alias) {
			m, err := s.ask(dns.Question{Name: alias, Qtype: q.Qtype, Qclass: q.Qclass}, false)
			if err != nil {
				return // the alias itself is an answer
			}
			resp.Answer = append(resp.Answer, m.Answer...)
			return
		}
		a := z.lookup(alias, q.Qtype)
		resp.Answer = append(resp.Answer, a.rrs...)
		if a.alias == "" {
			return
		}
		alias = a.alias
	}
	resp.Answer, resp.Rcode = nil, dns.RcodeServerFailure
}

// remote answers from upstream.
func (s *Server) remote(q dns.Question, dnssec bool, resp *dns.Msg) {
	m, err := s.ask(q, dnssec)
	if err != nil {
		resp.Rcode = dns.RcodeServerFailure
		s.log.Debug("dns query not forwarded", "name", q.Name, "type", dns.TypeToString[q.Qtype], "err", err)
		return
	}
	resp.Rcode = m.Rcode
	resp.Answer, resp.Ns = m.Answer, m.Ns
	for _, rr := range m.Extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			resp.Extra = append(resp.Extra, rr)
		}
	}
	resp.AuthenticatedData = m.AuthenticatedData
}

func (s *Server) ask(q dns.Question, dnssec bool) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	return s.forward.exchange(ctx, q, dnssec)
}
