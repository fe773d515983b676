// Package healthcheck answers load balancers that ask whether a node has endpoints of a
// service: an HTTP server on each healthCheckNodePort, as the Service API and kube-proxy
// have it.
//
// It knows nothing of services but what render.HealthChecks says, and reads no kernel.
package healthcheck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"decree.dev/decree/netplane/render"
)

const (
	// headerTimeout is how long a client may take to ask. Load balancers are quick.
	headerTimeout = 5 * time.Second
	// idleTimeout closes connections that a load balancer keeps for its next question.
	idleTimeout = 2 * time.Minute
)

// Config says where to listen.
type Config struct {
	// Listen opens a listener for a port, on all addresses of the node; nil: net.Listen.
	Listen func(ctx context.Context, port uint16) (net.Listener, error)
	// Log; nil: slog.Default.
	Log *slog.Logger
}

// Server is the servers of all health checks. All methods are safe for concurrent use.
type Server struct {
	listen func(ctx context.Context, port uint16) (net.Listener, error)
	log    *slog.Logger

	mu     sync.Mutex
	ports  map[uint16]*port
	closed bool
	wg     sync.WaitGroup
}

// port is one port that is served.
type port struct {
	http *http.Server
	// check is what the port answers, guarded by Server.mu.
	check render.HealthCheck
}

// New returns a Server that listens on nothing yet.
func New(cfg Config) *Server {
	s := &Server{listen: cfg.Listen, log: cfg.Log, ports: map[uint16]*port{}}
	if s.listen == nil {
		s.listen = func(ctx context.Context, p uint16) (net.Listener, error) {
			return (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(int(p))))
		}
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	return s
}

// Set makes the node answer these checks, and no others. A port that is in use by somebody
// else is part of the error; the rest is served, and the next Set tries again. After Close
// it does nothing but return an error that matches http.ErrServerClosed.
func (s *Server) Set(ctx context.Context, checks []render.HealthCheck) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("health checks of services: %w", http.ErrServerClosed)
	}
	wanted := make(map[uint16]bool, len(checks))
	for _, c := range checks {
		wanted[c.Port] = true
	}
	var errs []error
	for number, p := range s.ports {
		if !wanted[number] {
			errs = append(errs, p.http.Close())
			delete(s.ports, number)
		}
	}
	for _, c := range checks {
		if p := s.ports[c.Port]; p != nil {
			p.check = c
			continue
		}
		if err := s.open(ctx, c); err != nil {
			errs = append(errs, fmt.Errorf("health check of service %s/%s on node port %d: %w", c.Namespace, c.Name, c.Port, err))
		}
	}
	return errors.Join(errs...)
}

// open serves one port. The caller holds mu.
func (s *Server) open(ctx context.Context, c render.HealthCheck) error {
	ln, err := s.listen(ctx, c.Port)
	if err != nil {
		return err
	}
	p := &port{check: c}
	p.http = &http.Server{
		Handler: s.handler(p), ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout, WriteTimeout: headerTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.ports[c.Port] = p
	s.wg.Go(func() {
		if err := p.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("health check of a service ended", "namespace", c.Namespace, "service", c.Name, "port", c.Port, "err", err)
			s.forget(p)
		}
	})
	return nil
}

// forget makes the next Set open the port of p again.
func (s *Server) forget(p *port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ports[p.check.Port] == p {
		delete(s.ports, p.check.Port)
	}
}

// Close ends all servers and waits for them; connections end at once.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	var errs []error
	for _, p := range s.ports {
		errs = append(errs, p.http.Close())
	}
	clear(s.ports)
	s.mu.Unlock()
	s.wg.Wait()
	return errors.Join(errs...)
}

// answer is the body of an answer, which people and some load balancers read.
type answer struct {
	Service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"service"`
	LocalEndpoints int `json:"localEndpoints"`
	// ServiceProxyHealthy is always true here: an agent that is down does not answer.
	ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
}

// handler answers whatever is asked, on any path and by any method: 200 if the service has
// ready endpoints on this node, or else 503. The header X-Load-Balancing-Endpoint-Weight
// says how many, for load balancers that weigh nodes.
func (s *Server) handler(p *port) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		c := p.check
		s.mu.Unlock()
		a := answer{LocalEndpoints: c.Endpoints, ServiceProxyHealthy: true}
		a.Service.Namespace, a.Service.Name = c.Namespace, c.Name
		h := w.Header()
		h.Set("Content-Type", "application/json")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(c.Endpoints))
		status := http.StatusOK
		if c.Endpoints == 0 {
			status = http.StatusServiceUnavailable
		}
		w.WriteHeader(status)
		if err := json.NewEncoder(w).Encode(a); err != nil {
			s.log.Debug("answer a health check", "namespace", c.Namespace, "service", c.Name, "err", err)
		}
	})
}
