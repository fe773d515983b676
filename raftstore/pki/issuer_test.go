package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"slices"
	"strings"
	"testing"
	"time"

	"decree.dev/decree/schemas/api"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// csrFor asks for more than it may have.
func csrFor(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "admin", Organization: []string{GroupAdmins}},
		DNSNames: []string{ServerName},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return encodePEM(blockCSR, der)
}

func TestParseCSR(t *testing.T) {
	p256 := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	good := csrFor(t, p256)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(good)
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1 // in the signature
	swapped := bytes.Replace(block.Bytes, []byte("admin"), []byte("nimda"), 1)

	for _, tt := range []struct {
		name string
		csr  []byte
		want string // part of the error; empty: none
	}{
		{"P-256", good, ""},
		{"P-384", csrFor(t, must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))), ""},
		{"Ed25519", csrFor(t, ed), ""},
		{"RSA 2048", csrFor(t, must(rsa.GenerateKey(rand.Reader, 2048))), ""},
		{"RSA 1024", rsa1024CSR, "1024 bits is not allowed"},
		{"P-521", csrFor(t, must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))), "curve P-521"},
		{"P-224", csrFor(t, must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))), "curve P-224"},
		{"a forged signature", encodePEM(blockCSR, forged), "did not sign it"},
		{"changed afterwards", encodePEM(blockCSR, swapped), "did not sign it"},
		{"empty", nil, "not PEM"},
		{"another block", encodePEM(blockCert, block.Bytes), `it is a "CERTIFICATE"`},
		{"two", append(bytes.Clone(good), good...), "something follows"},
		{"garbage in a block", encodePEM(blockCSR, []byte{1, 2, 3}), "parse certificate request"},
		{"too large", bytes.Repeat([]byte("x"), maxCSR+1), "at most"},
	} {
		_, err := ParseCSR(tt.csr)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestSignTakesTheKeyOnly(t *testing.T) {
	i := issuer(t, newSpec(t, start))
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for _, tt := range []struct {
		request  Request
		role     string
		server   bool
		hosts    []string
		lifetime time.Duration
	}{
		{Node("n1"), api.RoleAgent, false, nil, DefaultLifetime},
		{ServerIdentity("s1", "10.0.0.1", "s1.example"), api.RoleServer, true, []string{ServerName, "s1.example", "10.0.0.1"}, DefaultLifetime},
		{Request{Name: NodePrefix + "n2", Groups: []string{GroupNodes}, Lifetime: time.Hour}, api.RoleAgent, false, nil, time.Hour},
		{Admin("ann"), "", false, nil, unattendedLifetime},
	} {
		chain, err := i.Sign(csrFor(t, key), tt.request, start)
		if err != nil {
			t.Fatal(err)
		}
		certs, err := parseCerts(chain)
		if err != nil || len(certs) != 1 {
			t.Fatalf("%d certificates, %v", len(certs), err)
		}
		leaf := certs[0]
		if leaf.Subject.CommonName != tt.request.Name || !slices.Equal(leaf.Subject.Organization, tt.request.Groups) {
			t.Errorf("%s: subject %v", tt.request.Name, leaf.Subject)
		}
		if got := slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth); got != tt.server {
			t.Errorf("%s: good for a server: %v", tt.request.Name, got)
		}
		if !slices.Equal(Hosts(leaf), tt.hosts) {
			t.Errorf("%s: hosts %v", tt.request.Name, Hosts(leaf))
		}
		if got := leaf.NotAfter.Sub(start); got != tt.lifetime {
			t.Errorf("%s: lifetime %v", tt.request.Name, got)
		}
		if leaf.IsCA || !key.PublicKey.Equal(leaf.PublicKey) || i.SignedBy(leaf) != i.Fingerprint() {
			t.Errorf("%s: %+v", tt.request.Name, leaf)
		}
		if role, _, _ := Who(leaf); role != tt.role {
			t.Errorf("%s: role %q", tt.request.Name, role)
		}
	}
	for name, r := range map[string]Request{
		"no name":      {},
		"a wildcard":   {Name: "x", Hosts: []string{"*.example"}},
		"an URL":       {Name: "x", Hosts: []string{"https://x"}},
		"an empty one": {Name: "x", Hosts: []string{""}},
		"many hosts":   {Name: "x", Hosts: make([]string, maxHosts+1)},
		"the past":     {Name: "x", Lifetime: -time.Hour},
	} {
		if _, err := i.Sign(csrFor(t, key), r, start); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := i.Sign(csrFor(t, key), Node("n1"), start.Add(caLifetime)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an expired CA signs: %v", err)
	}
}

func TestWho(t *testing.T) {
	for _, tt := range []struct {
		cn     string
		groups []string
		role   string
		node   string
	}{
		{"system:node:n1", []string{GroupNodes}, api.RoleAgent, "n1"},
		{"system:server:n1", []string{GroupServers}, api.RoleServer, "n1"},
		{"system:server:n1", []string{GroupNodes}, "", ""},
		{"system:node:n1", []string{GroupServers}, "", ""},
		{"system:node:n1", []string{GroupNodes, GroupAdmins}, "", ""},
		{"system:node:", []string{GroupNodes}, "", ""},
		{"system:node:A/B", []string{GroupNodes}, "", ""},
		{"n1", []string{GroupNodes}, "", ""},
		{"system:node:n1", nil, "", ""},
		{"admin", []string{GroupAdmins}, "", ""},
	} {
		role, node, ok := Who(&x509.Certificate{Subject: pkix.Name{CommonName: tt.cn, Organization: tt.groups}})
		if role != tt.role || node != tt.node || ok != (tt.role != "") {
			t.Errorf("%s %v: %q %q %v", tt.cn, tt.groups, role, node, ok)
		}
	}
}

func TestNewIssuerRefuses(t *testing.T) {
	good, other := newSpec(t, start), newSpec(t, start)
	for name, change := range map[string]func(*api.AuthoritySpec){
		"no CA":              func(s *api.AuthoritySpec) { s.CAs = nil },
		"an unknown active":  func(s *api.AuthoritySpec) { s.Active = other.Active },
		"another key":        func(s *api.AuthoritySpec) { s.CAs[0].Key = other.CAs[0].Key },
		"no key":             func(s *api.AuthoritySpec) { s.CAs[0].Key = "" },
		"another cert":       func(s *api.AuthoritySpec) { s.CAs[0].Cert = other.CAs[0].Cert },
		"two certs":          func(s *api.AuthoritySpec) { s.CAs[0].Cert += other.CAs[0].Cert },
		"no cert":            func(s *api.AuthoritySpec) { s.CAs[0].Cert = "" },
		"a leaf, not a CA":   func(s *api.AuthoritySpec) { s.CAs[0] = leafAsCA(t, good) },
		"garbage in the key": func(s *api.AuthoritySpec) { s.CAs[0].Key = "key" },
	} {
		spec := cloneSpec(good)
		change(&spec)
		if _, err := NewIssuer(spec); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func leafAsCA(t *testing.T, spec api.AuthoritySpec) api.CertificateAuthority {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	chain := must(issuer(t, spec).Sign(csrFor(t, key), Node("n1"), start))
	return api.CertificateAuthority{Fingerprint: spec.Active, Cert: string(chain), Key: spec.CAs[0].Key}
}

// TestAuthoritySpec is how the CA of the first server's folder becomes the cluster's.
func TestAuthoritySpec(t *testing.T) {
	a := open(t, t.TempDir(), start)
	spec, err := a.Spec()
	if err != nil {
		t.Fatal(err)
	}
	i := issuer(t, spec)
	if !bytes.Equal(i.Bundle(), a.CertPEM()) || !spec.CAs[0].Since.Time.Equal(start) {
		t.Errorf("since %v", spec.CAs[0].Since)
	}
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	chain, err := i.Sign(csrFor(t, key), Node("n1"), start)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := must(parseCerts(chain))[0].Verify(x509.VerifyOptions{Roots: a.Pool(), CurrentTime: start, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if next, err := Successor(spec, start); err != nil || next.CAs[1].Cross == "" {
		t.Errorf("it cannot be replaced: %v", err)
	}
}

func FuzzParseCSR(f *testing.F) {
	f.Add(csrFor(f, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	f.Add(rsa1024CSR)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	i := must(NewIssuer(must(NewAuthoritySpec(start))))
	f.Fuzz(func(t *testing.T, csr []byte) {
		key, err := ParseCSR(csr)
		if err != nil {
			return
		}
		chain, err := i.Sign(csr, Node("n1"), start)
		if err != nil {
			t.Fatalf("what can be parsed cannot be signed: %v", err)
		}
		if leaf := must(parseCerts(chain))[0]; !sameKey(key, leaf.PublicKey) || leaf.Subject.CommonName != "system:node:n1" || leaf.IsCA {
			t.Fatalf("signed %v", leaf.Subject)
		}
	})
}

// crypto/rsa makes no key as short as this one; openssl req -newkey rsa:1024 does.
var rsa1024CSR = []byte(`-----BEGIN CERTIFICATE REQUEST-----
MIIBTzCBuQIBADAQMQ4wDAYDVQQDDAVhZG1pbjCBnzANBgkqhkiG9w0BAQEFAAOB
jQAwgYkCgYEA4J5uqkF08FODc1O2xwsdDjwYc1RjXrD58cuwa1afIP/Fp1Hk8n+9
tVzAdsDfCktp+mw2/GuGFoOm7IcUtRzEkWi4Y1YhFB1D2lIHhx5ncThkQb8Wk1FD
eXleZ4lHRMirCsUbe4L+MHiUlwI7EC/GcfQT8AJXxxQqTGSGflyCgeUCAwEAAaAA
MA0GCSqGSIb3DQEBCwUAA4GBAEwsBCVFGtfwmJGwNSfdYnTGnc2NA40G3ORbQ3k2
IPRa4QRH7pjvjApj5LLCxjGdIVQ+2Jf2dt4PB0NghG/JyVjjADqVkSnap1kYirJS
/lO4nBwsZeaoiGBnGosZzJ8tS7tsngdWusiZlwiH2j5VTeHmYQ2daRTEhyAx5Dow
hQJZ
-----END CERTIFICATE REQUEST-----
`)
