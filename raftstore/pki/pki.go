// Package pki is the cluster's certificate authority: it creates or loads the CA
// in a folder, issues the certificates of servers, nodes and operators, and writes
// the kubeconfig that kubectl, git and decree use.
//
// Identity is what Kubernetes makes of a client certificate: the common name is the
// user, the organisations are the groups. The package touches only the folders it
// is given; it opens no connections and starts no goroutines.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// The groups with a meaning of their own, and the prefix of a node's user name.
const (
	GroupAdmins = "system:masters"
	GroupNodes  = "system:nodes"
	NodePrefix  = "system:node:"
)

const (
	caLifetime   = 10 * 365 * 24 * time.Hour
	leafLifetime = 365 * 24 * time.Hour
	clockSkew    = 5 * time.Minute // certificates begin this long before now
)

// Authority signs the certificates of one cluster. It is safe for concurrent use.
type Authority struct {
	cert    *x509.Certificate
	certPEM []byte
	key     crypto.Signer
}

// Open loads the CA from ca.crt and ca.key in dir, or creates both when neither
// exists. The folder is created with mode 0700, the key with 0600. A folder with a
// certificate but no key is an error: a new CA would lock out everyone who trusts
// the old one.
func Open(dir string, now time.Time) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open certificate authority: %w", err)
	}
	certPath, keyPath := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	certPEM, certErr := os.ReadFile(certPath)
	keyPEM, keyErr := os.ReadFile(keyPath)
	switch {
	case certErr == nil && keyErr == nil:
		return loadAuthority(certPath, certPEM, keyPath, keyPEM, now)
	case certErr == nil && errors.Is(keyErr, fs.ErrNotExist):
		return nil, fmt.Errorf("open certificate authority: %s is there but %s is not: restore the key from a backup, or remove the certificate to start a new cluster", certPath, keyPath)
	case !errors.Is(certErr, fs.ErrNotExist):
		if certErr == nil {
			certErr = keyErr
		}
		return nil, fmt.Errorf("open certificate authority: %w", certErr)
	}
	return createAuthority(certPath, keyPath, keyPEM, now)
}

func loadAuthority(certPath string, certPEM []byte, keyPath string, keyPEM []byte, now time.Time) (*Authority, error) {
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("load certificate authority %s, %s: %w", certPath, keyPath, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	switch {
	case !ok:
		return nil, fmt.Errorf("load certificate authority %s: the key cannot sign", keyPath)
	case !pair.Leaf.IsCA:
		return nil, fmt.Errorf("load certificate authority %s: this is not a CA certificate", certPath)
	case now.After(pair.Leaf.NotAfter):
		return nil, fmt.Errorf("load certificate authority %s: it expired at %s", certPath, pair.Leaf.NotAfter.Format(time.RFC3339))
	}
	return &Authority{cert: pair.Leaf, certPEM: certPEM, key: signer}, nil
}

// createAuthority writes the key first: a crash in between leaves a key that the
// next call signs anew, and nothing can have been issued yet.
func createAuthority(certPath, keyPath string, keyPEM []byte, now time.Time) (*Authority, error) {
	key, keyPEM, err := parseOrMakeKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("create certificate authority %s: %w", keyPath, err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "decree-ca"},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("create certificate authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("create certificate authority: %w", err)
	}
	certPEM := encodePEM("CERTIFICATE", der)
	if err := writeFile(keyPath, keyPEM, 0o600); err != nil {
		return nil, err
	}
	if err := writeFile(certPath, certPEM, 0o644); err != nil {
		return nil, err
	}
	return &Authority{cert: cert, certPEM: certPEM, key: key}, nil
}

// CertPEM returns the CA's certificate, which clients must trust.
func (a *Authority) CertPEM() []byte { return a.certPEM }

// Pool returns a new pool that holds the CA's certificate only.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// Request describes a certificate to issue.
type Request struct {
	Name   string   // common name: the user
	Groups []string // organisations: the groups
	// Hosts are the names and addresses a server answers under; a certificate
	// without hosts is for clients only. Servers get both usages, because they also
	// call each other.
	Hosts []string
}

// Admin asks for an operator's certificate.
func Admin(name string) Request { return Request{Name: name, Groups: []string{GroupAdmins}} }

// Node asks for the certificate of the agent on a node.
func Node(name string) Request {
	return Request{Name: NodePrefix + name, Groups: []string{GroupNodes}}
}

// Server asks for the certificate of an API server that answers under hosts.
func Server(hosts ...string) Request { return Request{Name: "decree-server", Hosts: hosts} }

// Pair is a certificate with its key, PEM encoded.
type Pair struct{ CertPEM, KeyPEM []byte }

// TLS returns the pair in the form crypto/tls uses.
func (p Pair) TLS() (tls.Certificate, error) {
	c, err := tls.X509KeyPair(p.CertPEM, p.KeyPEM)
	if err != nil {
		return c, fmt.Errorf("parse certificate and key: %w", err)
	}
	return c, nil
}

// Issue signs a new certificate for a new key; it is valid for a year, or as long
// as the CA if that is shorter.
func (a *Authority) Issue(r Request, now time.Time) (Pair, error) {
	key, keyPEM, err := parseOrMakeKey(nil)
	if err != nil {
		return Pair{}, fmt.Errorf("issue certificate for %s: %w", r.Name, err)
	}
	serial, err := newSerial()
	if err != nil {
		return Pair{}, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: r.Name, Organization: r.Groups},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(leafLifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	if len(r.Hosts) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, h := range r.Hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return Pair{}, fmt.Errorf("issue certificate for %s: %w", r.Name, err)
	}
	return Pair{CertPEM: encodePEM("CERTIFICATE", der), KeyPEM: keyPEM}, nil
}

// Ensure returns the pair in base.crt and base.key of dir, and issues it when it is
// absent, damaged, signed by another CA, for another identity or set of hosts, or
// past two thirds of its life. Call it at every start.
func (a *Authority) Ensure(dir, base string, r Request, now time.Time) (Pair, error) {
	certPath, keyPath := filepath.Join(dir, base+".crt"), filepath.Join(dir, base+".key")
	if p, ok := a.usable(certPath, keyPath, r, now); ok {
		return p, nil
	}
	p, err := a.Issue(r, now)
	if err != nil {
		return Pair{}, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Pair{}, fmt.Errorf("store certificate for %s: %w", r.Name, err)
	}
	// A crash between the two leaves a pair that does not match: issued again.
	if err := writeFile(keyPath, p.KeyPEM, 0o600); err != nil {
		return Pair{}, err
	}
	return p, writeFile(certPath, p.CertPEM, 0o644)
}

func (a *Authority) usable(certPath, keyPath string, r Request, now time.Time) (Pair, bool) {
	certPEM, err := os.ReadFile(certPath)
	if err != nil {
		return Pair{}, false
	}
	keyPEM, err := os.ReadFile(keyPath)
	if err != nil {
		return Pair{}, false
	}
	p := Pair{CertPEM: certPEM, KeyPEM: keyPEM}
	pair, err := p.TLS()
	if err != nil || pair.Leaf.CheckSignatureFrom(a.cert) != nil {
		return Pair{}, false
	}
	c := pair.Leaf
	renewAt := c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3)
	same := c.Subject.CommonName == r.Name && sameSet(c.Subject.Organization, r.Groups) && sameSet(hostsOf(c), r.Hosts)
	return p, same && now.Before(renewAt) && !now.Before(c.NotBefore)
}

func hostsOf(c *x509.Certificate) []string {
	hosts := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		hosts = append(hosts, ip.String())
	}
	return hosts
}

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

// parseOrMakeKey returns the key in keyPEM, or a new ECDSA P-256 key when empty.
func parseOrMakeKey(keyPEM []byte) (crypto.Signer, []byte, error) {
	if len(keyPEM) == 0 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, fmt.Errorf("make key: %w", err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, nil, fmt.Errorf("encode key: %w", err)
		}
		return key, encodePEM("PRIVATE KEY", der), nil
	}
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return nil, nil, errors.New("the key is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("parse key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("parse key: %T cannot sign", key)
	}
	return signer, keyPEM, nil
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make certificate serial: %w", err)
	}
	return serial, nil
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
