package pki

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func open(t *testing.T, dir string, now time.Time) *Authority {
	t.Helper()
	a, err := Open(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func verify(t *testing.T, a *Authority, p Pair, usage x509.ExtKeyUsage, host string, now time.Time) error {
	t.Helper()
	pair, err := p.TLS()
	if err != nil {
		t.Fatal(err)
	}
	_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: a.Pool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}, DNSName: host})
	return err
}

func TestOpenKeepsTheAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	first := open(t, dir, start)
	second := open(t, dir, start.Add(time.Hour))
	if !bytes.Equal(first.CertPEM(), second.CertPEM()) {
		t.Error("a second CA was made")
	}
	for name, mode := range map[string]os.FileMode{"ca.key": 0o600, "ca.crt": 0o644, ".": os.ModeDir | 0o700} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode() != mode {
			t.Errorf("%s: mode %v, %v, want %v", name, info.Mode(), err, mode)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left over: %v, %v", entries, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, start)
	if _, err := Open(dir, start.Add(11*365*24*time.Hour)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an expired CA: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, start); err == nil || !strings.Contains(err.Error(), "restore the key") {
		t.Errorf("a CA without its key: %v", err)
	}
}

func TestOpenAfterACrash(t *testing.T) {
	dir := t.TempDir()
	first := open(t, dir, start)
	if err := os.Remove(filepath.Join(dir, "ca.crt")); err != nil { // the key was written, the certificate not yet
		t.Fatal(err)
	}
	second := open(t, dir, start)
	pair, err := first.Issue(Admin("admin"), start)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(t, second, pair, x509.ExtKeyUsageClientAuth, "", start); err != nil {
		t.Errorf("the key was not kept: %v", err)
	}
}

func TestIssue(t *testing.T) {
	a := open(t, t.TempDir(), start)
	server, err := a.Issue(Server("localhost", "127.0.0.1", "::1"), start)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"localhost", "127.0.0.1", "::1"} {
		if err := verify(t, a, server, x509.ExtKeyUsageServerAuth, host, start); err != nil {
			t.Error(err)
		}
	}
	node, err := a.Issue(Node("n1"), start)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(t, a, node, x509.ExtKeyUsageServerAuth, "", start); err == nil {
		t.Error("a node's certificate is good for a server")
	}
	pair, _ := node.TLS()
	if s := pair.Leaf.Subject; s.CommonName != "system:node:n1" || len(s.Organization) != 1 || s.Organization[0] != "system:nodes" {
		t.Errorf("subject %v", s)
	}
	if other := open(t, t.TempDir(), start); verify(t, other, node, x509.ExtKeyUsageClientAuth, "", start) == nil {
		t.Error("another CA accepts the certificate")
	}
	late := start.Add(caLifetime - time.Hour)
	last, err := a.Issue(Admin("admin"), late)
	if err != nil {
		t.Fatal(err)
	}
	if pair, _ := last.TLS(); pair.Leaf.NotAfter.After(a.cert.NotAfter) {
		t.Error("a certificate outlives its CA")
	}
}

func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir, start)
	pair, err := a.Issue(Admin("admin"), start)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"x.crt": pair.CertPEM, "x.key": pair.KeyPEM} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "kubeconfig")
	want := Kubeconfig{Server: "https://127.0.0.1:7443", CA: a.CertPEM(), User: "admin", Pair: pair}
	if err := want.Write(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	got, err := ReadKubeconfig(path)
	if err != nil || got.Server != want.Server || !bytes.Equal(got.CA, want.CA) || !bytes.Equal(got.Pair.KeyPEM, pair.KeyPEM) {
		t.Errorf("%+v, %v", got, err)
	}
	byPath := "current-context: c\nclusters: [{name: k, cluster: {server: 'https://x:1', certificate-authority: ca.crt}}]\n" +
		"users: [{name: u, user: {client-certificate: x.crt, client-key: x.key}}]\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
	if err := os.WriteFile(path, []byte(byPath), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err = ReadKubeconfig(path); err != nil || !bytes.Equal(got.Pair.CertPEM, pair.CertPEM) || !bytes.Equal(got.CA, a.CertPEM()) {
		t.Errorf("%+v, %v", got, err)
	}
	if err := os.WriteFile(path, []byte("current-context: none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadKubeconfig(path); err == nil {
		t.Error("a kubeconfig without a cluster was read")
	}
}
