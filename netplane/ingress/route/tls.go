package route

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Certificate is that of a secret.
type Certificate struct {
	Namespace, Secret string
	TLS               *tls.Certificate
	NotBefore         time.Time
	NotAfter          time.Time

	certificate, key []byte // what it was made of
}

// certificates are by host, as [Table.Match] finds hosts.
type certificates struct {
	names, wildcards map[string]*Certificate
	fallback         *Certificate
	managed          map[string]bool
}

// Certificate returns that of a host, of the wildcard that covers it, or the one for
// everything else; nil: there is none. managed: it is not from a secret, it is obtained.
//
// name is in lower case.
func (t *Table) Certificate(name string) (c *Certificate, managed bool) {
	have := &t.certificates
	if c = have.names[name]; c != nil {
		return c, false
	}
	if have.managed[name] {
		return nil, true
	}
	if _, parent, ok := strings.Cut(name, "."); ok {
		if c = have.wildcards[parent]; c != nil {
			return c, false
		}
	}
	return have.fallback, false
}

// certs finds the certificates of secrets, and gives them to hosts.
type certs struct {
	certificates
	secrets map[string]*corev1.Secret
	known   map[string]*Certificate // from the table before
	made    map[string]*Certificate // nil: it cannot be used
	errs    map[string]string
}

func newCerts(secrets []*corev1.Secret, before *Table) *certs {
	c := &certs{
		certificates: certificates{names: map[string]*Certificate{}, wildcards: map[string]*Certificate{}, managed: map[string]bool{}},
		secrets:      map[string]*corev1.Secret{}, known: map[string]*Certificate{}, made: map[string]*Certificate{}, errs: map[string]string{},
	}
	for _, s := range secrets {
		c.secrets[s.Namespace+"/"+s.Name] = s
	}
	if before != nil {
		for _, k := range before.Certificates {
			c.known[k.Namespace+"/"+k.Secret] = k
		}
	}
	return c
}

// of returns the certificate of a secret, or why there is none.
func (c *certs) of(namespace, name string) (*Certificate, string) {
	key := namespace + "/" + name
	if out, ok := c.made[key]; ok {
		return out, c.errs[key]
	}
	out, why := c.read(namespace, name)
	c.made[key], c.errs[key] = out, why
	return out, why
}

func (c *certs) read(namespace, name string) (*Certificate, string) {
	s := c.secrets[namespace+"/"+name]
	if s == nil {
		return nil, "there is no secret"
	}
	if s.Type != corev1.SecretTypeTLS {
		return nil, "it has to be of type " + string(corev1.SecretTypeTLS)
	}
	pem, key := s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey]
	if k := c.known[namespace+"/"+name]; k != nil && bytes.Equal(k.certificate, pem) && bytes.Equal(k.key, key) {
		return k, ""
	}
	pair, err := tls.X509KeyPair(pem, key)
	if err != nil {
		return nil, err.Error() // never quotes a key
	}
	return &Certificate{namespace, name, &pair, pair.Leaf.NotBefore, pair.Leaf.NotAfter, pem, key}, ""
}

func (c *certs) list() []*Certificate {
	var out []*Certificate
	for _, k := range c.made {
		if k != nil {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(x, y *Certificate) int {
		return cmp.Or(cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Secret, y.Secret))
	})
	return out
}

// tls gives the ingress's certificates to its hosts. It returns which of its hosts are to
// be reached with TLS.
func (b *builder) tls() (secure func(host string) bool) {
	everything, covered := false, map[string]bool{}
	for i := range b.ing.Spec.TLS {
		t := &b.ing.Spec.TLS[i]
		hosts := t.Hosts
		if len(hosts) == 0 {
			everything = true
			for j := range b.ing.Spec.Rules {
				hosts = append(hosts[:len(hosts):len(hosts)], b.ing.Spec.Rules[j].Host)
			}
			if len(hosts) == 0 {
				hosts = []string{""}
			}
		}
		for _, h := range t.Hosts {
			covered[strings.ToLower(h)] = true
		}
		if t.SecretName == "" {
			b.obtain(t.Hosts)
			continue
		}
		cert, why := b.certs.of(b.ing.Namespace, t.SecretName)
		if cert == nil {
			b.warn("secret %q: %s", t.SecretName, why)
			continue
		}
		for _, h := range hosts {
			b.assign(strings.ToLower(h), cert)
		}
	}
	return func(host string) bool {
		host = strings.ToLower(host)
		_, parent, _ := strings.Cut(host, ".")
		return everything || covered[host] || covered["*."+parent]
	}
}

// obtain notes hosts whose certificates are not in a secret.
func (b *builder) obtain(hosts []string) {
	if !b.options.ACME {
		return // another ingress, or the one without hosts, may have a certificate for them
	}
	for _, h := range hosts {
		h = strings.ToLower(h)
		if strings.HasPrefix(h, "*.") {
			b.warn("a certificate for %q cannot be obtained over HTTP", h)
			continue
		}
		if old := b.certs.names[h]; old != nil {
			b.warn("host %q already has the certificate of secret %s/%s", h, old.Namespace, old.Secret)
			continue
		}
		b.certs.managed[h] = true
		b.table.Managed = append(b.table.Managed, h)
	}
}

// assign gives host its certificate, if it has none yet.
func (b *builder) assign(host string, cert *Certificate) {
	into, key := b.certs.names, host
	if parent, ok := strings.CutPrefix(host, "*."); ok {
		into, key = b.certs.wildcards, parent
	}
	old := into[key]
	if host == "" {
		old = b.certs.fallback
	}
	switch {
	case old == cert:
		return
	case b.certs.managed[host]:
		b.warn("host %q has a certificate that is obtained for an older ingress", host)
		return
	case old != nil:
		b.warn("host %q already has the certificate of secret %s/%s", cmp.Or(host, "*"), old.Namespace, old.Secret)
		return
	case host == "":
		b.certs.fallback = cert
		return
	}
	into[key] = cert
	probe := strings.Replace(host, "*", "any", 1)
	if err := cert.TLS.Leaf.VerifyHostname(probe); err != nil {
		b.warn("secret %q: the certificate is not for host %q", cert.Secret, host)
	}
}
