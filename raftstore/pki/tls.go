package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrPeer says that the other side of a connection is not who it must be.
var ErrPeer = errors.New("verify peer")

// ServerTLS returns the configuration of a server: TLS 1.3 with the given protocols
// (ALPN), the current certificate, and a client certificate that is optional but must
// lead to a trusted CA if it is shown. Every connection is judged by what is current
// when it is made; those that exist go on, see [Keeper.Recheck].
//
// There is no session resumption: a resumed session carries the identity that was
// verified when it began, and would outlive a certificate that has ended and a CA
// that was dropped. Connections here are few and long, so that it would gain nothing.
func (k *Keeper) ServerTLS(next ...string) *tls.Config {
	c := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             next,
		ClientAuth:             tls.VerifyClientCertIfGiven,
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return k.certificate()
		},
		ClientCAs: k.current.Load().pool, // for who looks; each connection gets its own
	}
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		own := c.Clone()
		own.GetConfigForClient = nil
		own.ClientCAs = k.current.Load().pool
		return own, nil
	}
	return c
}

// ClientTLS returns the configuration of a client of the cluster's servers: TLS 1.3
// with the given protocols (ALPN) and the current certificate. Servers are verified
// by [ServerName] and the CAs that are trusted when the connection is made, whatever
// address they are reached under.
func (k *Keeper) ClientTLS(next ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: next,
		ServerName: ServerName,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return k.certificate()
		},
		// crypto/tls would verify by CAs that cannot change. VerifyConnection does
		// instead what it would do, for every connection: there is no resumption here.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return verifyServer(cs, k.current.Load().pool)
		},
	}
}

// Recheck says why the peer of a connection would not be believed any more: the CA
// that its verified chains lead to was dropped, or a certificate in them has ended. A
// certificate that begins after now is none of that: the clock was set back.
//
// It verifies no signature, and costs next to nothing. Someone with a certificate of a
// CA that is trusted, who was verified by way of one that is not, is told to go too:
// the next handshake finds the other way.
func (k *Keeper) Recheck(chains [][]*x509.Certificate, now time.Time) error {
	cas := k.current.Load().cas
	err := fmt.Errorf("%w: it has shown no certificate", ErrPeer)
	for _, chain := range chains {
		root := chain[len(chain)-1]
		ended := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return now.After(c.NotAfter) })
		switch {
		case !slices.ContainsFunc(cas, root.Equal):
			err = fmt.Errorf("%w: the CA of %q is not trusted any more", ErrPeer, chain[0].Subject.CommonName)
		case ended >= 0:
			err = fmt.Errorf("%w: the certificate of %q ended at %s", ErrPeer, chain[ended].Subject.CommonName, chain[ended].NotAfter.UTC().Format(time.RFC3339))
		default:
			return nil
		}
	}
	return err
}

func (k *Keeper) certificate() (*tls.Certificate, error) {
	if c := k.current.Load(); c.cert != nil {
		return c.cert, nil
	}
	return nil, ErrNoCertificate
}

func verifyServer(cs tls.ConnectionState, roots *x509.CertPool) error {
	if len(cs.PeerCertificates) == 0 {
		return fmt.Errorf("%w: the server shows no certificate", ErrPeer)
	}
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: poolOf(cs.PeerCertificates[1:]), DNSName: ServerName,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
		return fmt.Errorf("%w: %w (another cluster, or the CA was replaced while this machine was off: then join again)", ErrPeer, err)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrPeer, err)
	}
	return nil
}

// RequireGroup refuses connections whose peer is not in a group: those with one of
// the given protocols, or all when none is given. Call it on a configuration of a
// [Keeper] before its first use. It returns c.
func RequireGroup(c *tls.Config, group string, protocols ...string) *tls.Config {
	before := c.VerifyConnection
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if before != nil {
			if err := before(cs); err != nil {
				return err
			}
		}
		if len(protocols) > 0 && !slices.Contains(protocols, cs.NegotiatedProtocol) {
			return nil
		}
		if len(cs.PeerCertificates) == 0 {
			return fmt.Errorf("%w: it shows no certificate, one of the group %s is needed", ErrPeer, group)
		}
		// Verified: by crypto/tls on a server, by what came before on a client.
		s := cs.PeerCertificates[0].Subject
		if !slices.Contains(s.Organization, group) {
			return fmt.Errorf("%w: %q is not in the group %s", ErrPeer, s.CommonName, group)
		}
		return nil
	}
	return c
}
