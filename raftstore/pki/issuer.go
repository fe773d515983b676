package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

const (
	caLifetime = 10 * 365 * 24 * time.Hour
	clockSkew  = 5 * time.Minute // certificates begin this long before now
)

// Issuer signs with the active CA of a cluster and knows all that are trusted. It
// does not change: a new spec makes a new Issuer. It is safe for concurrent use.
type Issuer struct {
	cert   *x509.Certificate // the active CA
	key    crypto.Signer
	cross  []byte // PEM: leads from the active CA to the one before it
	cas    []*x509.Certificate
	bundle []byte
}

// NewIssuer reads the CAs of a cluster and makes sure that they are what they claim.
func NewIssuer(spec api.AuthoritySpec) (*Issuer, error) {
	i := &Issuer{}
	for _, ca := range spec.CAs {
		cert, err := parseCA(ca)
		if err != nil {
			return nil, err
		}
		i.cas = append(i.cas, cert)
		i.bundle = append(i.bundle, encodePEM(blockCert, cert.Raw)...)
		if ca.Fingerprint != spec.Active {
			continue
		}
		key, err := parseKey([]byte(ca.Key))
		if err != nil {
			return nil, fmt.Errorf("load CA %.12s: %w", ca.Fingerprint, err)
		}
		if !sameKey(key.Public(), cert.PublicKey) {
			return nil, fmt.Errorf("load CA %.12s: certificate and key do not belong together", ca.Fingerprint)
		}
		i.cert, i.key, i.cross = cert, key, []byte(ca.Cross)
	}
	if i.cert == nil {
		return nil, fmt.Errorf("load certificate authority: the active CA %.12q is not among the %d that are trusted", spec.Active, len(spec.CAs))
	}
	return i, nil
}

func parseCA(ca api.CertificateAuthority) (*x509.Certificate, error) {
	certs, err := ParseBundle([]byte(ca.Cert))
	switch {
	case err != nil:
		return nil, fmt.Errorf("load CA %.12s: %w", ca.Fingerprint, err)
	case len(certs) != 1:
		return nil, fmt.Errorf("load CA %.12s: %d certificates instead of one", ca.Fingerprint, len(certs))
	case Fingerprint(certs[0]) != ca.Fingerprint:
		return nil, fmt.Errorf("load CA %.12s: its certificate has the fingerprint %.12s", ca.Fingerprint, Fingerprint(certs[0]))
	}
	return certs[0], nil
}

// Fingerprint names the CA that signs.
func (i *Issuer) Fingerprint() string { return Fingerprint(i.cert) }

// Fingerprints names all CAs that are trusted, oldest first.
func (i *Issuer) Fingerprints() []string { return fingerprints(i.cas) }

func fingerprints(cas []*x509.Certificate) []string {
	var list []string
	for _, c := range cas {
		list = append(list, Fingerprint(c))
	}
	return list
}

// Bundle returns the certificates of all CAs that are trusted, as PEM.
func (i *Issuer) Bundle() []byte { return slices.Clone(i.bundle) }

// Pool returns a new pool of all CAs that are trusted.
func (i *Issuer) Pool() *x509.CertPool { return poolOf(i.cas) }

// SignedBy names the trusted CA that signed a certificate; empty: none of them.
func (i *Issuer) SignedBy(leaf *x509.Certificate) string { return signedBy(i.cas, leaf) }

func signedBy(cas []*x509.Certificate, leaf *x509.Certificate) string {
	for _, ca := range cas {
		if leaf.CheckSignatureFrom(ca) == nil {
			return Fingerprint(ca)
		}
	}
	return ""
}

// Sign issues a certificate for the key of a certificate request. Who its holder is,
// the caller says in r; what the request asks for is ignored. The chain starts with
// the new certificate, and leads to the CA before the active one while that is still
// trusted, so that who does not know the active one yet can verify it.
func (i *Issuer) Sign(csrPEM []byte, r Request, now time.Time) (chainPEM []byte, err error) {
	key, err := ParseCSR(csrPEM)
	if err != nil {
		return nil, err
	}
	return i.sign(key, r, now)
}

// Issue makes a key and a certificate for it. It is valid for a year unless r says
// else.
func (i *Issuer) Issue(r Request, now time.Time) (Pair, error) {
	key, keyPEM, err := newKey()
	if err != nil {
		return Pair{}, fmt.Errorf("issue certificate for %s: %w", r.Name, err)
	}
	if r.Lifetime == 0 {
		r.Lifetime = unattendedLifetime
	}
	certPEM, err := i.sign(key.Public(), r, now)
	if err != nil {
		return Pair{}, err
	}
	return Pair{CertPEM: certPEM, KeyPEM: keyPEM}, nil
}

func (i *Issuer) sign(key crypto.PublicKey, r Request, now time.Time) ([]byte, error) {
	if err := r.Check(); err != nil {
		return nil, fmt.Errorf("issue certificate for %.80q: %w", r.Name, err)
	}
	if !now.Before(i.cert.NotAfter) {
		return nil, fmt.Errorf("issue certificate for %s: the CA expired at %s", r.Name, i.cert.NotAfter.Format(time.RFC3339))
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	if r.Lifetime == 0 {
		r.Lifetime = DefaultLifetime
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: r.Name, Organization: r.Groups},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(r.Lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if template.NotAfter.After(i.cert.NotAfter) {
		template.NotAfter = i.cert.NotAfter
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
	der, err := x509.CreateCertificate(rand.Reader, template, i.cert, key, i.key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate for %s: %w", r.Name, err)
	}
	return append(encodePEM(blockCert, der), i.cross...), nil
}

// NewAuthoritySpec makes the first CA of a cluster, with a new key.
func NewAuthoritySpec(now time.Time) (api.AuthoritySpec, error) {
	key, keyPEM, err := newKey()
	if err != nil {
		return api.AuthoritySpec{}, fmt.Errorf("create certificate authority: %w", err)
	}
	cert, err := selfSign(key, now)
	if err != nil {
		return api.AuthoritySpec{}, err
	}
	return specOf(cert, keyPEM, now), nil
}

func specOf(cert *x509.Certificate, keyPEM []byte, since time.Time) api.AuthoritySpec {
	ca := api.CertificateAuthority{
		Fingerprint: Fingerprint(cert),
		Cert:        string(encodePEM(blockCert, cert.Raw)),
		Key:         string(keyPEM),
		Since:       metav1.NewTime(since.UTC().Truncate(time.Second)),
	}
	return api.AuthoritySpec{CAs: []api.CertificateAuthority{ca}, Active: ca.Fingerprint}
}

// caTemplate describes a CA's certificate. Its name holds a part of its key's hash:
// verifiers find issuers by name, and the CAs of one cluster must not be mistaken
// for each other.
func caTemplate(key crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	hash, err := KeyHash(key)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "decree-ca-" + hash[:12]},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            1, // itself, and the cross certificate of its successor
	}, nil
}

func selfSign(key crypto.Signer, now time.Time) (*x509.Certificate, error) {
	template, err := caTemplate(key.Public(), now)
	if err != nil {
		return nil, fmt.Errorf("create certificate authority: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("create certificate authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("create certificate authority: %w", err)
	}
	return cert, nil
}

// crossSign certifies the key of a new CA by the CA before it. It returns nothing
// when the old CA was made without room for an intermediate.
func (i *Issuer) crossSign(next *x509.Certificate, now time.Time) ([]byte, error) {
	if i.cert.MaxPathLen == 0 && i.cert.MaxPathLenZero {
		return nil, nil
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		RawSubject:            next.RawSubject,
		SubjectKeyId:          next.SubjectKeyId,
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              i.cert.NotAfter,
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	if !now.Before(template.NotAfter) {
		return nil, errors.New("cross-sign CA: the active CA has expired: nothing that it signs would be accepted")
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.cert, next.PublicKey, i.key)
	if err != nil {
		return nil, fmt.Errorf("cross-sign CA: %w", err)
	}
	return encodePEM(blockCert, der), nil
}

// renewAt is when two thirds of a certificate's life are over. A third of it, thirty
// days by default, is left for outages and for people to notice; Kubernetes' kubelet
// and cert-manager start at the same point.
func renewAt(c *x509.Certificate) time.Time {
	return c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3)
}
