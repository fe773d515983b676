package join

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// Config is everything that a Server depends on. Cluster is required.
type Config struct {
	Cluster    Cluster
	Log        *slog.Logger          // nil: slog.Default()
	Registerer prometheus.Registerer // nil: no metrics are kept
	Limits     Limits                // of strangers; members have the same, each by name
}

// Server is the HTTP side of joining. It is safe for concurrent use.
type Server struct {
	cluster   Cluster
	log       *slog.Logger
	strangers *limiter
	members   *limiter
	requests  *prometheus.CounterVec
}

// New returns a Server; its handlers are to be mounted, see [Server.Join] and
// [Server.Renew].
func New(cfg Config) (*Server, error) {
	if cfg.Cluster == nil {
		return nil, errors.New("new join server: no cluster")
	}
	cfg.Limits.setDefaults()
	s := &Server{
		cluster: cfg.Cluster, log: cfg.Log,
		// Apart: members must be able to renew while strangers use up what is theirs.
		strangers: newLimiter(cfg.Limits), members: newLimiter(cfg.Limits),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "decree_join_requests_total", Help: "Requests to join, to renew a certificate, or for the CAs, by outcome.",
		}, []string{"operation", "outcome"}),
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(s.requests); err != nil {
			return nil, fmt.Errorf("new join server: %w", err)
		}
	}
	return s, nil
}

// Join serves [JoinPath] to anybody, without a client certificate.
func (s *Server) Join() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET "+caPath, s.limited("ca", s.strangers, sourceOf, s.serveCA))
	mux.Handle("POST "+JoinPath+"{$}", s.limited("join", s.strangers, sourceOf, s.serveJoin))
	return mux
}

// failure is an error with its place in HTTP.
type failure struct {
	status int
	code   string
	err    error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func bad(err error) error { return &failure{http.StatusBadRequest, codeBad, err} }

// limited bounds a handler in number, size and time, and answers its errors.
func (s *Server) limited(operation string, l *limiter, key func(*http.Request) string, serve func(context.Context, *http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !l.enter(key(r), time.Now()) {
			s.refuse(w, r, operation, &failure{http.StatusTooManyRequests, codeBusy, errors.New("too many requests: try again in a few seconds")})
			return
		}
		defer l.leave()
		// What is not supported (a test's recorder) has no slow peer either.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTime))
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		ctx, cancel := context.WithTimeout(r.Context(), answerTime)
		defer cancel()
		answer, err := serve(ctx, r)
		if err != nil {
			s.refuse(w, r, operation, err)
			return
		}
		s.requests.WithLabelValues(operation, "ok").Inc()
		writeJSON(w, http.StatusOK, answer)
	})
}

// refuse tells the client what it may know, and the log the rest.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, operation string, err error) {
	f := s.classify(err)
	s.requests.WithLabelValues(operation, f.code).Inc()
	level := slog.LevelWarn
	if f.code == codeBusy {
		level = slog.LevelDebug // or a flood would fill the disk
	}
	s.log.Log(r.Context(), level, "refused", "operation", operation, "from", r.RemoteAddr, "code", f.code, "err", err)
	if f.status == http.StatusTooManyRequests || f.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, f.status, refusal{Code: f.code, Error: f.err.Error()})
}

func (s *Server) classify(err error) *failure {
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return &failure{http.StatusForbidden, c.code, c.err}
		}
	}
	return &failure{http.StatusServiceUnavailable, codeUnavailable, errors.New("the cluster cannot answer now: try again, or ask another server")}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// The client has gone if this fails; it asks again.
	_ = json.NewEncoder(w).Encode(v)
}

// readJSON reads one value, without anything after it.
func readJSON(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	if err := d.Decode(v); err != nil {
		if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return &failure{http.StatusRequestEntityTooLarge, codeBad, fmt.Errorf("read request: more than %d bytes", large.Limit)}
		}
		// The decoder's message may quote what was sent, a secret in the wrong place too.
		return bad(errors.New("read request: it is not the JSON that is expected here"))
	}
	if _, err := d.Token(); err != io.EOF {
		return bad(errors.New("read request: something follows the JSON"))
	}
	return nil
}

// serveCA tells anybody whom the cluster trusts. None of it is secret, and none of it
// is believed: see [Request].
func (s *Server) serveCA(ctx context.Context, _ *http.Request) (any, error) {
	issuer, err := s.cluster.Issuer(ctx)
	if err != nil {
		return nil, err
	}
	return trust{Active: issuer.Fingerprint(), Bundle: string(issuer.Bundle())}, nil
}

func (s *Server) serveJoin(ctx context.Context, r *http.Request) (any, error) {
	var req joinRequest
	if err := readJSON(r.Body, &req); err != nil {
		return nil, err
	}
	a, err := s.verify(ctx, &req)
	if err != nil {
		return nil, err
	}
	// From here on the client has shown the secret: it may know what is wrong.
	identity, err := identityFor(&req)
	if err != nil {
		return nil, bad(err)
	}
	key, err := pki.ParseCSR([]byte(req.CSR))
	if err != nil {
		return nil, bad(err)
	}
	if a.Key, err = pki.KeyHash(key); err != nil {
		return nil, bad(err)
	}
	a.Source = r.RemoteAddr
	if err := s.cluster.Admit(ctx, a); err != nil {
		return nil, fmt.Errorf("admit %s %s: %w", a.Role, a.Node, err)
	}
	answer, err := s.sign(ctx, req.CSR, identity)
	if err != nil {
		return nil, err
	}
	s.log.Info("admitted", "role", a.Role, "node", a.Node, "token", a.Token, "from", a.Source, "replace", a.Replace)
	return answer, nil
}

// verify looks at the token before anything else: what strangers send is neither
// parsed further nor looked up in the cluster.
func (s *Server) verify(ctx context.Context, req *joinRequest) (Admission, error) {
	obj, ok, err := s.cluster.Token(ctx, req.ID)
	if err != nil {
		return Admission{}, fmt.Errorf("look up token: %w", err)
	}
	if !ok {
		obj = nil
	}
	if err := pki.VerifyToken(obj, req.Secret, req.Role, req.Node, time.Now()); err != nil {
		return Admission{}, err
	}
	return Admission{Token: obj.Name, Role: req.Role, Node: req.Node, Hosts: req.Hosts, Replace: obj.Spec.Node != ""}, nil
}

// identityFor is who the machine becomes: its role is the token's, so an agent's token
// never makes a server.
func identityFor(req *joinRequest) (pki.Request, error) {
	if err := pki.ValidNode(req.Node); err != nil {
		return pki.Request{}, err
	}
	switch req.Role {
	case api.RoleServer:
		id := pki.ServerIdentity(req.Node, req.Hosts...)
		return id, id.Check()
	case api.RoleAgent:
		if len(req.Hosts) > 0 {
			return pki.Request{}, errors.New("an agent answers under no hosts")
		}
		return pki.Node(req.Node), nil
	}
	return pki.Request{}, fmt.Errorf("role %.20q is not known", req.Role)
}

func (s *Server) sign(ctx context.Context, csr string, identity pki.Request) (*certificates, error) {
	issuer, err := s.cluster.Issuer(ctx)
	if err != nil {
		return nil, err
	}
	info, err := s.cluster.Info(ctx)
	if err != nil {
		return nil, err
	}
	chain, err := issuer.Sign([]byte(csr), identity, time.Now())
	if err != nil {
		return nil, err
	}
	return &certificates{Info: info, Chain: string(chain), Bundle: string(issuer.Bundle())}, nil
}
