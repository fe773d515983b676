package ingress

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
	networkingv1 "k8s.io/api/networking/v1"
)

// authority is a CA that speaks ACME, which finds all names at this machine.
type authority struct {
	*httptest.Server
	roots  *x509.CertPool // of what it issues
	own    *x509.CertPool // of its own server
	orders atomic.Int64
}

// newAuthority asks for proofs at these ports.
func newAuthority(t *testing.T, httpPort, tlsPort int) *authority {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	t.Setenv("PEBBLE_WFE_NONCEREJECT", "0")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	names := &dns.Server{Listener: ln, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(127, 0, 0, 1)})
		}
		_ = w.WriteMsg(m)
	})}
	served := make(chan struct{})
	go func() { defer close(served); _ = names.ActivateAndServe() }()
	t.Cleanup(func() { _ = names.Shutdown(); <-served })
	quiet, store := log.New(io.Discard, "", 0), db.NewMemoryStore()
	issuer := ca.New(quiet, store, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "any", ValidityPeriod: 3600 * 24 * 30}})
	front := wfe.New(quiet, store, va.New(quiet, httpPort, tlsPort, false, ln.Addr().String(), store), issuer, []string{"ca.example"}, false, false, 1, 1)
	a := &authority{roots: x509.NewCertPool(), own: x509.NewCertPool()}
	handler := front.Handler()
	a.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/order-plz" {
			a.orders.Add(1)
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(a.Close)
	a.own.AddCert(a.Certificate())
	root := issuer.GetRootCert(0)
	a.roots.AppendCertsFromPEM(root.PEM())
	return a
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return strconv.Itoa(ln.Addr().(*net.TCPAddr).Port)
}

// TestACME: two nodes with one storage obtain a certificate once, both have it, and the one
// that the CA asks can answer, whichever of them obtains it.
func TestACME(t *testing.T) {
	const host = "shop.example.com"
	ports := [2][2]string{{freePort(t), freePort(t)}, {freePort(t), freePort(t)}}
	number := func(s string) int { n, _ := strconv.Atoi(s); return n }
	authority := newAuthority(t, number(ports[1][0]), number(ports[1][1]))
	storage := &certmagic.FileStorage{Path: t.TempDir()}
	web := backend(t, "web")
	var worlds []*world
	var said syncBuffer
	for _, p := range ports {
		worlds = append(worlds, newWorld(t, Config{
			Log: slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug})), HTTP: "127.0.0.1:" + p[0], HTTPS: "localhost:" + p[1],
			ACME: &ACME{Directory: authority.URL + wfe.DirectoryPath, Email: "ops@example.com", Roots: authority.own, Storage: storage},
		}, func(w *world) {
			w.roots = authority.roots
			w.service("web", web.URL)
			w.ingress(host, "web", "acme", "true")
		}))
	}
	for _, w := range worlds { // now that both listen
		w.objects.Ingresses[0].Spec.TLS = []networkingv1.IngressTLS{{Hosts: []string{host}}}
		w.Set(w.objects)
	}
	for i, w := range worlds {
		var last error
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // a handshake is how one is told
			c, err := tls.Dial("tcp", w.https, &tls.Config{RootCAs: authority.roots, ServerName: host})
			if last = err; err == nil {
				c.Close()
				break
			}
			if time.Now().After(end) {
				t.Fatalf("node %d has no certificate: %v\n%s", i, last, said.String())
			}
		}
		if code, body := w.get(w.client(nil), "https://"+host+"/"); code != 200 || !strings.HasPrefix(body, "web GET") {
			t.Errorf("%d %s", code, body)
		}
	}
	if n := authority.orders.Load(); n != 1 {
		t.Errorf("the certificate was ordered %d times", n)
	}
	if _, err := tls.Dial("tcp", worlds[0].https, &tls.Config{RootCAs: authority.roots, ServerName: "other.example.com"}); err == nil {
		t.Error("a name that no ingress has got a certificate")
	}
	for _, w := range worlds { // without the ingress there is no certificate
		w.objects.Ingresses[0].Spec.TLS = nil
		w.Set(w.objects)
		if _, err := tls.Dial("tcp", w.https, &tls.Config{RootCAs: authority.roots, ServerName: host}); err == nil {
			t.Error("the host has a certificate without TLS")
		}
	}
}
