package ingress

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/ingress/route"
)

// TestMain is two programs: the tests, and a node that some of them run. It finds goroutines
// that do not end, but for those of libraries that cannot be told to: the test's CA, and what
// certmagic leaves to end by itself.
func TestMain(m *testing.M) {
	if text := os.Getenv(nodeVariable); text != "" {
		if err := runNode(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("github.com/letsencrypt/pebble/v2/va.VAImpl.processTasks"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).loop"))
}

// world is a running server and what it serves.
type world struct {
	*Server
	t           testing.TB
	objects     route.Objects
	roots       *x509.CertPool
	metrics     *prometheus.Registry
	http, https string
	stop        func()
}

// newWorld serves o on ports of its own until the test ends.
func newWorld(t testing.TB, cfg Config, o func(w *world)) *world {
	t.Helper()
	w := &world{t: t, roots: x509.NewCertPool(), metrics: prometheus.NewRegistry()}
	opened := make(chan string, 16)
	if cfg.HTTP == "" {
		cfg.HTTP, cfg.HTTPS = "127.0.0.1:0", "localhost:0" // to tell them apart
	}
	cfg.Registerer = w.metrics
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Listen = func(ctx context.Context, network, address string) (net.Listener, error) {
		ln, err := (&net.ListenConfig{}).Listen(ctx, network, strings.Replace(address, "localhost", "127.0.0.1", 1))
		if err == nil {
			opened <- address + " " + ln.Addr().String()
		}
		return ln, err
	}
	cfg.ListenPacket = func(ctx context.Context, network, address string) (net.PacketConn, error) {
		conn, err := (&net.ListenConfig{}).ListenPacket(ctx, network, strings.Replace(address, "localhost", "127.0.0.1", 1))
		if err == nil {
			opened <- "quic " + conn.LocalAddr().String()
		}
		return conn, err
	}
	var err error
	if w.Server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	o(w)
	w.Set(w.objects)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = w.Run(ctx) }()
	w.stop = sync.OnceFunc(func() { cancel(); <-ended })
	t.Cleanup(w.stop)
	for range 3 {
		name, address, _ := strings.Cut(<-opened, " ")
		switch name {
		case cfg.HTTP:
			w.http = address
		case cfg.HTTPS:
			w.https = address
		}
	}
	return w
}

// service makes a service of servers, of which each has a port of its own.
func (w *world) service(name string, urls ...string) {
	w.objects.Services = append(w.objects.Services, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
	})
	w.objects.Slices = append(w.objects.Slices, endpoints(name, urls...)...)
}

func endpoints(name string, urls ...string) (out []*discoveryv1.EndpointSlice) {
	for i, u := range urls {
		a := netip.MustParseAddrPort(u[strings.LastIndex(u, "/")+1:])
		port, empty, ready := int32(a.Port()), "", true
		out = append(out, &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint(name, i), Labels: map[string]string{discoveryv1.LabelServiceName: name}}, AddressType: discoveryv1.AddressTypeIPv4,
			Ports:     []discoveryv1.EndpointPort{{Name: &empty, Port: &port}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{a.Addr().String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
		})
	}
	return out
}

// ingress leads a host to a service. Annotations are without what they begin with.
func (w *world) ingress(host, service string, annotations ...string) *networkingv1.Ingress {
	prefix := networkingv1.PathTypePrefix
	ing := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: service, Annotations: map[string]string{}}, Spec: networkingv1.IngressSpec{Rules: []networkingv1.IngressRule{{
		Host: host, IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{{
			Path: "/", PathType: &prefix, Backend: networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: service, Port: networkingv1.ServiceBackendPort{Number: 80}}},
		}}}},
	}}}}
	for i := 0; i < len(annotations); i += 2 {
		ing.Annotations["ingress.decree.dev/"+annotations[i]] = annotations[i+1]
	}
	w.objects.Ingresses = append(w.objects.Ingresses, ing)
	return ing
}

// secure gives an ingress a certificate for hosts.
func (w *world) secure(ing *networkingv1.Ingress, hosts ...string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: hosts, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		w.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	w.roots.AddCert(cert)
	w.objects.Secrets = append(w.objects.Secrets, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: ing.Name}, Type: corev1.SecretTypeTLS, Data: map[string][]byte{
		corev1.TLSCertKey: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), corev1.TLSPrivateKeyKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
	}})
	ing.Spec.TLS = []networkingv1.IngressTLS{{Hosts: hosts, SecretName: ing.Name}}
}

// client connects to the world whatever the name is.
func (w *world) client(configure func(*http.Transport)) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			to := w.http
			if strings.HasSuffix(address, ":443") {
				to = w.https
			}
			return (&net.Dialer{}).DialContext(ctx, network, to)
		},
		TLSClientConfig: &tls.Config{RootCAs: w.roots}, Protocols: new(http.Protocols), DisableCompression: true,
	}
	tr.Protocols.SetHTTP1(true)
	if configure != nil {
		configure(tr)
	}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// get returns the status and the body of a page.
func (w *world) get(c *http.Client, url string) (int, string) {
	w.t.Helper()
	res, err := c.Get(url)
	if err != nil {
		w.t.Fatal(err)
	}
	return read(w.t, res)
}

func read(t testing.TB, res *http.Response) (int, string) {
	t.Helper()
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// backend is a server that says its name, and what it was asked.
func backend(t testing.TB, name string) *httptest.Server {
	return serving(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Backend", name)
		fmt.Fprintf(w, "%s %s %s %s %q", name, r.Method, r.Host, r.URL.RequestURI(), body)
	})
}

func serving(t testing.TB, h http.HandlerFunc) *httptest.Server {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

// metric is the value of a series as it is scraped, zero if there is none. Labels are of
// the form "code=2xx".
func (w *world) metric(name string, labels ...string) float64 {
	w.t.Helper()
	families, err := w.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			fits := 0
			for _, l := range m.GetLabel() {
				for _, want := range labels {
					if l.GetName()+"="+l.GetValue() == want {
						fits++
					}
				}
			}
			if fits == len(labels) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}
