package apiserver

import (
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/schemas/api"
)

// Exposition is what a node says of itself to who scrapes it, whole: half of it would
// look like metrics that have ended.
type Exposition struct {
	Type     string // of the content, one of Prometheus
	Encoding string // of the content, such as "gzip"; "": as it is
	Body     []byte // at most MaxExposition
}

// MaxExposition is how many bytes the metrics of a node may have, as they travel.
const MaxExposition = 8 << 20

// ErrTooLarge says that metrics exceed MaxExposition.
var ErrTooLarge = fmt.Errorf("the metrics have more than %d bytes", MaxExposition)

// Write answers a scrape with e.
func (e *Exposition) Write(w http.ResponseWriter) error {
	h := w.Header()
	h.Set("Content-Type", e.Type)
	if e.Encoding != "" {
		h.Set("Content-Encoding", e.Encoding)
	}
	if _, err := w.Write(e.Body); err != nil {
		return fmt.Errorf("send metrics: %w", err)
	}
	return nil
}

// expositionTypes are the formats of Prometheus. Others are not passed on: a node must
// not have the API show pages to a browser that holds an administrator's certificate.
var expositionTypes = []string{"text/plain", "application/openmetrics-text", "application/vnd.google.protobuf"}

// serveNodeProxy serves what can be reached below a node's proxy, which are its metrics:
// scrapers of Kubernetes look for them there, with the right to get nodes/proxy.
func (s *Server) serveNodeProxy(w http.ResponseWriter, r *http.Request, t target) error {
	switch _, known := s.cfg.Store.View().Get(t.key()); {
	case r.Method != http.MethodGet:
		return apierrors.NewMethodNotSupported(groupResource(api.Nodes+"/proxy"), r.Method)
	case t.rest != "metrics":
		return notServed(t.kind.GroupVersion(), "nodes/proxy/"+t.rest)
	case !known:
		return apierrors.NewNotFound(groupResource(api.Nodes), t.name)
	case s.cfg.Nodes == nil:
		return apierrors.NewServiceUnavailable("this server reaches no nodes")
	case !s.streams.enter():
		return apierrors.NewTooManyRequests("too many logs, execs and scrapes of nodes are open", 10)
	}
	defer s.streams.leave()
	ctx, cancel := context.WithTimeout(r.Context(), s.cfg.Scrape)
	defer cancel()
	accept := http.Header{}
	for _, name := range []string{"Accept", "Accept-Encoding"} {
		if v := r.Header.Values(name); len(v) > 0 {
			accept[name] = v
		}
	}
	e, err := s.cfg.Nodes.Metrics(ctx, t.name, accept)
	if err == nil {
		if kind, _, typeErr := mime.ParseMediaType(e.Type); typeErr != nil || !slices.Contains(expositionTypes, kind) {
			err = fmt.Errorf("what it says is %q, which is no format of metrics", e.Type)
		}
	}
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = apierrors.NewTimeoutError(fmt.Sprintf("node %s did not say its metrics within %s", t.name, s.cfg.Scrape), 0)
	}
	if err != nil {
		return fmt.Errorf("metrics of node %s: %w", t.name, err)
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err := e.Write(w); err != nil {
		s.log.Debug("a scrape was given up", "node", t.name, "error", err)
	}
	return nil
}
