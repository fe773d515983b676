package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

var quiet = slog.New(slog.DiscardHandler)

// fake is a cluster of one server in memory, which also serves itself.
type fake struct {
	t       *testing.T
	address string
	keeper  *pki.Keeper // of its server
	log     logBuffer
	metrics *prometheus.Registry

	mu     sync.Mutex
	spec   api.AuthoritySpec
	tokens map[string]*api.JoinToken
	keys   map[string]string // role/node -> key
	seen   map[string]pki.Holder
	down   error // what the next looks at tokens answer
	downs  int   // how many of them
	asked  int   // tokens that were looked up
}

func newCluster(t *testing.T) *fake {
	t.Helper()
	return newClusterWith(t, Limits{PerSource: 1e6, Burst: 1e6, Overall: 1e6})
}

func newClusterWith(t *testing.T, limits Limits) *fake {
	t.Helper()
	f := &fake{t: t, tokens: map[string]*api.JoinToken{}, keys: map[string]string{}, seen: map[string]pki.Holder{}, metrics: prometheus.NewRegistry()}
	var err error
	if f.spec, err = pki.NewAuthoritySpec(time.Now()); err != nil {
		t.Fatal(err)
	}
	f.keeper = openKeeper(t, t.TempDir())
	f.enroll(f.keeper, pki.ServerIdentity("s1", "127.0.0.1"))
	s, err := New(Config{Cluster: f, Log: slog.New(slog.NewTextHandler(&f.log, nil)), Registerer: f.metrics, Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(JoinPath, s.Join())
	mux.Handle(RenewPath, s.Renew())
	f.address = serveTLS(t, mux, f.keeper.ServerTLS("http/1.1"))
	return f
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func serveTLS(t *testing.T, h http.Handler, c *tls.Config) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, TLSConfig: c, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	return l.Addr().String()
}

func openKeeper(t *testing.T, dir string) *pki.Keeper {
	t.Helper()
	k, err := pki.OpenKeeper(dir, quiet)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// enroll gives k a certificate as the first server gets it, by hand.
func (f *fake) enroll(k *pki.Keeper, r pki.Request) {
	f.t.Helper()
	i, err := f.Issuer(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	csr, err := k.JoinRequest()
	if err != nil {
		f.t.Fatal(err)
	}
	chain, err := i.Sign(csr, r, time.Now())
	if err != nil {
		f.t.Fatal(err)
	}
	if err := k.Install(chain, i.Bundle(), time.Now()); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fake) token(spec api.JoinTokenSpec, ttl time.Duration) pki.Token {
	f.t.Helper()
	i, err := f.Issuer(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	made := time.Now()
	if ttl < 0 {
		made, ttl = made.Add(2*ttl), -ttl
	}
	text, obj, err := pki.NewToken(i.Fingerprints(), spec, ttl, made)
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tokens[obj.Name] = obj
	token, err := pki.ParseToken(text)
	if err != nil {
		f.t.Fatal(err)
	}
	return token
}

func (f *fake) Token(_ context.Context, id string) (*api.JoinToken, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.downs > 0 {
		f.downs--
		return nil, false, f.down
	}
	t, ok := f.tokens[id]
	return t, ok, nil
}

func (f *fake) Issuer(context.Context) (*pki.Issuer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return pki.NewIssuer(f.spec)
}

func (f *fake) setSpec(spec api.AuthoritySpec) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.spec = spec
}

func (f *fake) Admit(_ context.Context, a Admission) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := a.Role + "/" + a.Node
	if key, ok := f.keys[name]; ok && key != a.Key && !a.Replace {
		return ErrNameTaken
	}
	f.keys[name] = a.Key
	return nil
}

func (f *fake) Renew(_ context.Context, r Renewal) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := r.Role + "/" + r.Node
	switch key, ok := f.keys[name]; {
	case !ok:
		return ErrRemoved
	case key != r.Old && key != r.New:
		return ErrReplaced
	}
	f.keys[name] = r.New
	return nil
}

func (f *fake) Seen(_ context.Context, role, node string, h pki.Holder) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen[role+"/"+node] = h
}

func (f *fake) holder(name string) pki.Holder {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seen[name]
}

func (f *fake) admitted() map[string]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.keys)
}

// record has a member known by a key; empty: forgotten.
func (f *fake) record(name, key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.keys[name] = key; key == "" {
		delete(f.keys, name)
	}
}

func (f *fake) active() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.spec.Active
}

func (f *fake) Info(context.Context) (Info, error) {
	return Info{ClusterID: "c1", Servers: []string{f.address}}, nil
}

// ask is what a machine does to join.
func (f *fake) ask(k *pki.Keeper, token pki.Token, role, node string, hosts ...string) (*Answer, error) {
	f.t.Helper()
	csr, err := k.JoinRequest()
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(f.t.Context(), 10*time.Second)
	defer cancel()
	return Request(ctx, Application{Address: f.address, Token: token, Role: role, Node: node, Hosts: hosts, CSR: csr})
}

// join also installs the answer.
func (f *fake) join(k *pki.Keeper, token pki.Token, role, node string) error {
	f.t.Helper()
	answer, err := f.ask(k, token, role, node)
	if err != nil {
		return err
	}
	return k.Install(answer.Chain, answer.Bundle, time.Now())
}

// raw sends a request without a client certificate.
func (f *fake) raw(method, path, body string) (int, string) {
	f.t.Helper()
	client := newHTTP(&tls.Config{InsecureSkipVerify: true})
	req, err := http.NewRequestWithContext(f.t.Context(), method, "https://"+f.address+path, strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}
