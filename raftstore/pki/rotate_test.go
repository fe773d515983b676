package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"decree.dev/decree/schemas/api"
)

func newSpec(t *testing.T, now time.Time) api.AuthoritySpec {
	t.Helper()
	spec, err := NewAuthoritySpec(now)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func issuer(t *testing.T, spec api.AuthoritySpec) *Issuer {
	t.Helper()
	i, err := NewIssuer(spec)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestPlanRotation(t *testing.T) {
	one := newSpec(t, start)
	two, err := Successor(one, start)
	if err != nil {
		t.Fatal(err)
	}
	active := cloneSpec(two)
	active.Active = two.CAs[1].Fingerprint
	uncrossed := cloneSpec(two)
	uncrossed.CAs[1].Cross = ""
	last := cloneSpec(active)
	last.CAs = last.CAs[1:]
	last.CAs[0].Cross = ""
	uncrossedActive := cloneSpec(uncrossed)
	uncrossedActive.Active = active.Active

	oldCA, newCA := two.CAs[0].Fingerprint, two.CAs[1].Fingerprint
	end := start.Add(DefaultLifetime)
	behind := func(name string) Holder {
		return Holder{Name: name, Issuer: oldCA, Trusts: []string{oldCA}, Expires: end}
	}
	trusting := func(name string) Holder {
		return Holder{Name: name, Issuer: oldCA, Trusts: []string{oldCA, newCA}, Expires: end}
	}
	done := func(name string) Holder {
		return Holder{Name: name, Issuer: newCA, Trusts: []string{oldCA, newCA}, Expires: end}
	}
	blind := done("a2")
	blind.Trusts = []string{oldCA}
	list := func(h ...Holder) []Holder { return h }
	hour := start.Add(time.Hour)

	for _, tt := range []struct {
		name  string
		spec  api.AuthoritySpec
		fleet Fleet
		now   time.Time
		want  Step
	}{
		{"nothing to do", one, Fleet{Servers: list(behind("s1"))}, hour, Step{Stage: StageSteady}},
		{"an operator asks", one, Fleet{Servers: list(behind("s1")), Rotate: true}, hour, Step{Stage: StageMake}},
		{"the CA grows old", one, Fleet{Servers: list(behind("s1"))}, start.Add(caLifetime * 2 / 3), Step{Stage: StageMake}},
		{"a server does not know", two, Fleet{Servers: list(trusting("s2"), behind("s1"))}, hour,
			Step{Stage: StageSpread, Waiting: []string{"s1 to trust the new CA"}}},
		{"a server says nothing", two, Fleet{Servers: list(Holder{Name: "s1"})}, hour,
			Step{Stage: StageSpread, Waiting: []string{"s1 to trust the new CA"}}},
		{"the cross certificate bridges agents", two, Fleet{Servers: list(trusting("s1")), Agents: list(behind("a1"))}, hour,
			Step{Stage: StageSpread, Next: &active}},
		{"without it agents are waited for", uncrossed, Fleet{Servers: list(trusting("s1")), Agents: list(behind("a1"))}, hour,
			Step{Stage: StageSpread, Waiting: []string{"a1 to trust the new CA"}}},
		{"and then not", uncrossed, Fleet{Servers: list(trusting("s1")), Agents: list(trusting("a1"))}, hour,
			Step{Stage: StageSpread, Next: &uncrossedActive}},
		{"asking again changes nothing", two, Fleet{Servers: list(trusting("s1")), Rotate: true}, hour,
			Step{Stage: StageSpread, Next: &active}},
		{"some have not renewed", active, Fleet{Servers: list(done("s1"), trusting("s2")), Agents: list(blind, behind("a1"))}, hour,
			Step{Stage: StageRenew, Waiting: []string{"a1 to renew its certificate", "a2 to trust the new CA", "s2 to renew its certificate"}}},
		{"the overlap lasts", active, Fleet{Servers: list(done("s1")), Overlap: 2 * time.Hour}, hour,
			Step{Stage: StageRenew, Waiting: []string{"the overlap to end at 2026-01-01T02:00:00Z"}}},
		{"the old CA goes", active, Fleet{Servers: list(done("s1")), Agents: list(done("a1")), Overlap: time.Hour}, hour,
			Step{Stage: StageRenew, Next: &last}},
		{"who has expired is not waited for", active, Fleet{Servers: list(Holder{Name: "s1", Issuer: newCA, Trusts: []string{newCA}}), Agents: list(behind("a1"))}, end,
			Step{Stage: StageRenew, Next: &last}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := cloneSpec(tt.spec)
			got, err := PlanRotation(tt.spec, tt.fleet, tt.now)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(before, tt.spec); diff != "" {
				t.Errorf("the spec was changed: %s", diff)
			}
			if got.Next != nil {
				issuer(t, *got.Next)
			}
		})
	}
	if _, err := PlanRotation(active, Fleet{}, start); err == nil {
		t.Error("the old CA is dropped by who knows nobody")
	}
	if _, err := Successor(two, start); err == nil || !strings.Contains(err.Error(), "under way") {
		t.Errorf("a third CA: %v", err)
	}
}

// member is a process of the cluster in the walk below.
type member struct {
	*Keeper
	request        Request
	server, client *tls.Config // made once, as a process does
}

func newMember(t *testing.T, i *Issuer, r Request) *member {
	t.Helper()
	k, err := OpenKeeper(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	m := &member{k, r, k.ServerTLS(), RequireGroup(k.ClientTLS(), GroupServers)}
	m.renew(t, i)
	return m
}

func (m *member) renew(t *testing.T, i *Issuer) {
	t.Helper()
	csr, err := m.renewRequest()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := i.Sign(csr, m.request, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Install(chain, i.Bundle(), time.Now()); err != nil {
		t.Fatal(err)
	}
}

// shake makes a connection and sends a byte each way, so that both sides have
// accepted the other.
func shake(t *testing.T, server, client *tls.Config) (onServer, onClient error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			s := tls.Server(c, server)
			if err := s.Handshake(); err != nil {
				return err
			}
			_, err = s.Write([]byte{1})
			return err
		}()
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := tls.Client(c, client)
	if onClient = s.Handshake(); onClient == nil {
		_, onClient = s.Read(make([]byte, 1))
	}
	c.Close()
	return <-done, onClient
}

// TestRotation walks through a rotation. At each stage everyone talks to everyone,
// those who have heard of it and those who have not.
func TestRotation(t *testing.T) {
	now := time.Now()
	spec := newSpec(t, now)
	i := issuer(t, spec)
	s1, s2 := newMember(t, i, ServerIdentity("s1", "127.0.0.1")), newMember(t, i, ServerIdentity("s2"))
	awake, asleep := newMember(t, i, Node("n1")), newMember(t, i, Node("n2")) // asleep learns nothing until it must
	rawOld := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: i.Pool(), ServerName: ServerName}
	all := []*member{s1, s2, awake, asleep}

	fleet := func(rotate bool) Fleet {
		f := Fleet{Rotate: rotate}
		for _, m := range all {
			h := Holder{Name: m.request.Name, Issuer: m.Issuer(), Trusts: m.Trusts(), Expires: m.Leaf().NotAfter}
			if m == s1 || m == s2 {
				f.Servers = append(f.Servers, h)
			} else {
				f.Agents = append(f.Agents, h)
			}
		}
		return f
	}
	everyone := func(stage string) {
		t.Helper()
		for _, server := range []*member{s1, s2} {
			for _, client := range all {
				if s, c := shake(t, server.server, client.client); s != nil || c != nil {
					t.Errorf("%s: %s to %s: %v, %v", stage, client.request.Name, server.request.Name, c, s)
				}
			}
		}
	}
	advance := func(stage Stage, rotate, ready bool) {
		t.Helper()
		step, err := PlanRotation(spec, fleet(rotate), now)
		if err != nil || step.Stage != stage || (step.Next != nil) != ready {
			t.Fatalf("stage %s, ready %v, waiting for %q, %v; want %s, %v", step.Stage, step.Next != nil, step.Waiting, err, stage, ready)
		}
		if ready {
			spec = *step.Next
			i = issuer(t, spec)
		}
	}
	trust := func(ms ...*member) {
		t.Helper()
		for _, m := range ms {
			if err := m.SetBundle(i.Bundle()); err != nil {
				t.Fatal(err)
			}
		}
	}

	everyone("before")
	advance(StageMake, true, false)
	next, err := Successor(spec, now)
	if err != nil {
		t.Fatal(err)
	}
	spec, i = next, issuer(t, next)
	everyone("made")
	trust(s1)
	advance(StageSpread, false, false)
	everyone("one server trusts it")
	trust(s2, awake)
	advance(StageSpread, false, true)
	everyone("active")
	s1.renew(t, i)
	if s1.Issuer() != spec.Active || len(s1.cert().Certificate) != 2 {
		t.Fatalf("issued by %s in a chain of %d", s1.Issuer(), len(s1.cert().Certificate))
	}
	if s, c := shake(t, s1.server, rawOld); s != nil || c != nil {
		t.Errorf("a client that knows the old CA only: %v, %v", c, s)
	}
	everyone("one server renewed")
	awake.renew(t, i)
	everyone("one agent renewed") // to s2 also, which has an old certificate
	s2.renew(t, i)
	everyone("servers renewed") // with the sleeper, who trusts and has the old CA only
	advance(StageRenew, false, false)
	asleep.renew(t, i)
	stolen := newMember(t, issuer(t, api.AuthoritySpec{CAs: spec.CAs[:1], Active: spec.CAs[0].Fingerprint}), Node("thief"))
	advance(StageRenew, false, true)
	everyone("dropped, not heard")
	trust(all...)
	everyone("dropped")
	if got := s1.Trusts(); !slices.Equal(got, []string{spec.Active}) {
		t.Errorf("trusts %v", got)
	}
	if s, _ := shake(t, s1.server, stolen.ClientTLS()); s == nil {
		t.Error("a certificate of the dropped CA is accepted")
	}
	advance(StageSteady, false, false)
	if _, err := Successor(spec, now); err != nil {
		t.Errorf("a second rotation: %v", err)
	}
}

func (k *Keeper) cert() *tls.Certificate { return k.current.Load().cert }

func TestOldAuthorityWithoutRoomForACross(t *testing.T) {
	key, keyPEM, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	template, err := caTemplate(key.Public(), start)
	if err != nil {
		t.Fatal(err)
	}
	template.MaxPathLen, template.MaxPathLenZero = 0, true
	der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	next, err := Successor(specOf(cert, keyPEM, start), start)
	if err != nil || next.CAs[1].Cross != "" {
		t.Errorf("%q, %v", next.CAs[1].Cross, err)
	}
}

func TestServerTLSJudgesEachConnection(t *testing.T) {
	i := issuer(t, newSpec(t, time.Now()))
	foreign := issuer(t, newSpec(t, time.Now()))
	s1, n1 := newMember(t, i, ServerIdentity("s1")), newMember(t, i, Node("n1"))
	stranger := newMember(t, foreign, ServerIdentity("s1"))
	none := &tls.Config{InsecureSkipVerify: true}
	server := RequireGroup(s1.ServerTLS("h2", "decree-raft"), GroupServers, "decree-raft")
	with := func(c *tls.Config, proto string) *tls.Config {
		c.NextProtos = []string{proto}
		return c
	}
	for _, tt := range []struct {
		name   string
		server *tls.Config
		client *tls.Config
		ok     bool
	}{
		{"an agent, the API", server, with(n1.ClientTLS(), "h2"), true},
		{"nobody, the API", server, with(none.Clone(), "h2"), true},
		{"an agent, raft", server, with(n1.ClientTLS(), "decree-raft"), false},
		{"nobody, raft", server, with(none.Clone(), "decree-raft"), false},
		{"a server, raft", server, with(s1.ClientTLS(), "decree-raft"), true},
		{"a foreign cluster's server, raft", server, with(stranger.ClientTLS(), "decree-raft"), false},
		{"a foreign server, seen by a client", stranger.ServerTLS(), n1.ClientTLS(), false},
		{"an agent as a server", n1.ServerTLS(), s1.ClientTLS(), false},
		{"TLS 1.2", server, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, false},
	} {
		onServer, onClient := shake(t, tt.server, tt.client)
		if (onServer == nil && onClient == nil) != tt.ok {
			t.Errorf("%s: %v, %v", tt.name, onClient, onServer)
		}
	}
	if _, err := shake(t, stranger.ServerTLS(), n1.ClientTLS()); !errors.Is(err, ErrPeer) || !strings.Contains(err.Error(), "join again") {
		t.Errorf("a foreign server: %v", err)
	}
	// The group is asked for on the client's side too.
	plain := newMember(t, i, Server("decree-server"))
	if _, err := shake(t, plain.ServerTLS(), RequireGroup(n1.ClientTLS(), GroupServers)); !errors.Is(err, ErrPeer) {
		t.Errorf("a server outside the group: %v", err)
	}
}

func TestNoSessionOutlivesItsIdentity(t *testing.T) {
	i := issuer(t, newSpec(t, time.Now()))
	s1, n1 := newMember(t, i, ServerIdentity("s1")), newMember(t, i, Node("n1"))
	client := n1.ClientTLS()
	client.ClientSessionCache = tls.NewLRUClientSessionCache(8) // what a client does that wants to resume
	resumed := false
	verify := client.VerifyConnection
	client.VerifyConnection = func(cs tls.ConnectionState) error {
		resumed = resumed || cs.DidResume
		return verify(cs)
	}
	for range 3 {
		if s, c := shake(t, s1.server, client); s != nil || c != nil {
			t.Fatal(s, c)
		}
	}
	if resumed {
		t.Error("a session was resumed")
	}
}
