package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

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
