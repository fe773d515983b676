package join

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

func (f *fake) member(k *pki.Keeper) *Member {
	return &Member{Keeper: k, Servers: func() []string { return []string{"127.0.0.1:1", f.address} }, Log: quiet}
}

func TestRenew(t *testing.T) {
	f := newCluster(t)
	k := openKeeper(t, t.TempDir())
	if err := f.join(k, f.token(api.JoinTokenSpec{Role: api.RoleServer}, time.Hour), api.RoleServer, "s2"); err != nil {
		t.Fatal(err)
	}
	m := f.member(k)
	before := k.Leaf()
	csr, err := openKeeper(t, t.TempDir()).JoinRequest() // another key
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // an answer that was lost
		chain, _, err := m.Renew(t.Context(), csr)
		if err != nil {
			t.Fatal(err)
		}
		i, err := f.Issuer(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		leaf := parseLeaf(t, chain)
		if leaf.Subject.String() != before.Subject.String() || !slices.Equal(pki.Hosts(leaf), pki.Hosts(before)) || i.SignedBy(leaf) != i.Fingerprint() {
			t.Errorf("%v for %v", leaf.Subject, pki.Hosts(leaf))
		}
	}
	third, err := openKeeper(t, t.TempDir()).JoinRequest()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.Renew(t.Context(), third); !errors.Is(err, ErrReplaced) {
		t.Errorf("the certificate before the last renews: %v", err)
	}
	f.record("server/s2", "")
	if _, _, err := m.Renew(t.Context(), csr); !errors.Is(err, ErrRemoved) || !strings.Contains(err.Error(), "join again") {
		t.Errorf("a removed machine: %v", err)
	}
	admin := openKeeper(t, t.TempDir())
	f.enroll(admin, pki.Admin("ann"))
	if _, _, err := f.member(admin).Renew(t.Context(), csr); err == nil || !strings.Contains(err.Error(), "neither a server nor an agent") {
		t.Errorf("an operator: %v", err)
	}
	stranger := newCluster(t)
	foreign := openKeeper(t, t.TempDir())
	stranger.enroll(foreign, pki.ServerIdentity("s2"))
	if _, _, err := f.member(foreign).Renew(t.Context(), csr); !errors.Is(err, pki.ErrPeer) {
		t.Errorf("a member of another cluster: %v", err)
	}
}

// TestRotationReachesEverybody replaces the CA under a server and two agents that
// follow it, with the planner deciding what happens by what the cluster has seen.
func TestRotationReachesEverybody(t *testing.T) {
	f := newCluster(t)
	f.record("server/s1", keyOf(t, f.keeper))
	members := map[string]*Member{"server/s1": f.member(f.keeper)}
	token := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	for _, node := range []string{"n1", "n2"} {
		k := openKeeper(t, t.TempDir())
		if err := f.join(k, token, api.RoleAgent, node); err != nil {
			t.Fatal(err)
		}
		members["agent/"+node] = f.member(k)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer wg.Wait()
	defer cancel()
	for _, m := range members {
		m.Every = 20 * time.Millisecond
		wg.Go(func() { _ = m.Follow(ctx) })
		wg.Go(func() { _ = m.Keeper.Run(ctx, m.Renew) })
	}

	old := f.active()
	var stages []pki.Stage
	rotate := true
	deadline := time.After(time.Minute)
	for len(stages) == 0 || stages[len(stages)-1] != pki.StageSteady {
		fleet := pki.Fleet{Rotate: rotate, Servers: []pki.Holder{f.holder("server/s1")}, Agents: []pki.Holder{f.holder("agent/n1"), f.holder("agent/n2")}}
		i, err := f.Issuer(ctx)
		if err != nil {
			t.Fatal(err)
		}
		f.mu.Lock()
		spec := f.spec
		f.mu.Unlock()
		step, err := pki.PlanRotation(spec, fleet, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if len(stages) == 0 || stages[len(stages)-1] != step.Stage {
			stages = append(stages, step.Stage)
		}
		switch {
		case step.Stage == pki.StageMake:
			rotate = false
			next, err := pki.Successor(spec, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			f.setSpec(next)
		case step.Next != nil:
			f.setSpec(*step.Next)
		case len(step.Waiting) > 0:
			select {
			case <-time.After(5 * time.Millisecond):
			case <-deadline:
				t.Fatalf("stage %s waits for %q; %v", step.Stage, step.Waiting, i.Fingerprints())
			}
		}
	}
	if want := []pki.Stage{pki.StageMake, pki.StageSpread, pki.StageRenew, pki.StageSteady}; !slices.Equal(stages, want) {
		t.Errorf("stages %v", stages)
	}
	for name, m := range members {
		for slices.Contains(m.Keeper.Trusts(), old) {
			select {
			case <-m.Keeper.Changed():
			case <-time.After(10 * time.Millisecond): // it changed before
			case <-deadline:
				t.Fatalf("%s still trusts the old CA", name)
			}
		}
		if m.Keeper.Issuer() != f.active() {
			t.Errorf("%s has a certificate of %s", name, m.Keeper.Issuer())
		}
	}
	// The token knows the old CA only.
	if err := f.join(openKeeper(t, t.TempDir()), token, api.RoleAgent, "n3"); !errors.Is(err, ErrWrongCA) {
		t.Errorf("a token of before: %v", err)
	}
	if err := f.join(openKeeper(t, t.TempDir()), f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour), api.RoleAgent, "n3"); err != nil {
		t.Error(err)
	}
}

// TestTokenOutlivesRotation: a token made while two CAs are trusted is good before,
// during and after.
func TestTokenOutlivesRotation(t *testing.T) {
	f := newCluster(t)
	early := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	both, err := pki.Successor(f.spec, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f.setSpec(both)
	token := f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	join := func(token pki.Token, node string) {
		t.Helper()
		if err := f.join(openKeeper(t, t.TempDir()), token, api.RoleAgent, node); err != nil {
			t.Errorf("%s: %v", node, err)
		}
	}
	join(token, "n1")
	both.Active = both.CAs[1].Fingerprint
	f.setSpec(both)
	join(token, "n2")
	f.enroll(f.keeper, pki.ServerIdentity("s1"))
	join(token, "n3")
	join(early, "n4") // by the cross certificate
	both.CAs = both.CAs[1:]
	f.setSpec(both)
	join(token, "n5")
}

func TestFollowReports(t *testing.T) {
	f := newCluster(t)
	k := openKeeper(t, t.TempDir())
	if err := f.join(k, f.token(api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour), api.RoleAgent, "n1"); err != nil {
		t.Fatal(err)
	}
	if err := f.member(k).followOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	h := f.holder("agent/n1")
	if h.Issuer != f.active() || !slices.Equal(h.Trusts, []string{f.active()}) || !h.Expires.Equal(k.Leaf().NotAfter) {
		t.Errorf("%+v", h)
	}
	if err := (&Member{Keeper: k, Servers: func() []string { return nil }}).followOnce(t.Context()); err == nil {
		t.Error("nobody was asked, and all is well")
	}
}

func parseLeaf(t *testing.T, chain []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(chain)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func keyOf(t *testing.T, k *pki.Keeper) string {
	t.Helper()
	hash, err := pki.KeyHash(k.Leaf().PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return hash
}
