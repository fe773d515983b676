package pki

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ErrNoCertificate says that a Keeper has nothing to show yet: the machine must join.
var ErrNoCertificate = errors.New("this machine has no certificate of the cluster yet")

// The files of a Keeper. Key and chain are one file, so that they are replaced at
// once and always belong together.
const (
	identityFile = "identity.pem"
	trustFile    = "trust.pem"
	pendingFile  = "pending.key"
)

// Keeper holds the key, certificate and trusted CAs of one process, in a folder and
// in memory. Everything that it hands out uses what is newest: see [Keeper.ServerTLS]
// and [Keeper.ClientTLS]. It is safe for concurrent use; one process may have one
// Keeper of a folder.
type Keeper struct {
	dir     string
	log     *slog.Logger
	current atomic.Pointer[credentials]
	kick    chan struct{}

	mu      sync.Mutex    // held while files change
	changed chan struct{} // closed at the next change
}

// credentials do not change.
type credentials struct {
	cert *tls.Certificate // with its leaf parsed; nil: none yet
	cas  []*x509.Certificate
	pool *x509.CertPool
}

// OpenKeeper loads what dir has, and makes it (mode 0700) if it is not there. A
// folder without a certificate is none of an error: see [Keeper.Ready].
func OpenKeeper(dir string, log *slog.Logger) (*Keeper, error) {
	if log == nil {
		log = slog.Default()
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open certificates: %w", err)
	}
	k := &Keeper{dir: dir, log: log, kick: make(chan struct{}, 1), changed: make(chan struct{})}
	c := &credentials{pool: x509.NewCertPool()}
	if data, err := k.read(trustFile); err != nil {
		return nil, err
	} else if data != nil {
		if c.cas, err = ParseBundle(data); err != nil {
			return nil, k.damaged(trustFile, err)
		}
		c.pool = poolOf(c.cas)
	}
	if data, err := k.read(identityFile); err != nil {
		return nil, err
	} else if data != nil {
		pair, err := tls.X509KeyPair(data, data)
		if err != nil {
			return nil, k.damaged(identityFile, err)
		}
		c.cert = &pair
	}
	k.current.Store(c)
	return k, nil
}

func (k *Keeper) read(name string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(k.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open certificates: %w", err)
	}
	return data, nil
}

func (k *Keeper) damaged(name string, err error) error {
	return fmt.Errorf("open certificates: %s: %w (restore it from a backup, or remove the folder and join again)", filepath.Join(k.dir, name), err)
}

// Ready reports why there is nothing to show to others at now: ErrNoCertificate, or
// that the certificate has ended.
func (k *Keeper) Ready(now time.Time) error {
	leaf := k.Leaf()
	switch {
	case leaf == nil:
		return ErrNoCertificate
	case now.After(leaf.NotAfter):
		return fmt.Errorf("the certificate of %s ended at %s: it was not renewed in time, so this machine must join again with a token", leaf.Subject.CommonName, leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Leaf returns the current certificate; nil: there is none.
func (k *Keeper) Leaf() *x509.Certificate {
	if c := k.current.Load(); c.cert != nil {
		return c.cert.Leaf
	}
	return nil
}

// Issuer names the trusted CA that signed the current certificate; empty: none.
func (k *Keeper) Issuer() string {
	c := k.current.Load()
	if c.cert == nil {
		return ""
	}
	return signedBy(c.cas, c.cert.Leaf)
}

// Trusts names the CAs that are trusted.
func (k *Keeper) Trusts() []string { return fingerprints(k.current.Load().cas) }

// Bundle returns the CAs that are trusted, as PEM.
func (k *Keeper) Bundle() []byte { return bundleOf(k.current.Load().cas) }

func bundleOf(cas []*x509.Certificate) []byte {
	var out []byte
	for _, c := range cas {
		out = append(out, encodePEM(blockCert, c.Raw)...)
	}
	return out
}

// Changed returns a channel that is closed when the certificate or the trusted CAs
// change next. Take it before looking at them.
func (k *Keeper) Changed() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.changed
}

// swap makes c current. The caller holds mu.
func (k *Keeper) swap(c *credentials) {
	k.current.Store(c)
	close(k.changed)
	k.changed = make(chan struct{})
}

// JoinRequest returns a certificate request to join with. Its key is the one that
// the cluster knows this machine by, if it has been a member before; otherwise a new
// one, which is on disk before it is shown to anybody: a machine that crashes before
// the answer is stored asks again with the same key, and is not taken for an impostor.
func (k *Keeper) JoinRequest() (csrPEM []byte, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if c := k.current.Load(); c.cert != nil {
		if key, ok := c.cert.PrivateKey.(crypto.Signer); ok {
			return newCSR(key)
		}
	}
	return k.pendingRequest()
}

// renewRequest asks for a certificate with a new key. A renewal whose answer was
// lost is repeated with the same key, for the same reason.
func (k *Keeper) renewRequest() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.pendingRequest()
}

func (k *Keeper) pendingRequest() ([]byte, error) {
	key, _, err := k.pending()
	if err != nil {
		return nil, err
	}
	if key == nil {
		var keyPEM []byte
		if key, keyPEM, err = newKey(); err != nil {
			return nil, err
		}
		if err := writeFile(filepath.Join(k.dir, pendingFile), keyPEM, 0o600); err != nil {
			return nil, err
		}
	}
	return newCSR(key)
}

// pending returns the key that waits for its certificate; nil: none does.
func (k *Keeper) pending() (crypto.Signer, []byte, error) {
	keyPEM, err := k.read(pendingFile)
	if err != nil || keyPEM == nil {
		return nil, nil, err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, nil, k.damaged(pendingFile, err)
	}
	return key, keyPEM, nil
}

// Install stores the answer to a certificate request and uses it from now on. The
// chain must be for the key of that request, lead to a CA of the bundle, and name
// the same identity as before, if there was one.
func (k *Keeper) Install(chainPEM, bundlePEM []byte, now time.Time) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	chain, err := parseCerts(chainPEM)
	if err != nil {
		return fmt.Errorf("install certificate: %w", err)
	}
	cas, err := ParseBundle(bundlePEM)
	if err != nil {
		return fmt.Errorf("install certificate: %w", err)
	}
	if err := k.checkAnswer(chain, cas, now); err != nil {
		return fmt.Errorf("install certificate: %w", err)
	}
	keyPEM, isPending, err := k.keyFor(chain[0])
	if err != nil {
		return fmt.Errorf("install certificate: %w", err)
	}
	identity := append(slices.Clone(keyPEM), bundleOf(chain)...)
	pair, err := tls.X509KeyPair(identity, identity)
	if err != nil {
		return fmt.Errorf("install certificate: %w", err)
	}
	// Trust first: after a crash in between, the old certificate and the new CAs, which
	// include its own unless the cluster has given that up.
	if err := writeFile(filepath.Join(k.dir, trustFile), bundleOf(cas), 0o644); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(k.dir, identityFile), identity, 0o600); err != nil {
		return err
	}
	k.swap(&credentials{cert: &pair, cas: cas, pool: poolOf(cas)})
	if isPending {
		if err := os.Remove(filepath.Join(k.dir, pendingFile)); err != nil {
			return fmt.Errorf("install certificate: %w", err)
		}
	}
	return nil
}

func (k *Keeper) checkAnswer(chain, cas []*x509.Certificate, now time.Time) error {
	leaf := chain[0]
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: poolOf(cas), Intermediates: poolOf(chain[1:]), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return fmt.Errorf("the answer does not lead to a trusted CA: %w", err)
	}
	old := k.Leaf()
	if old == nil {
		return nil
	}
	if a, b := old.Subject, leaf.Subject; a.CommonName != b.CommonName || !sameSet(a.Organization, b.Organization) {
		return fmt.Errorf("it is for %s, this is %s: to make another machine of this one, remove %s first", b.CommonName, a.CommonName, k.dir)
	}
	return nil
}

// keyFor returns the key that a certificate is for, and whether that is the pending
// one.
func (k *Keeper) keyFor(leaf *x509.Certificate) (keyPEM []byte, isPending bool, err error) {
	key, keyPEM, err := k.pending()
	if err != nil {
		return nil, false, err
	}
	if key != nil && sameKey(key.Public(), leaf.PublicKey) {
		return keyPEM, true, nil
	}
	if c := k.current.Load(); c.cert != nil && sameKey(c.cert.Leaf.PublicKey, leaf.PublicKey) {
		der, err := x509.MarshalPKCS8PrivateKey(c.cert.PrivateKey)
		if err != nil {
			return nil, false, fmt.Errorf("encode key: %w", err)
		}
		return encodePEM(blockKey, der), false, nil
	}
	return nil, false, errors.New("the certificate is for a key that is not ours")
}

// SetBundle replaces the CAs that are trusted. It is for the caller to have them from
// the cluster itself: over a verified connection, or from the replicated state. A
// bundle without the CA of the current certificate is accepted, because the cluster
// may have given that CA up; renew then at once.
func (k *Keeper) SetBundle(bundlePEM []byte) error {
	cas, err := ParseBundle(bundlePEM)
	if err != nil {
		return fmt.Errorf("trust CAs: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	c := k.current.Load()
	if sameSet(fingerprints(c.cas), fingerprints(cas)) {
		return nil
	}
	if err := writeFile(filepath.Join(k.dir, trustFile), bundleOf(cas), 0o644); err != nil {
		return err
	}
	k.swap(&credentials{cert: c.cert, cas: cas, pool: poolOf(cas)})
	return nil
}
