package ingress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
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
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
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

// nodeVariable makes this test binary a node that serves an Ingress: see [runNode].
const nodeVariable = "DECREE_TEST_NODE"

// testNode is what a node is told.
type testNode struct {
	Host, Backend string
	Address       string // of this node
	HTTP, HTTPS   string // ports
	Nodes         []*corev1.Node
	Directory     string // of the CA
	Roots         []byte // of its server, in PEM
	Dir           string
}

// runNode serves until its input ends. Nodes need processes of their own, as what the library
// knows of questions that are under way is known to all of a process.
func runNode(text string) error {
	var n testNode
	if err := json.Unmarshal([]byte(text), &n); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(n.Roots)
	s, err := New(Config{
		HTTP: n.Address + ":" + n.HTTP, HTTPS: n.Address + ":" + n.HTTPS, ACME: &ACME{Directory: n.Directory, Roots: roots, Dir: n.Dir},
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo})),
	})
	if err != nil {
		return err
	}
	w := &world{}
	w.objects.Node, w.objects.Nodes = n.Address, n.Nodes
	w.service("web", n.Backend)
	w.ingress(n.Host, "web", "acme", "true").Spec.TLS = []networkingv1.IngressTLS{{Hosts: []string{n.Host}}}
	s.Set(w.objects)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); cancel() }()
	_ = s.Run(ctx)
	return nil
}

// TestACMENodes: of two nodes that share nothing each obtains a certificate, though the CA asks
// the first of them only.
func TestACMENodes(t *testing.T) {
	const host = "shop.example.com"
	httpPort, httpsPort := freePort(t), freePort(t)
	number := func(s string) int { n, _ := strconv.Atoi(s); return n }
	authority := newAuthority(t, number(httpPort), number(httpsPort)) // asks 127.0.0.1
	web := backend(t, "web")
	addresses := []string{"127.0.0.1", "127.0.0.2"}
	var nodes []*corev1.Node
	for _, a := range append(addresses, "127.0.0.3") { // the last one is away
		nodes = append(nodes, &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: a, Labels: map[string]string{api.LabelIngressNode: "true"}},
			Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: a}}},
		})
	}
	var said syncBuffer
	var serials []string
	for _, a := range addresses { // the second begins when the first serves: who is asked must be there
		text, err := json.Marshal(testNode{
			Host: host, Backend: web.URL, Address: a, HTTP: httpPort, HTTPS: httpsPort, Nodes: nodes, Directory: authority.URL + wfe.DirectoryPath,
			Roots: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Certificate().Raw}), Dir: t.TempDir(),
		})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env, cmd.Stderr = append(os.Environ(), nodeVariable+"="+string(text)), &said
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // a handshake is how one is told
			c, err := tls.Dial("tcp", net.JoinHostPort(a, httpsPort), &tls.Config{RootCAs: authority.roots, ServerName: host})
			if err == nil {
				serials = append(serials, c.ConnectionState().PeerCertificates[0].SerialNumber.String())
				c.Close()
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s has no certificate: %v\n%s", a, err, said.String())
			}
		}
	}
	if serials[0] == serials[1] {
		t.Errorf("both have the certificate %s", serials[0])
	}
	t.Logf("two certificates after %d orders", authority.orders.Load())
}

// TestAskOthers: what other nodes say is passed on if it is a proof for the token, and nothing
// else is; nobody is asked for what is no token, nor by who was asked.
func TestAskOthers(t *testing.T) {
	var asked atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		switch token := strings.TrimPrefix(r.URL.Path, challengePath); {
		case r.Host != "shop.example.com" || r.Header.Get(askedHeader) == "":
			t.Errorf("%s asks %s with %v", r.Host, r.URL, r.Header)
		case token == "good":
			_, _ = io.WriteString(w, "good.hash")
		case token == "page":
			_, _ = io.WriteString(w, "<html>page.</html>")
		case token == "long":
			_, _ = io.WriteString(w, "long."+strings.Repeat("x", maxProof))
		case token == "elsewhere":
			http.Redirect(w, r, "/elsewhere.", http.StatusFound)
		default:
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, token+".hash")
		}
	}))
	defer other.Close()
	at := other.Listener.Addr().(*net.TCPAddr).AddrPort()
	o, err := newObtainer(ACME{Dir: t.TempDir()}, Config{HTTP: at.String(), HTTPS: at.String(), Dial: (&net.Dialer{}).DialContext, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	for token, want := range map[string]string{"good": "good.hash", "page": "", "long": "", "elsewhere": "", "absent": "", "": "", "a/b": "", "a.b": "", "%2e": ""} {
		before := asked.Load()
		r := httptest.NewRequest(http.MethodGet, "http://shop.example.com"+challengePath+token, nil)
		if got := o.askOthers(r, []netip.Addr{at.Addr()}); string(got) != want {
			t.Errorf("%q: %q, want %q", token, got, want)
		}
		if word := !strings.ContainsAny(token, "/.%") && token != ""; word != (asked.Load() > before) {
			t.Errorf("%q: asked %d times", token, asked.Load()-before)
		}
	}
	before := asked.Load()
	for range 3 * askingBurst {
		o.askOthers(httptest.NewRequest(http.MethodGet, "http://shop.example.com"+challengePath+"good", nil), []netip.Addr{at.Addr()})
	}
	if n := asked.Load() - before; n < askingBurst/2 || n > 2*askingBurst {
		t.Errorf("%d questions became %d", 3*askingBurst, n)
	}
}
