package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/tunnel"
)

// newRegistry makes the registry of a process, which tells of the process itself.
func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Gather implements [prometheus.Gatherer] with the metrics of this process, and those of the
// process that serves DNS and Ingress beside it if it is a node as well.
func (s *server) Gather() ([]*dto.MetricFamily, error) {
	all := prometheus.Gatherers{s.metrics}
	if f := s.front.Load(); f != nil {
		all = append(all, f)
	}
	return all.Gather()
}

// gatherTime is how long metrics of this node may take to be collected: less than a
// server waits for them, so that it hears why there are none.
const gatherTime = 8 * time.Second

// exposed serves what g gathers. What is wrong with a part of it is told to log, and does
// not take away the rest, which may show what is wrong. Scrapers that come at the same
// time share what is gathered.
func exposed(g prometheus.Gatherer, log *slog.Logger) http.Handler {
	return promhttp.HandlerFor(g, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError,
		Timeout: gatherTime, CoalesceGather: true, MaxRequestsInFlight: 20,
	})
}

// Metrics implements [apiserver.Nodes]. What a process with a server and an agent serves
// for its node is what the server says of itself: they have one registry.
func (n *nodes) Metrics(ctx context.Context, node string, accept http.Header) (*apiserver.Exposition, error) {
	if r := n.remote(node); r != nil {
		e, err := r.Metrics(ctx, node, accept)
		if refused, ok := errors.AsType[*tunnel.Refused](err); ok && refused.Code == http.StatusNotFound {
			return nil, apierrors.NewServiceUnavailable("its agent is of a version that does not serve metrics: upgrade it")
		}
		return e, told(err)
	}
	return exposition(ctx, n.metrics, accept)
}

// exposition is what h answers a scrape with.
func exposition(ctx context.Context, h http.Handler, accept http.Header) (*apiserver.Exposition, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "/metrics", nil)
	if err != nil {
		return nil, err
	}
	r.Header = accept
	w := &recording{header: http.Header{}}
	h.ServeHTTP(w, r)
	switch {
	case w.tooLarge:
		return nil, apiserver.ErrTooLarge
	case w.code == http.StatusServiceUnavailable:
		return nil, apierrors.NewServiceUnavailable(w.text())
	case w.code != 0 && w.code != http.StatusOK:
		return nil, errors.New(w.text())
	}
	return &apiserver.Exposition{Type: w.header.Get("Content-Type"), Encoding: w.header.Get("Content-Encoding"), Body: w.body.Bytes()}, nil
}

// recording is an answer that is kept, as far as it is not too large for a scrape.
type recording struct {
	header   http.Header
	code     int
	body     bytes.Buffer
	tooLarge bool
}

func (r *recording) Header() http.Header  { return r.header }
func (r *recording) WriteHeader(code int) { r.code = code }

// text is that of an error.
func (r *recording) text() string { return strings.TrimSpace(r.body.String()) }

func (r *recording) Write(p []byte) (int, error) {
	if r.body.Len()+len(p) > apiserver.MaxExposition {
		r.tooLarge = true
		return 0, apiserver.ErrTooLarge
	}
	return r.body.Write(p)
}
