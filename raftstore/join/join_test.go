package join

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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
