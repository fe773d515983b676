package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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

func TestJoin(t *testing.T) {
	f := newCluster(t)
	for _, tt := range []struct {
		role, cn string
		hosts    []string
	}{
		{api.RoleAgent, "system:node:m1", nil},
		{api.RoleServer, "system:server:m1", []string{"10.0.0.7", "m1.example"}},
	} {
		token := f.token(api.JoinTokenSpec{Role: tt.role}, time.Hour)
		k := openKeeper(t, t.TempDir())
		answer, err := f.ask(k, token, tt.role, "m1", tt.hosts...)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Install(answer.Chain, answer.Bundle, time.Now()); err != nil {
			t.Fatal(err)
		}
		if k.Leaf().Subject.CommonName != tt.cn || answer.ClusterID != "c1" || len(answer.Servers) != 1 {
			t.Errorf("%v, %+v", k.Leaf().Subject, answer.Info)
		}
		for _, h := range tt.hosts {
			if err := k.Leaf().VerifyHostname(h); err != nil {
				t.Error(err)
			}
		}
		// A machine whose answer was lost asks again.
		if err := f.join(k, token, tt.role, "m1"); err != nil {
			t.Errorf("again: %v", err)
		}
		if strings.Contains(f.log.String(), token.Secret) {
			t.Error("the log has the secret")
		}
	}
}

func TestJoinRefuses(t *testing.T) {
	f := newCluster(t)
	agent, server := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour), f.token(api.JoinTokenSpec{Role: api.RoleServer}, time.Hour)
	expired := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, -time.Hour)
	bound := f.token(api.JoinTokenSpec{Role: api.RoleAgent, Node: "n9"}, time.Hour)
	unknown, guessed, foreign := agent, agent, agent
	unknown.ID = strings.Repeat("a", 10)
	guessed.Secret = server.Secret
	foreign.CAs = newCluster(t).token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour).CAs

	for _, tt := range []struct {
		name       string
		token      pki.Token
		role, node string
		hosts      []string
		want       error
		text       string
	}{
		{"unknown", unknown, api.RoleAgent, "n1", nil, pki.ErrToken, ""},
		{"a guessed secret", guessed, api.RoleAgent, "n1", nil, pki.ErrToken, ""},
		{"expired", expired, api.RoleAgent, "n1", nil, pki.ErrTokenExpired, "token create"},
		{"an agent's for a server", agent, api.RoleServer, "n1", nil, pki.ErrTokenRole, "role"},
		{"a server's for an agent", server, api.RoleAgent, "n1", nil, pki.ErrTokenRole, ""},
		{"for another machine", bound, api.RoleAgent, "n1", nil, pki.ErrTokenNode, ""},
		{"of another cluster", foreign, api.RoleAgent, "n1", nil, ErrWrongCA, "in between"},
		{"a bad name", agent, api.RoleAgent, "N_1", nil, nil, "machine name"},
		{"a name with a path", agent, api.RoleAgent, "../n1", nil, nil, "machine name"},
		{"no name", agent, api.RoleAgent, "", nil, nil, "machine name"},
		{"an agent with hosts", agent, api.RoleAgent, "n1", []string{pki.ServerName}, nil, "no hosts"},
		{"a bad host", server, api.RoleServer, "n1", []string{"*.x"}, nil, "neither an IP address"},
		{"many hosts", server, api.RoleServer, "n1", manyHosts(), nil, "hosts"},
	} {
		k := openKeeper(t, t.TempDir())
		answer, err := f.ask(k, tt.token, tt.role, tt.node, tt.hosts...)
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %+v, %v", tt.name, answer, err)
		}
		if tt.want == pki.ErrToken && (errors.Is(err, pki.ErrTokenExpired) || errors.Is(err, pki.ErrTokenRole)) {
			t.Errorf("%s: a stranger is told: %v", tt.name, err)
		}
	}
	if keys := f.admitted(); len(keys) != 0 {
		t.Errorf("admitted: %v", keys)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := Request(ctx, Application{Address: "127.0.0.1:1", Token: agent}); !errors.Is(err, ErrUnreachable) {
		t.Errorf("nobody there: %v", err)
	}
}

func TestOneNameOneKey(t *testing.T) {
	f := newCluster(t)
	token := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	first, second := openKeeper(t, t.TempDir()), openKeeper(t, t.TempDir())
	if err := f.join(first, token, api.RoleAgent, "n1"); err != nil {
		t.Fatal(err)
	}
	if err := f.join(second, token, api.RoleAgent, "n1"); !errors.Is(err, ErrNameTaken) || !strings.Contains(err.Error(), "--node") {
		t.Errorf("a second machine of one name: %v", err)
	}
	// An agent and a server of one machine have one name, and are two members.
	if err := f.join(openKeeper(t, t.TempDir()), f.token(api.JoinTokenSpec{Role: api.RoleServer}, time.Hour), api.RoleServer, "n1"); err != nil {
		t.Error(err)
	}
	if err := f.join(second, f.token(api.JoinTokenSpec{Role: api.RoleAgent, Node: "n1"}, time.Hour), api.RoleAgent, "n1"); err != nil {
		t.Errorf("a token for replacing it: %v", err)
	}
	servers := func() []string { return []string{f.address} }
	csr, err := first.JoinRequest()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := (&Member{Keeper: first, Servers: servers}).Renew(t.Context(), csr); err != nil {
		if !errors.Is(err, ErrReplaced) {
			t.Errorf("the replaced machine: %v", err)
		}
	} else {
		t.Error("the replaced machine renews")
	}
}

func manyHosts() (hosts []string) {
	for n := range 50 {
		hosts = append(hosts, fmt.Sprintf("h%d", n))
	}
	return hosts
}

// TestManInTheMiddle has a machine in between that does what it can: it presents its
// own CA, or the true one with a certificate of its own, and takes what it is given.
func TestManInTheMiddle(t *testing.T) {
	f := newCluster(t)
	token := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	evil := newCluster(t)
	agent := openKeeper(t, t.TempDir())
	f.enroll(agent, pki.Node("n1"))
	mustIssuer := func(c *fake) *pki.Issuer {
		i, err := c.Issuer(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	for _, tt := range []struct {
		name   string
		tls    *tls.Config
		bundle []byte
	}{
		{"its own CA", evil.keeper.ServerTLS("http/1.1"), mustIssuer(evil).Bundle()},
		{"the true CA, a certificate of its own", evil.keeper.ServerTLS("http/1.1"), mustIssuer(f).Bundle()},
		{"both CAs", evil.keeper.ServerTLS("http/1.1"), append(mustIssuer(evil).Bundle(), mustIssuer(f).Bundle()...)},
		{"the true CA, an agent's certificate", agent.ServerTLS("http/1.1"), mustIssuer(f).Bundle()},
		{"no CA", evil.keeper.ServerTLS("http/1.1"), nil},
	} {
		var mu sync.Mutex
		var heard bytes.Buffer
		address := serveTLS(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			if err := r.Write(&heard); err != nil {
				t.Error(err)
			}
			writeJSON(w, http.StatusOK, trust{Bundle: string(tt.bundle)})
		}), tt.tls)
		csr, err := openKeeper(t, t.TempDir()).JoinRequest()
		if err != nil {
			t.Fatal(err)
		}
		_, err = Request(t.Context(), Application{Address: address, Token: token, Role: api.RoleAgent, Node: "n2", CSR: csr})
		if !errors.Is(err, ErrWrongCA) {
			t.Errorf("%s: %v", tt.name, err)
		}
		mu.Lock()
		if !strings.Contains(heard.String(), caPath) {
			t.Errorf("%s: it heard nothing at all", tt.name)
		}
		for what, secret := range map[string]string{"secret": token.Secret, "id": token.ID, "name": "n2", "request": "CERTIFICATE REQUEST"} {
			if strings.Contains(heard.String(), secret) {
				t.Errorf("%s: it heard the %s", tt.name, what)
			}
		}
		mu.Unlock()
	}
}

// TestNoRedirect: a server that is verified may still not send the secret elsewhere.
func TestNoRedirect(t *testing.T) {
	f := newCluster(t)
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the secret went elsewhere") }))
	defer elsewhere.Close()
	address := serveTLS(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == caPath {
			i, err := f.Issuer(r.Context())
			if err != nil {
				t.Error(err)
			}
			writeJSON(w, http.StatusOK, trust{Bundle: string(i.Bundle())})
			return
		}
		http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
	}), f.keeper.ServerTLS("http/1.1"))
	if _, err := Request(t.Context(), Application{Address: address, Token: f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour), Role: api.RoleAgent, Node: "n1"}); err == nil {
		t.Error("joined")
	}
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

func TestMalformed(t *testing.T) {
	f := newCluster(t)
	token := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	body := func(change func(*joinRequest)) string {
		r := joinRequest{ID: token.ID, Secret: token.Secret, Role: api.RoleAgent, Node: "n1"}
		change(&r)
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for _, tt := range []struct {
		name, method, path, body string
		status                   int
	}{
		{"empty", "POST", JoinPath, "", 400},
		{"not JSON", "POST", JoinPath, "secret=" + token.Secret, 400},
		{"an array", "POST", JoinPath, "[]", 400},
		{"deep", "POST", JoinPath, strings.Repeat("[", 60000), 400},
		{"a number for the secret", "POST", JoinPath, `{"secret":1}`, 400},
		{"two values", "POST", JoinPath, body(func(*joinRequest) {}) + "{}", 400},
		{"too large", "POST", JoinPath, `{"id":"` + strings.Repeat("x", maxBody) + `"}`, 413},
		{"no token", "POST", JoinPath, "{}", 403},
		{"a stranger with a bad CSR", "POST", JoinPath, body(func(r *joinRequest) { r.Secret, r.CSR = "x", "x" }), 403},
		{"no CSR", "POST", JoinPath, body(func(*joinRequest) {}), 400},
		{"a bad CSR", "POST", JoinPath, body(func(r *joinRequest) { r.CSR = "x" }), 400},
		{"a long CSR", "POST", JoinPath, body(func(r *joinRequest) { r.CSR = strings.Repeat("x", 30000) }), 400},
		{"the wrong method", "GET", JoinPath, "", 405},
		{"the wrong path", "POST", JoinPath + "x", "{}", 404},
		{"the CAs", "GET", caPath, "", 200},
		{"a renewal by nobody", "POST", RenewPath, "{}", 401},
		{"trust for nobody", "GET", RenewPath, "", 401},
	} {
		status, answer := f.raw(tt.method, tt.path, tt.body)
		if status != tt.status {
			t.Errorf("%s: %d %s, want %d", tt.name, status, answer, tt.status)
		}
		if strings.Contains(answer, token.Secret) {
			t.Errorf("%s: the answer has the secret", tt.name)
		}
	}
	if strings.Contains(f.log.String(), token.Secret) {
		t.Error("the log has the secret")
	}
	if keys := f.admitted(); len(keys) != 0 {
		t.Errorf("admitted: %v", keys)
	}
}

// TestNoOracle: all that a stranger may get wrong has one answer.
func TestNoOracle(t *testing.T) {
	f := newCluster(t)
	good := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	expired := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, -time.Hour)
	f.record("agent/n1", "taken")
	answers := map[string]bool{}
	for _, id := range []string{good.ID, expired.ID, "aaaaaaaaaa", "", "../x"} {
		for _, role := range []string{api.RoleAgent, api.RoleServer, "x"} {
			for _, node := range []string{"n1", "n2", "N_"} {
				status, answer := f.raw("POST", JoinPath, fmt.Sprintf(`{"id":%q,"secret":"wrong","role":%q,"node":%q}`, id, role, node))
				answers[fmt.Sprint(status, answer)] = true
			}
		}
	}
	if len(answers) != 1 {
		t.Errorf("%d different answers: %v", len(answers), answers)
	}
}

func TestLimits(t *testing.T) {
	f := newClusterWith(t, Limits{PerSource: 0.001, Burst: 3, Overall: 1000, InFlight: 8})
	for n := range 5 {
		status, answer := f.raw("POST", JoinPath, "{}")
		if want := map[bool]int{true: 403, false: 429}[n < 3]; status != want {
			t.Errorf("request %d: %d %s", n, status, answer)
		}
	}
	f.mu.Lock()
	if f.asked != 3 {
		t.Errorf("%d looks at the state", f.asked)
	}
	f.mu.Unlock()
	// Members are not held back by strangers.
	k := openKeeper(t, t.TempDir())
	f.enroll(k, pki.Node("n1"))
	m := &Member{Keeper: k, Servers: func() []string { return []string{f.address} }, Log: quiet}
	if err := m.followOnce(t.Context()); err != nil {
		t.Error(err)
	}
	families, err := f.metrics.Gather()
	if err != nil || len(families) != 1 || len(families[0].GetMetric()) != 3 { // refused, held back, and trust
		t.Errorf("metrics %v, %v", families, err)
	}
}

func TestLimiter(t *testing.T) {
	now := time.Now()
	limits := Limits{PerSource: 1, Burst: 2, Overall: 1e6, InFlight: 1}
	l := newLimiter(limits)
	if !l.enter("a", now) || l.enter("b", now) {
		t.Error("more than one at once")
	}
	l.leave()
	if !l.enter("a", now) {
		t.Error("the burst is not allowed")
	}
	l.leave()
	if l.enter("a", now) {
		t.Error("more than the burst")
	}
	for i := range 3 * maxSources {
		l.source(fmt.Sprint(i), now).AllowN(now, 1)
	}
	if len(l.sources) > maxSources+1 {
		t.Errorf("%d sources are remembered", len(l.sources))
	}
	l.source("new", now.Add(time.Hour))
	if len(l.sources) > 10 {
		t.Errorf("%d sources are remembered after an hour", len(l.sources))
	}
	for addr, want := range map[string]string{
		"10.0.0.1:99": "10.0.0.1", "[::ffff:10.0.0.1]:99": "10.0.0.1", "[2001:db8:1:2:3::4]:1": "2001:db8:1:2::/64", "[fe80::1%eth0]:1": "fe80::/64", "x": "x",
	} {
		if got := sourceOf(&http.Request{RemoteAddr: addr}); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

func TestUnavailableIsTriedAgain(t *testing.T) {
	f := newCluster(t)
	token := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	setDown := func(times int) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.down, f.downs = errors.New("no leader: secret internals"), times
	}
	setDown(1)
	status, answer := f.raw("POST", JoinPath, "{}")
	if status != 503 || strings.Contains(answer, "internals") {
		t.Errorf("%d %s", status, answer)
	}
	k := openKeeper(t, t.TempDir())
	csr, err := k.JoinRequest()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	setDown(1000)
	if _, err := Request(ctx, Application{Address: f.address, Token: token, Role: api.RoleAgent, Node: "n1", CSR: csr}); !errors.Is(err, ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the cluster stays down: %v", err)
	}
	setDown(1)
	if err := f.join(k, token, api.RoleAgent, "n1"); err != nil {
		t.Errorf("the cluster comes back: %v", err)
	}
}
