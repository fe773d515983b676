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
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
)

// The bounds of what is parsed: all of it comes from other machines.
const (
	maxCSR   = 16 << 10 // bytes of PEM; RSA-8192 with a full subject needs 4 KiB
	maxChain = 64 << 10 // bytes of PEM of a chain or bundle
	maxCerts = 16       // in a chain or bundle
)

const (
	blockCert = "CERTIFICATE"
	blockCSR  = "CERTIFICATE REQUEST"
	blockKey  = "PRIVATE KEY"
)

// ParseCSR returns the public key of a certificate request (PKCS #10, PEM). Nothing
// else of it counts: who somebody is, the cluster says. The key must be ECDSA P-256
// or P-384, Ed25519, or RSA with 2048 to 8192 bits, and must have signed the request.
func ParseCSR(csrPEM []byte) (crypto.PublicKey, error) {
	if len(csrPEM) > maxCSR {
		return nil, fmt.Errorf("parse certificate request: %d bytes, at most %d are allowed", len(csrPEM), maxCSR)
	}
	block, rest := pem.Decode(csrPEM)
	switch {
	case block == nil:
		return nil, errors.New("parse certificate request: it is not PEM")
	case block.Type != blockCSR:
		return nil, fmt.Errorf("parse certificate request: it is a %.40q", block.Type)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("parse certificate request: something follows it")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	// The key first: checking the signature of an absurd key costs.
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("parse certificate request: its key did not sign it: %w", err)
	}
	return csr.PublicKey, nil
}

func checkKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("the curve %s is not allowed: use P-256 or P-384", k.Curve.Params().Name)
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 || bits > 8192 {
			return fmt.Errorf("an RSA key of %d bits is not allowed: use 2048 to 8192", bits)
		}
		return nil
	}
	return fmt.Errorf("keys of type %T are not allowed: use ECDSA P-256", key)
}

// parseCerts reads PEM that holds certificates and nothing else.
func parseCerts(data []byte) ([]*x509.Certificate, error) {
	if len(data) > maxChain {
		return nil, fmt.Errorf("parse certificates: %d bytes, at most %d are allowed", len(data), maxChain)
	}
	var certs []*x509.Certificate
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			if len(bytes.TrimSpace(rest)) > 0 {
				return nil, errors.New("parse certificates: not PEM")
			}
			break
		}
		if block.Type != blockCert {
			return nil, fmt.Errorf("parse certificates: there is a %.40q among them", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		if certs = append(certs, c); len(certs) > maxCerts {
			return nil, fmt.Errorf("parse certificates: more than %d", maxCerts)
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("parse certificates: there are none")
	}
	return certs, nil
}

// ParseBundle returns the CA certificates of a bundle (PEM).
func ParseBundle(bundlePEM []byte) ([]*x509.Certificate, error) {
	certs, err := parseCerts(bundlePEM)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if !c.IsCA || !c.BasicConstraintsValid {
			return nil, fmt.Errorf("parse bundle: %q is not the certificate of a CA", c.Subject.CommonName)
		}
	}
	return certs, nil
}

func poolOf(certs []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool
}

// newKey makes an ECDSA P-256 key.
func newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	return key, encodePEM(blockKey, der), nil
}

func parseKey(keyPEM []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return nil, errors.New("the key is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("parse key: %T cannot sign", key)
	}
	return signer, nil
}

// newCSR asks for a certificate for key. It names nobody: the cluster decides.
func newCSR(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return encodePEM(blockCSR, der), nil
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

// sameKey reports whether two public keys are the same.
func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
