// Package pki is the cluster's certificate authority, and what each process holds of
// it. [Issuer] signs the certificates of servers, nodes and operators with the CA of
// the replicated state, [PlanRotation] replaces that CA while the cluster is up,
// [NewToken] makes the tokens that machines join with, and [Keeper] holds the key,
// certificate and trusted CAs of one process and renews them. [Authority] is a CA in
// a folder, the seed of the first server; [Kubeconfig] is what kubectl, git and
// decree use.
//
// Identity is what Kubernetes makes of a client certificate: the common name is the
// user, the organisations are the groups. The package touches only the folders it
// is given; it opens no connections and starts no goroutines.
package pki

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"decree.dev/decree/schemas/api"
)

// Authority signs the certificates of one cluster. It is safe for concurrent use.
type Authority struct {
	cert    *x509.Certificate
	certPEM []byte
	issuer  *Issuer
}

func newAuthority(cert *x509.Certificate, certPEM []byte, key crypto.Signer) *Authority {
	return &Authority{cert: cert, certPEM: certPEM, issuer: &Issuer{
		cert: cert, key: key, cas: []*x509.Certificate{cert}, bundle: encodePEM(blockCert, cert.Raw),
	}}
}

// Spec returns the CA in the form of the replicated state, whose first it becomes.
func (a *Authority) Spec() (api.AuthoritySpec, error) {
	// The state holds keys in one encoding; a file may have had another.
	der, err := x509.MarshalPKCS8PrivateKey(a.issuer.key)
	if err != nil {
		return api.AuthoritySpec{}, fmt.Errorf("encode key of the certificate authority: %w", err)
	}
	return specOf(a.cert, encodePEM(blockKey, der), a.cert.NotBefore.Add(clockSkew)), nil
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
	return newAuthority(pair.Leaf, certPEM, signer), nil
}

// createAuthority writes the key first: a crash in between leaves a key that the
// next call signs anew, and nothing can have been issued yet.
func createAuthority(certPath, keyPath string, keyPEM []byte, now time.Time) (*Authority, error) {
	key, keyPEM, err := parseOrMakeKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("create certificate authority %s: %w", keyPath, err)
	}
	cert, err := selfSign(key, now)
	if err != nil {
		return nil, err
	}
	certPEM := encodePEM(blockCert, cert.Raw)
	if err := writeFile(keyPath, keyPEM, 0o600); err != nil {
		return nil, err
	}
	if err := writeFile(certPath, certPEM, 0o644); err != nil {
		return nil, err
	}
	return newAuthority(cert, certPEM, key), nil
}

// CertPEM returns the CA's certificate, which clients must trust.
func (a *Authority) CertPEM() []byte { return a.certPEM }

// Pool returns a new pool that holds the CA's certificate only.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

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

// Issue signs a new certificate for a new key; it is valid for a year unless r says
// otherwise, or as long as the CA if that is shorter.
func (a *Authority) Issue(r Request, now time.Time) (Pair, error) { return a.issuer.Issue(r, now) }

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

// parseOrMakeKey returns the key in keyPEM, or a new one when empty.
func parseOrMakeKey(keyPEM []byte) (crypto.Signer, []byte, error) {
	if len(keyPEM) == 0 {
		return newKey()
	}
	key, err := parseKey(keyPEM)
	return key, keyPEM, err
}
