package ingress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/time/rate"

	"decree.dev/decree/netplane/ingress/route"
)

// acmeProtocol is what a CA asks for to prove a name over TLS (RFC 8737).
const acmeProtocol = "acme-tls/1"

// ACME says where certificates are obtained (RFC 8555). Storage, or Dir, has to be set.
type ACME struct {
	// Directory is the URL of the CA; empty: Let's Encrypt.
	Directory string
	// Email is whom the CA tells about its certificates; it may be empty.
	Email string
	// Roots are what the CA's own server is verified with; nil: those of the system.
	Roots *x509.CertPool
	// Storage holds accounts, certificates and the proofs that are under way, and locks
	// names while a certificate is obtained. Servers that share one obtain each certificate
	// once, and any of them can answer the CA.
	Storage certmagic.Storage
	// Dir is a folder for a storage of this server alone.
	Dir string
}

// obtainer keeps certificates of managed hosts.
type obtainer struct {
	cfg    ACME
	log    *zap.Logger
	http   int // ports that the CA's questions arrive at
	https  int
	cache  *certmagic.Cache
	way    atomic.Pointer[way]
	known  []string // hosts that are managed
	others *http.Client
	asking *rate.Limiter // of the questions that others are asked
}

// way is how certificates are obtained.
type way struct {
	alone  bool // no other node serves the hosts
	magic  *certmagic.Config
	issuer *certmagic.ACMEIssuer
}

func newObtainer(cfg ACME, of Config) (*obtainer, error) {
	if cfg.Storage == nil && cfg.Dir == "" {
		return nil, errors.New("acme: Storage or Dir has to be set")
	}
	if cfg.Storage == nil {
		cfg.Storage = &certmagic.FileStorage{Path: cfg.Dir}
	}
	if cfg.Directory == "" {
		cfg.Directory = certmagic.LetsEncryptProductionCA
	}
	o := &obtainer{cfg: cfg, log: zap.New(&slogCore{of.Log.Handler()}), asking: rate.NewLimiter(askingRate, askingBurst), others: askingClient(of.Dial)}
	for _, p := range []struct {
		address string
		number  *int
	}{{of.HTTP, &o.http}, {of.HTTPS, &o.https}} {
		_, text, err := net.SplitHostPort(p.address)
		if err != nil {
			return nil, err
		}
		if *p.number, err = strconv.Atoi(text); err != nil {
			return nil, fmt.Errorf("acme: port %q: %w", text, err)
		}
	}
	return o, nil
}

// start begins to keep certificates from ending; stop has to be called.
func (o *obtainer) start() {
	o.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return o.way.Load().magic, nil }, Logger: o.log,
	})
	o.choose(true)
}

// choose sets how certificates are obtained. Where several nodes serve a host the CA asks any
// of them, and what it asks over TLS cannot be handed on.
func (o *obtainer) choose(alone bool) {
	if now := o.way.Load(); now != nil && now.alone == alone {
		return
	}
	w := &way{alone: alone, magic: certmagic.New(o.cache, certmagic.Config{Storage: o.cfg.Storage, Logger: o.log, OCSP: certmagic.OCSPConfig{DisableStapling: true}})}
	w.issuer = certmagic.NewACMEIssuer(w.magic, certmagic.ACMEIssuer{
		CA: o.cfg.Directory, Email: o.cfg.Email, Agreed: true, TrustedRoots: o.cfg.Roots, Logger: o.log,
		AltHTTPPort: o.http, AltTLSALPNPort: o.https, // served here already
		DisableTLSALPNChallenge: !alone,
	})
	w.magic.Issuers = []certmagic.Issuer{w.issuer}
	o.way.Store(w)
}

func (o *obtainer) stop() { o.cache.Stop() }

// manage obtains certificates for hosts of t that have none yet, and keeps them until ctx ends.
// What fails is tried again for a month, less and less often.
func (o *obtainer) manage(ctx context.Context, t *route.Table) {
	o.choose(len(t.Others) == 0)
	now := o.way.Load()
	var fresh []string
	var gone []certmagic.SubjectIssuer
	for _, h := range t.Managed {
		if !slices.Contains(o.known, h) {
			fresh = append(fresh, h)
		}
	}
	for _, h := range o.known {
		if !slices.Contains(t.Managed, h) {
			gone = append(gone, certmagic.SubjectIssuer{Subject: h, IssuerKey: now.issuer.IssuerKey()})
		}
	}
	o.known = t.Managed
	o.cache.RemoveManaged(gone)
	if len(fresh) == 0 {
		return
	}
	if err := now.magic.ManageAsync(ctx, fresh); err != nil {
		o.log.Error("obtain certificates", zap.Strings("hosts", fresh), zap.Error(err))
	}
}

// certificate is that of a managed host, or the proof that a CA asks for.
func (o *obtainer) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	return o.way.Load().magic.GetCertificate(hello)
}

// slogCore takes what the library logs.
type slogCore struct{ to slog.Handler }

func slogLevel(l zapcore.Level) slog.Level { return slog.Level(4 * int(l)) }

// Enabled implements [zapcore.LevelEnabler].
func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.to.Enabled(context.Background(), slogLevel(l))
}

// With implements [zapcore.Core].
func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{c.to.WithAttrs(attrs(fields))}
}

// Check implements [zapcore.Core].
func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements [zapcore.Core].
func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, slogLevel(e.Level), e.Message, 0)
	r.AddAttrs(attrs(fields)...)
	return c.to.Handle(context.Background(), r)
}

// Sync implements [zapcore.Core].
func (c *slogCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []slog.Attr {
	m := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(m)
	}
	out := make([]slog.Attr, 0, len(m.Fields))
	for k, v := range m.Fields {
		out = append(out, slog.Any(k, v))
	}
	return out
}
