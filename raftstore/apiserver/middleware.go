package apiserver

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// health are the paths that need no certificate: they tell nothing but whether the
// server lives.
var health = map[string]bool{"/livez": true, "/readyz": true, "/healthz": true}

// LagHeader tells who reads what a server has at hand how old that may be.
const LagHeader = "Decree-Lag"

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rec := &recorder{ResponseWriter: w}
	who, known := identify(r)
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			s.log.Error("panic while serving", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
			if rec.code == 0 && !rec.hijacked {
				s.fail(rec, r, statusError(http.StatusInternalServerError, metav1.StatusReasonInternalError, "the server hit a bug; its log has the details"))
			}
		}
		s.metrics.observe(r.Method, rec.code, time.Since(start))
		s.log.Debug("served", "method", r.Method, "path", r.URL.Path, "query", loggedQuery(r),
			"code", rec.code, "bytes", rec.written, "user", who.Name, "remote", r.RemoteAddr, "took", time.Since(start))
	}()
	if !known && !health[r.URL.Path] && !below(s.cfg.Open, r.URL.Path) {
		s.fail(rec, r, statusError(http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "a client certificate signed by the cluster's CA is needed"))
		return
	}
	if r.Header.Get("Impersonate-User") != "" { // ignoring it would do more than was asked for
		s.fail(rec, r, statusError(http.StatusBadRequest, metav1.StatusReasonBadRequest, "impersonation is not supported: use a certificate of that user"))
		return
	}
	ctx := WithIdentity(r.Context(), who)
	control := http.NewResponseController(w)
	// A connection remembers the deadline of the request before: streams and mounted
	// handlers, which know their own limits, begin with none.
	_ = control.SetWriteDeadline(time.Time{}) // not supported by test recorders
	if !s.mounted(r.URL.Path) {
		if !streaming(r) {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, s.cfg.Request)
			defer cancel()
			deadline := time.Now().Add(s.cfg.Request)
			_ = control.SetReadDeadline(deadline)
			_ = control.SetWriteDeadline(deadline)
		}
		limit := s.cfg.Body
		if strings.HasSuffix(r.URL.Path, "/plan") {
			limit = s.cfg.Tree
		}
		r.Body = http.MaxBytesReader(rec, r.Body, limit)
	}
	if s.cfg.Lag != nil && r.Method == http.MethodGet && r.URL.Query().Get("resourceVersion") == "0" {
		w.Header().Set(LagHeader, s.cfg.Lag())
	}
	r = r.WithContext(ctx)
	if err := s.authorizePath(r, who); err != nil {
		s.fail(rec, r, err)
		return
	}
	s.routes.ServeHTTP(rec, r)
}

// authorizePath decides about paths that are not objects; those are decided where
// the object is known, mounted handlers decide themselves.
func (s *Server) authorizePath(r *http.Request, who Identity) error {
	p := r.URL.Path
	if health[p] || s.mounted(p) || objectPath(p) {
		return nil
	}
	if p == "/metrics" && !who.Admin() || !Authorize(who, VerbGet, nonResource, "", "", s.cfg.Store.View()) {
		return statusError(http.StatusForbidden, metav1.StatusReasonForbidden, fmt.Sprintf("user %s may not get %s", who.Name, p))
	}
	return nil
}

// objectPath reports whether p is below a group and version.
func objectPath(p string) bool {
	parts := strings.Split(strings.Trim(p, "/"), "/")
	return parts[0] == "api" && len(parts) > 2 || parts[0] == "apis" && len(parts) > 3
}

// mounted reports whether a handler of somebody else serves path.
func (s *Server) mounted(path string) bool {
	return below(s.cfg.Mount, path) || below(s.cfg.Open, path)
}

func below(handlers map[string]http.Handler, path string) bool {
	for prefix := range handlers {
		if path == prefix || strings.HasSuffix(prefix, "/") && strings.HasPrefix(path, prefix) {
			return true
		}
	}
	return false
}

// streaming reports whether the answer to r may take as long as it likes.
func streaming(r *http.Request) bool {
	q := r.URL.Query()
	return q.Get("watch") == "true" || q.Get("watch") == "1" || q.Get("follow") == "true" ||
		strings.HasSuffix(r.URL.Path, "/exec") || strings.HasSuffix(r.URL.Path, "/log")
}

// loggedQuery is the part of a query that is fit for the log: what a person types
// into a container is not, and no more are queries of mounted handlers' clients.
func loggedQuery(r *http.Request) string {
	if strings.HasSuffix(r.URL.Path, "/exec") || !strings.HasPrefix(r.URL.Path, "/api") {
		return ""
	}
	return clip(r.URL.RawQuery, 512)
}

func clip(s string, n int) string { return s[:min(n, len(s))] }

// recorder remembers what was answered. It passes on what streams need.
type recorder struct {
	http.ResponseWriter
	code     int
	written  int64
	hijacked bool
}

func (r *recorder) WriteHeader(code int) {
	if r.code == 0 {
		r.code = code
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.code == 0 {
		r.code = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(p)
	r.written += int64(n)
	return n, err
}

// Unwrap serves http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// Flush implements http.Flusher.
func (r *recorder) Flush() {
	if f, ok := r.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// Hijack implements http.Hijacker.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	h, ok := r.ResponseWriter.(http.Hijacker)
	if !ok {
		return nil, nil, fmt.Errorf("take over connection: %w (use HTTP/1.1)", http.ErrNotSupported)
	}
	r.hijacked = true
	return h.Hijack()
}

// gauge counts what is in use, up to a limit.
type gauge struct {
	used  atomic.Int64
	limit int64
}

// enter reports whether there is room; the caller must leave if so.
func (g *gauge) enter() bool {
	if g.used.Add(1) > g.limit {
		g.used.Add(-1)
		return false
	}
	return true
}

func (g *gauge) leave() { g.used.Add(-1) }

// wait returns when nothing is in use, or ctx is done.
func (g *gauge) wait(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for g.used.Load() > 0 && ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// requestMetrics are the server's own figures; the zero value keeps none.
type requestMetrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
}

func newRequestMetrics(reg prometheus.Registerer, watches, streams *gauge) *requestMetrics {
	if reg == nil {
		return &requestMetrics{}
	}
	m := &requestMetrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "decree_api_requests_total", Help: "Requests answered, by method and status code."}, []string{"method", "code"}),
		seconds:  prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "decree_api_request_seconds", Help: "Time to answer, streams included.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9)}, []string{"method"}),
	}
	inUse := func(name, help string, g *gauge) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(g.used.Load()) })
	}
	reg.MustRegister(m.requests, m.seconds,
		inUse("decree_api_watches", "Watches open now.", watches),
		inUse("decree_api_streams", "Logs, execs and scrapes of nodes open now.", streams))
	return m
}

func (m *requestMetrics) observe(method string, code int, took time.Duration) {
	if m.requests == nil {
		return
	}
	switch method { // methods are the client's words: keep the set small
	case http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
	default:
		method = "other"
	}
	m.requests.WithLabelValues(method, strconv.Itoa(code)).Inc()
	m.seconds.WithLabelValues(method).Observe(took.Seconds())
}
