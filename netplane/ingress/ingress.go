// Package ingress is the proxy of a node: it serves Ingresses over HTTP/1.1, HTTP/2 and
// HTTP/3, with and without TLS, and leads requests to the pods behind Services.
//
// What goes where is decided by netplane/ingress/route; this package carries it out. It
// listens only while there is something to serve. It knows neither the API nor the kernel's
// tables.
package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/quic-go/quic-go/http3"

	"decree.dev/decree/netplane/ingress/route"
)

// Bounds of what clients may take.
const (
	headerTimeout = 10 * time.Second // to send a request's headers
	idleTimeout   = 75 * time.Second // between requests
	stallTimeout  = time.Minute      // between two parts of a body, either way
	maxHeader     = 64 << 10         // bytes of a request's headers
	// linger is how long connections that wait for their clients' next requests stay open when
	// a listener closes: clients that send one just then would have to repeat it.
	linger = time.Second
	// quicDrain is how long requests by HTTP/3 may take then: their port stays busy so long.
	quicDrain = 5 * time.Second
)

// How long is waited before a port is tried again that could not be had.
const (
	firstRetry   = 100 * time.Millisecond
	longestRetry = 10 * time.Second
)

// Config says how to serve. Everything has a default.
type Config struct {
	// HTTP and HTTPS are host:port to listen on; empty: ":80" and ":443". HTTP/3 is
	// served on the UDP port of HTTPS.
	HTTP, HTTPS string
	// Listen and ListenPacket open ports, Dial opens connections to backends and resolves
	// their names; nil: those of package net.
	Listen       func(ctx context.Context, network, address string) (net.Listener, error)
	ListenPacket func(ctx context.Context, network, address string) (net.PacketConn, error)
	Dial         func(ctx context.Context, network, address string) (net.Conn, error)
	// Drain is how long requests that are under way when a listener closes may take; zero:
	// 5 seconds.
	Drain time.Duration
	// ACME is where certificates are obtained; nil: nowhere.
	ACME *ACME
	// AccessLog gets a line of JSON for every request; nil: none are written.
	AccessLog io.Writer
	// Registerer takes the metrics; nil: they go nowhere.
	Registerer prometheus.Registerer
	// Log; nil: slog.Default.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.HTTP == "" {
		c.HTTP = ":80"
	}
	if c.HTTPS == "" {
		c.HTTPS = ":443"
	}
	if c.Listen == nil {
		c.Listen = (&net.ListenConfig{}).Listen
	}
	if c.ListenPacket == nil {
		c.ListenPacket = (&net.ListenConfig{}).ListenPacket
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	if c.Drain == 0 {
		c.Drain = 5 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// Server is the proxy. All methods are safe for concurrent use.
type Server struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	access  *accessLog // nil: none
	acme    *obtainer  // nil: none
	now     atomic.Pointer[generation]
	changed chan struct{} // holds one signal: there is another generation
	buffers bufferPool
	states  sync.Pool // of *exchange
	port    atomic.Int32
	quic    atomic.Bool // HTTP/3 is served
	// leaving are ports that no longer listen while requests are under way there.
	leaving sync.WaitGroup

	mu     sync.Mutex // orders calls of Set, and guards what follows
	pools  map[route.BackendKey]*pool
	served map[ingressName]*ingress
	warned []route.Warning
}

// generation is a table and what belongs to its parts.
type generation struct {
	*route.Table
	pools     []*pool    // by the table's backends
	ingresses []*ingress // by the table's ingresses
}

type ingressName struct{ namespace, name string }

// New returns a server that has nothing to serve yet.
func New(cfg Config) (*Server, error) {
	cfg = cfg.withDefaults()
	s := &Server{
		cfg: cfg, log: cfg.Log, changed: make(chan struct{}, 1),
		pools: map[route.BackendKey]*pool{}, served: map[ingressName]*ingress{},
	}
	s.now.Store(&generation{Table: route.Build(route.Objects{}, nil)})
	s.states.New = func() any { return newExchange(s) }
	s.metrics = newMetrics(cfg.Registerer, s)
	if cfg.AccessLog != nil {
		s.access = newAccessLog(cfg.AccessLog, s.metrics)
	}
	if cfg.ACME != nil {
		var err error
		if s.acme, err = newObtainer(*cfg.ACME, cfg); err != nil {
			return nil, fmt.Errorf("ingress: %w", err)
		}
	}
	return s, nil
}

// Set makes o what is served. When it returns, no request is led to an endpoint that o does
// not have; those that are under way there go on to their ends.
func (s *Server) Set(o route.Objects) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := &generation{Table: route.Build(o, s.now.Load().Table)}
	pools := make(map[route.BackendKey]*pool, len(g.Backends))
	for i := range g.Backends {
		b := &g.Backends[i]
		p := s.pools[b.BackendKey]
		if p == nil {
			p = newPool(b, s.cfg.Dial)
		}
		p.set(b)
		pools[b.BackendKey], g.pools = p, append(g.pools, p)
	}
	served := make(map[ingressName]*ingress, len(g.Ingresses))
	for i := range g.Ingresses {
		x := &g.Ingresses[i]
		name := ingressName{x.Namespace, x.Name}
		in := s.served[name]
		if in == nil || in.IngressOptions != x.IngressOptions {
			in = newIngress(s.metrics, x)
		}
		served[name], g.ingresses = in, append(g.ingresses, in)
	}
	s.now.Store(g)
	for key, p := range s.pools {
		if pools[key] == nil {
			p.set(&route.Backend{})
		}
	}
	for name := range s.served {
		if served[name] == nil {
			s.metrics.forget(name)
		}
	}
	s.pools, s.served = pools, served
	s.warn(g.Warnings)
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Wanted reports whether there is something to serve.
func (s *Server) Wanted() bool { return !s.now.Load().Empty() }

// warn logs what is new.
func (s *Server) warn(warnings []route.Warning) {
	for _, w := range warnings {
		if !slices.Contains(s.warned, w) {
			s.log.Warn("a part of an ingress has no effect", "ingress", w.Namespace+"/"+w.Name, "reason", w.Message)
		}
	}
	s.warned = warnings
}

// Run listens while there is something to serve, until ctx ends; then it returns the cause.
// A port that cannot be had is reported, and tried again. Requests that are under way when
// a port closes have Config.Drain to end.
func (s *Server) Run(ctx context.Context) error {
	var background sync.WaitGroup
	defer background.Wait()
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop() // once the last request has ended
	if s.access != nil {
		background.Go(func() { s.access.run(work) })
	}
	if s.acme != nil {
		s.acme.start()
		defer s.acme.stop()
	}
	ports := []*port{{name: "http", open: s.openHTTP}, {name: "https", open: s.openHTTPS}, {name: "http3", open: s.openHTTP3, patience: 2 * quicDrain}}
	defer s.leaving.Wait()
	defer func() {
		for _, p := range ports {
			p.close()
		}
	}()
	retry := time.NewTimer(longestRetry)
	defer retry.Stop()
	for wait := firstRetry; ; {
		failed := s.listen(ctx, ports)
		if s.acme != nil {
			s.acme.manage(work, s.now.Load().Table)
		}
		var again <-chan time.Time
		if failed {
			retry.Reset(wait)
			again = retry.C
		} else {
			wait = firstRetry
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.changed:
		case <-again:
			wait = min(2*wait, longestRetry)
		}
	}
}

// listen opens the ports that are needed and closes the others.
func (s *Server) listen(ctx context.Context, ports []*port) (failed bool) {
	wanted := s.Wanted()
	for _, p := range ports {
		switch {
		case wanted && p.shut == nil:
			shut, err := p.open(ctx)
			if err != nil {
				failed = true
				if p.since.IsZero() {
					p.since = time.Now()
				}
				expected := errors.Is(err, syscall.EADDRINUSE) && time.Since(p.since) < p.patience
				if text := err.Error(); text != p.failure && !expected {
					p.failure = text
					s.log.Error("ingress does not listen; will try again", "port", p.name, "err", err)
				}
				break
			}
			p.shut, p.failure, p.since = shut, "", time.Time{}
		case !wanted:
			p.close()
			p.since = time.Time{}
		}
		listening := 0.0
		if p.shut != nil {
			listening = 1
		}
		s.metrics.listening.WithLabelValues(p.name).Set(listening)
	}
	return failed
}

// port is one that is open, or not.
type port struct {
	name string
	open func(context.Context) (shut func(), err error)
	shut func() // does not wait for the requests that are under way; nil: it is not open
	// patience is how long it may be busy, by a predecessor.
	patience time.Duration
	failure  string    // that was reported: why it cannot be opened
	since    time.Time // when it first could not be
}

func (p *port) close() {
	if p.shut != nil {
		p.shut()
		p.shut = nil
	}
}

func (s *Server) openHTTP(ctx context.Context) (func(), error) {
	ln, err := s.cfg.Listen(ctx, "tcp", s.cfg.HTTP)
	if err != nil {
		return nil, err
	}
	var h http.Handler = http.HandlerFunc(s.serve)
	if s.acme != nil {
		h = s.acme.challenges(func() *route.Table { return s.now.Load().Table }, h)
	}
	srv := s.server(h)
	srv.Protocols.SetUnencryptedHTTP2(true)
	return s.begin(srv, ln, func() error { return srv.Serve(ln) }), nil
}

func (s *Server) openHTTPS(ctx context.Context) (func(), error) {
	ln, err := s.cfg.Listen(ctx, "tcp", s.cfg.HTTPS)
	if err != nil {
		return nil, err
	}
	if a, ok := ln.Addr().(*net.TCPAddr); ok {
		s.port.Store(int32(a.Port))
	}
	srv := s.server(http.HandlerFunc(s.serve))
	srv.Protocols.SetHTTP2(true)
	srv.TLSConfig = s.tlsConfig()
	return s.begin(srv, ln, func() error { return srv.ServeTLS(ln, "", "") }), nil
}

// server is one for TCP.
func (s *Server) server(h http.Handler) *http.Server {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader, Protocols: new(http.Protocols),
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // what clients do wrong
		HTTP2:    &http.HTTP2Config{MaxConcurrentStreams: 250, MaxReceiveBufferPerConnection: 1 << 20, SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second, WriteByteTimeout: stallTimeout},
	}
	srv.Protocols.SetHTTP1(true)
	return srv
}

// begin serves until the function that it returns is called.
func (s *Server) begin(srv *http.Server, ln net.Listener, serve func() error) (shut func()) {
	p := &leaver{Handler: srv.Handler}
	srv.Handler = p
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := serve(); !p.left.Load() {
			s.log.Error("ingress stopped serving", "err", err)
		}
	}()
	return func() {
		p.left.Store(true)
		ln.Close()
		<-ended
		s.leaving.Go(func() {
			begun := time.Now()
			time.Sleep(min(linger, s.cfg.Drain))
			end(s.cfg.Drain-time.Since(begun), srv.Shutdown, srv.Close)
			p.await(s.cfg.Drain - time.Since(begun))
		})
	}
}

// end ends a server in order, or at once if that takes too long.
func end(most time.Duration, orderly func(context.Context) error, atOnce func() error) {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	if orderly(ctx) != nil {
		_ = atOnce()
	}
}

// leaver is a handler that can be left by its clients.
type leaver struct {
	http.Handler
	left atomic.Bool // its listener is closed
	busy sync.WaitGroup
}

// ServeHTTP implements [http.Handler].
func (p *leaver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.busy.Add(1)
	defer p.busy.Done()
	if p.left.Load() && r.ProtoMajor == 1 && r.Header.Get("Upgrade") == "" {
		w.Header().Set("Connection", "close")
	}
	p.Handler.ServeHTTP(w, r)
}

// await waits for connections that are no longer the HTTP server's own (WebSocket).
func (p *leaver) await(most time.Duration) {
	done := make(chan struct{})
	go func() {
		p.busy.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(most):
	}
}

// openHTTP3 needs to know the port of HTTPS, which is opened before.
func (s *Server) openHTTP3(ctx context.Context) (func(), error) {
	host, _, err := net.SplitHostPort(s.cfg.HTTPS)
	if err != nil {
		return nil, err
	}
	port := int(s.port.Load())
	if port == 0 {
		return nil, errors.New("https is not served")
	}
	conn, err := s.cfg.ListenPacket(ctx, "udp", net.JoinHostPort(host, fmt.Sprint(port)))
	if err != nil {
		return nil, err
	}
	srv := &http3.Server{
		Handler: http.HandlerFunc(s.serve), TLSConfig: http3.ConfigureTLSConfig(s.tlsConfig()), Port: port,
		MaxHeaderBytes: maxHeader, IdleTimeout: idleTimeout, Logger: slog.New(slog.DiscardHandler),
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := srv.Serve(conn); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("ingress stopped serving HTTP/3", "err", err)
		}
	}()
	s.quic.Store(true)
	return func() {
		s.quic.Store(false)
		s.leaving.Go(func() { // the socket stays busy until then
			end(min(quicDrain, s.cfg.Drain), srv.Shutdown, srv.Close)
			<-ended
			conn.Close()
		})
	}, nil
}

// tlsConfig finds certificates by the name that a client asks for.
func (s *Server) tlsConfig() *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: s.certificate}
	if s.acme != nil {
		c.NextProtos = append(c.NextProtos, acmeProtocol)
	}
	return c
}

// certificate is that of a host; without one the handshake ends with "unrecognized name".
func (s *Server) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if s.acme != nil && slices.Equal(hello.SupportedProtos, []string{acmeProtocol}) {
		return s.acme.certificate(hello)
	}
	c, managed := s.now.Load().Certificate(hostName(hello.ServerName))
	switch {
	case managed && s.acme != nil:
		return s.acme.certificate(hello)
	case c != nil:
		return c.TLS, nil
	}
	return nil, nil
}
