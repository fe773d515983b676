// Package apiserver serves the cluster's state in the REST shape of Kubernetes over
// TLS with client certificates: discovery, get, list, watch, tables, pod logs and
// exec, the metrics and reports of nodes, and the few operator actions that are not desired
// state. Desired state comes from Git: every write to it is refused with the place
// to edit.
//
// It decides nothing about the cluster. State is read from and proposed to a
// [Store]; logs, exec and metrics go to [Nodes]; sources are handled by [Sources].
package apiserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// Config is everything a Server depends on. Store is required.
type Config struct {
	Store   Store
	Nodes   Nodes   // nil: logs, exec and the metrics of nodes answer 503
	Sources Sources // nil: source actions answer 503

	// TLS holds the server's certificate and, in ClientCAs, who signs clients. The
	// server sets the rest: TLS 1.3, and a certificate from everyone who wants more
	// than to know whether the server lives. Nil: the connections that Serve gets are
	// *tls.Conn whose handshake has asked for a certificate.
	TLS *tls.Config
	// Version is shown by /version and `kubectl version` after the API level.
	Version string
	// Ready says why the server cannot serve yet; nil: always ready.
	Ready func(context.Context) error
	// Metrics serves /metrics to authenticated clients; nil: not found. Registerer
	// receives the server's own request metrics; nil: none are kept.
	Metrics    http.Handler
	Registerer prometheus.Registerer
	// Mount adds handlers below a path ("/git/"). Their requests are authenticated:
	// [IdentityFrom] tells who asks.
	Mount map[string]http.Handler
	// Open adds handlers below a path that serve anybody, without a certificate.
	Open map[string]http.Handler
	// Lag says how old what this server has at hand may be, for reads that ask for no
	// more (resourceVersion=0); nil: nothing is said.
	Lag func() string
	// Heard is told when a node reports; nil: nobody wants to know. It must not wait.
	Heard func(node string, at time.Time)
	Log   *slog.Logger // nil: slog.Default()
	Limits
}

// Limits bound what clients may use. Zero values take the defaults.
type Limits struct {
	Body      int64         // bytes of a request body, plans of trees aside; 8 MiB
	Tree      int64         // bytes of a tree sent to be planned; 64 MiB
	Watches   int           // watches at once; 50,000
	Streams   int           // logs, execs and scrapes of nodes at once; 500
	Request   time.Duration // wall time of a request that is not a stream; 60 s
	Scrape    time.Duration // what a node has to answer a scrape; 10 s, as long as Prometheus waits unless told otherwise
	WatchTime time.Duration // a watch without timeoutSeconds ends after this, and up to twice as much; 30 min
	Bookmark  time.Duration // between bookmarks of a watch; 60 s
	Idle      time.Duration // an exec without traffic ends after this; 4 h
}

func (l *Limits) setDefaults() {
	setDefault(&l.Body, 8<<20)
	setDefault(&l.Tree, 64<<20)
	setDefault(&l.Watches, 50_000)
	setDefault(&l.Streams, 500)
	setDefault(&l.Request, time.Minute)
	setDefault(&l.Scrape, 10*time.Second)
	setDefault(&l.WatchTime, 30*time.Minute)
	setDefault(&l.Bookmark, time.Minute)
	setDefault(&l.Idle, 4*time.Hour)
}

func setDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Server is an http.Handler. All of its methods are safe for concurrent use.
type Server struct {
	cfg     Config
	log     *slog.Logger
	routes  http.Handler
	metrics *requestMetrics
	pages   pageCache
	watches gauge
	flushes *rate.Limiter // of batches of events to watches
	streams gauge
}

// New returns a Server that serves nothing by itself yet: see [Server.Serve].
func New(cfg Config) (*Server, error) {
	if cfg.Store == nil {
		return nil, errors.New("new API server: no store")
	}
	cfg.setDefaults()
	s := &Server{cfg: cfg, log: cfg.Log}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.watches.limit, s.streams.limit = int64(cfg.Watches), int64(cfg.Streams)
	flushes := flushesPerCore * runtime.GOMAXPROCS(0)
	s.flushes = rate.NewLimiter(rate.Limit(flushes), flushes/100)
	s.metrics = newRequestMetrics(cfg.Registerer, &s.watches, &s.streams)
	s.routes = s.newRoutes()
	return s, nil
}

// Serve answers connections of l over TLS until ctx is done, then ends watches and
// streams, lets other requests finish for up to five seconds, and closes l. It
// returns nil after an orderly end.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	if s.cfg.TLS != nil && s.cfg.TLS.ClientCAs == nil {
		return errors.New("serve API: no TLS configuration with client CAs")
	}
	base, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := &http.Server{
		Handler:           s,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		// Pings find clients that went away without a word: watches are silent for long.
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 250, SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second, WriteByteTimeout: 30 * time.Second},
	}
	failed := make(chan error, 1)
	go func() {
		if s.cfg.TLS == nil {
			failed <- srv.Serve(l)
			return
		}
		srv.TLSConfig = tlsConfig(s.cfg.TLS)
		failed <- srv.ServeTLS(l, "", "")
	}()
	select {
	case err := <-failed:
		return fmt.Errorf("serve API on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	cancel()
	grace, stop := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer stop()
	err := srv.Shutdown(grace)
	if err != nil {
		err = srv.Close()
	}
	<-failed
	s.streams.wait(grace) // hijacked connections are not the http.Server's any more
	if err != nil {
		return fmt.Errorf("stop API on %s: %w", l.Addr(), err)
	}
	return nil
}

func tlsConfig(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.MinVersion = tls.VersionTLS13
	// Without a certificate only health is served; see authenticate.
	c.ClientAuth = tls.VerifyClientCertIfGiven
	return c
}
