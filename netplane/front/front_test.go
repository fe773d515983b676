package front

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go/http3"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestMain is two programs: the tests, and the process that they are about.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Verb {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM) // as the command line does
		defer stop()
		if err := Main(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// world is a node with a process of servers, and a backend behind an Ingress.
type world struct {
	t       *testing.T
	ip      netip.Addr // of DNS and Ingress
	cfg     KeeperConfig
	said    *buffer
	objects Objects
	roots   *x509.CertPool
	release chan struct{} // lets slow responses of the backend end
	end     func()        // closes it
	keeper  *Keeper
	stop    func()
}

// buffer is a buffer for several goroutines.
type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

var worlds atomic.Uint32

// inner names the variable that tests see which a test runs.
const inner = "DECREE_TEST_INNER"

func newWorld(t *testing.T) *world {
	if os.Geteuid() != 0 {
		t.Skip("the port of DNS is for root")
	}
	dir, err := os.MkdirTemp("", "front") // a short name, for a socket
	if err != nil {
		t.Fatal(err)
	}
	subnet := byte(0)
	if os.Getenv(inner) != "" {
		subnet = 1
	}
	w := &world{t: t, ip: netip.AddrFrom4([4]byte{127, 77, subnet, byte(worlds.Add(1))}), said: &buffer{}, release: make(chan struct{}), roots: x509.NewCertPool()}
	w.end = sync.OnceFunc(func() { close(w.release) })
	w.cfg = KeeperConfig{
		Dir: filepath.Join(dir, "run"), LogFile: filepath.Join(dir, "log", "front.log"),
		Config: Config{ResolvConf: filepath.Join(dir, "resolv.conf"), Level: slog.LevelInfo, Ingress: &Ingress{HTTP: w.at(80), HTTPS: w.at(443)}},
		Log:    slog.New(slog.NewTextHandler(w.said, nil)),
	}
	t.Cleanup(func() {
		if err := errors.Join(Stop(context.Background(), w.cfg.Dir), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	backend := httptest.NewServer(http.HandlerFunc(w.serve))
	t.Cleanup(func() { w.end(); backend.Close() })
	w.objects = w.serving(backend.Listener.Addr().(*net.TCPAddr).AddrPort())
	return w
}

// serve is the backend: at once, in the end, or as another protocol.
func (w *world) serve(out http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/slow":
		_, _ = io.WriteString(out, "begun\n")
		_ = http.NewResponseController(out).Flush()
		<-w.release
		_, _ = io.WriteString(out, "ended\n")
	case "/talk":
		conn, in, err := http.NewResponseController(out).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_, _ = io.Copy(conn, in)
	default:
		_, _ = io.WriteString(out, "hello\n")
	}
}

func (w *world) at(port uint16) string { return netip.AddrPortFrom(w.ip, port).String() }

// serving is a service with a backend, and an Ingress in front of it.
func (w *world) serving(backend netip.AddrPort) Objects {
	meta := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "default", Name: name} }
	port, prefix := int32(backend.Port()), networkingv1.PathTypePrefix
	slice := &discoveryv1.EndpointSlice{ObjectMeta: meta("web-1"), AddressType: discoveryv1.AddressTypeIPv4, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{backend.Addr().String()}}}, Ports: []discoveryv1.EndpointPort{{Port: &port}}}
	slice.Labels = map[string]string{discoveryv1.LabelServiceName: "web"}
	ingress := &networkingv1.Ingress{ObjectMeta: meta("web"), Spec: networkingv1.IngressSpec{
		TLS: []networkingv1.IngressTLS{{Hosts: []string{"web.example"}, SecretName: "web"}},
		Rules: []networkingv1.IngressRule{{Host: "web.example", IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{
			Paths: []networkingv1.HTTPIngressPath{{Path: "/", PathType: &prefix, Backend: networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "web", Port: networkingv1.ServiceBackendPort{Number: 80}}}}},
		}}}},
	}}
	ingress.Annotations = map[string]string{"ingress.decree.dev/ssl-redirect": "false"}
	cert, key := w.certificate("web.example")
	o := Objects{
		Ingresses: []*networkingv1.Ingress{ingress},
		Secrets:   []*corev1.Secret{{ObjectMeta: meta("web"), Type: corev1.SecretTypeTLS, Data: map[string][]byte{"tls.crt": cert, "tls.key": key}}},
	}
	o.Node, o.Domain, o.DNS = "n1", "cluster.local", w.ip
	o.ServiceCIDR = []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16")}
	o.Services = []*corev1.Service{{ObjectMeta: meta("web"), Spec: corev1.ServiceSpec{ClusterIP: "10.97.0.80", Ports: []corev1.ServicePort{{Port: 80}}}}}
	o.Slices = []*discoveryv1.EndpointSlice{slice}
	return o
}

func (w *world) certificate(name string) (cert, key []byte) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		w.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		w.t.Fatal(err)
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	w.roots.AppendCertsFromPEM(cert)
	return cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// start begins as an agent does that starts.
func (w *world) start() {
	w.t.Helper()
	k, err := NewKeeper(w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.keeper = k
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = k.Run(ctx) })
	w.stop = sync.OnceFunc(func() { cancel(); running.Wait(); k.Close() })
	w.t.Cleanup(w.stop)
}

func (w *world) set() {
	w.t.Helper()
	if err := w.keeper.Set(w.t.Context(), w.objects); err != nil {
		w.t.Fatal(err)
	}
}

// pid is the one process that is not about to end.
func (w *world) pid() int {
	w.t.Helper()
	pids, err := processes(w.cfg.Dir)
	if err != nil || len(pids) == 0 {
		w.t.Fatalf("processes: %v, %v", pids, err)
	}
	return pids[len(pids)-1]
}

// until waits for something that the process does by itself.
func (w *world) until(what string, done func() error) {
	w.t.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = done(); err == nil {
			return
		}
	}
	w.t.Fatalf("%s: %v\n%s", what, err, w.said)
}

// query asks for a name once.
func (w *world) query(network string) error {
	c := dns.Client{Net: network, Timeout: 5 * time.Second}
	m, _, err := c.Exchange(new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA), w.at(53))
	if err == nil && len(m.Answer) != 1 {
		err = fmt.Errorf("%s", m)
	}
	return err
}

// client is one of the Ingress; kept: with connections that it keeps.
func (w *world) client(kept bool) *http.Client {
	tr := &http.Transport{
		DisableKeepAlives: !kept, TLSClientConfig: &tls.Config{RootCAs: w.roots}, ForceAttemptHTTP2: kept,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(w.ip.String(), port))
		},
	}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func get(c *http.Client, url string) error {
	res, err := c.Get(url)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && string(body) != "hello\n" {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	return err
}

// load asks in all ways, over and over.
type load struct {
	stop  func()
	asked []*atomic.Int64
	mu    sync.Mutex
	lost  []error
}

func (w *world) load() *load {
	l := &load{}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for what, ask := range w.asking() {
		n := &atomic.Int64{}
		l.asked = append(l.asked, n)
		all.Go(func() {
			for ctx.Err() == nil {
				if err := ask(); err != nil {
					l.mu.Lock()
					l.lost = append(l.lost, fmt.Errorf("%s, after %d: %w", what, n.Load(), err))
					l.mu.Unlock()
				}
				n.Add(1)
			}
		})
	}
	l.stop = sync.OnceFunc(func() { cancel(); all.Wait() })
	w.t.Cleanup(l.stop)
	return l
}

// asking are the ways to ask.
func (w *world) asking() map[string]func() error {
	fresh, kept, h2 := w.client(false), w.client(true), w.client(true)
	return map[string]func() error{
		"DNS by UDP":                      func() error { return w.query("udp") },
		"DNS by TCP":                      func() error { return w.query("tcp") },
		"HTTP, a connection each":         func() error { return get(fresh, "http://web.example/") },
		"HTTP, connections that are kept": func() error { return get(kept, "http://web.example/") },
		"HTTP/2":                          func() error { return get(h2, "https://web.example/") },
	}
}

// goOn waits until each way was asked some times more.
func (l *load) goOn(w *world, times int64) {
	w.t.Helper()
	targets := make([]int64, len(l.asked))
	for i, n := range l.asked {
		targets[i] = n.Load() + times
	}
	w.until("requests", func() error {
		for i, n := range l.asked {
			if n.Load() < targets[i] {
				return errors.New("too few")
			}
		}
		return nil
	})
}

// well fails the test if something was lost.
func (l *load) well(w *world, when string) {
	w.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	total := int64(0)
	for _, n := range l.asked {
		total += n.Load()
	}
	w.t.Logf("%s: %d of %d lost", when, len(l.lost), total)
	if len(l.lost) > 0 {
		w.t.Errorf("%s: the first: %v\n%s", when, l.lost[0], w.said)
	}
	l.lost = nil
}

// TestOutlives: nothing is lost while there is no agent, while one starts, and while a process
// with another configuration takes over; what is under way ends where it began.
func TestOutlives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start()
	w.set()
	for what, ask := range w.asking() {
		w.until(what, ask)
	}
	l := w.load()
	l.goOn(w, 20)
	first := w.pid()
	w.stop()
	l.goOn(w, 20)
	w.start()
	w.set()
	l.goOn(w, 20)
	if pid := w.pid(); pid != first {
		t.Errorf("the process is another one: %d, was %d", pid, first)
	}
	l.well(w, "a restart of the agent")

	slow, err := w.client(true).Get("http://web.example/slow")
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Body.Close()
	talk := w.talk()
	for range 3 {
		before := w.pid()
		if _, err := w.keeper.Gather(); err != nil { // by a connection that stays
			t.Error(err)
		}
		w.stop()
		w.cfg.Config.Level-- // any other configuration
		w.start()
		w.set()
		w.until("a successor", func() error {
			if w.pid() == before {
				return errors.New("there is none")
			}
			return nil
		})
		l.goOn(w, 20)
	}
	l.well(w, "three successors")
	talk("still here")
	w.end()
	if body, err := io.ReadAll(slow.Body); err != nil || string(body) != "begun\nended\n" {
		t.Errorf("a response that was under way: %q, %v", body, err)
	}
	talk("")
	w.until("predecessors", func() error {
		if pids, err := processes(w.cfg.Dir); err != nil || len(pids) != 1 {
			return fmt.Errorf("%v, %v", pids, err)
		}
		return nil
	})
	l.goOn(w, 20)
	l.stop()
	l.well(w, "the end of predecessors")
}

// TestPorts: a successor listens where its configuration says, and nowhere else; HTTP/3, whose
// connections it cannot take over, is served again after a while, and nobody is alarmed. What
// ends the servers ends those that have a successor, too.
func TestPorts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start()
	w.set()
	quic := &http3.Transport{TLSClientConfig: &tls.Config{RootCAs: w.roots, ServerName: "web.example"}}
	defer quic.Close()
	client := &http.Client{Transport: quic, Timeout: 2 * time.Second}
	ask := func() error {
		req, err := http.NewRequest(http.MethodGet, "https://"+w.at(443)+"/", nil)
		if err != nil {
			return err
		}
		req.Host = "web.example"
		res, err := client.Do(req)
		if err == nil {
			res.Body.Close()
		}
		return err
	}
	w.until("HTTP/3", ask)
	slow, err := w.client(true).Get("http://web.example/slow")
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Body.Close()
	defer w.end()
	before := w.pid()
	w.stop()
	in := *w.cfg.Config.Ingress
	in.HTTP = w.at(8080)
	w.cfg.Config.Ingress = &in
	w.start()
	w.set()
	w.until("another port", func() error {
		conn, err := net.Dial("tcp", w.at(8080))
		if err == nil {
			conn.Close()
		}
		return err
	})
	w.until("the port of before is closed", func() error { // by its process, once the successor listens
		conn, err := net.Dial("tcp", w.at(80))
		if errors.Is(err, unix.ECONNREFUSED) {
			return nil
		}
		if err == nil {
			conn.Close()
		}
		return fmt.Errorf("dial: %v", err)
	})
	begun := time.Now()
	w.until("the successor's HTTP/3", func() error {
		families, err := w.keeper.Gather()
		for _, f := range families {
			for _, m := range f.Metric {
				if f.GetName() == "decree_ingress_listening" && m.Label[0].GetValue() == "http3" && m.Gauge.GetValue() == 1 {
					return nil
				}
			}
		}
		return errors.Join(err, errors.New("it does not listen"))
	})
	w.until("HTTP/3", ask)
	t.Logf("HTTP/3 is back after %s", time.Since(begun).Round(time.Millisecond))
	if said := w.said.String(); strings.Contains(said, "does not listen") {
		t.Errorf("what is expected alarms people: %s", said)
	}
	if pids, err := processes(w.cfg.Dir); err != nil || len(pids) != 2 || pids[0] != before {
		t.Fatalf("with a response under way there are %v, %v; want %d and another one", pids, err, before)
	}
	if err := Stop(t.Context(), w.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	w.stop()
	if pids, err := processes(w.cfg.Dir); err != nil || slices.Contains(pids, before) {
		t.Errorf("after Stop there are %v, %v", pids, err)
	}
}

// TestAsked: a process that is asked to end does so, whatever is under way.
func TestAsked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start()
	w.set()
	w.until("HTTP", func() error {
		res, err := w.client(false).Get("http://web.example/")
		if err == nil {
			res.Body.Close()
		}
		return err
	})
	slow, err := w.client(true).Get("http://web.example/slow")
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Body.Close()
	defer w.end()
	pid := w.pid()
	if err := end(t.Context(), pid, unix.SIGTERM); err != nil { // it waits for that, up to five seconds
		t.Fatal(err)
	}
	if pids, err := processes(w.cfg.Dir); err != nil || slices.Contains(pids, pid) {
		t.Errorf("of %d, which was asked to end, and its successors there are %v, %v", pid, pids, err)
	}
}

// TestProgramElsewhere: a program takes over that lies where only its owner may look, such as in
// the home of a user.
func TestProgramElsewhere(t *testing.T) {
	if os.Getenv(inner) != "" {
		t.Skip("this is the program")
	}
	if os.Geteuid() != 0 {
		t.Skip("files of others are for root")
	}
	t.Parallel()
	dir, err := os.MkdirTemp("", "home")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "front.test")
	if err := errors.Join(os.WriteFile(program, data, 0o755), os.Chown(dir, 65534, 65534), os.Chmod(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run=^TestPorts$", "-test.v")
	cmd.Env = append(os.Environ(), inner+"=1")
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestPorts")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// talk opens a connection that is no HTTP any more, and returns a function that says a line
// there; an empty one ends it.
func (w *world) talk() func(line string) {
	conn, err := net.Dial("tcp", w.at(80))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	_, _ = io.WriteString(conn, "GET /talk HTTP/1.1\r\nHost: web.example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		w.t.Fatalf("%v, %v", res, err)
	}
	return func(line string) {
		w.t.Helper()
		if line == "" {
			conn.Close()
			return
		}
		_, _ = io.WriteString(conn, line+"\n")
		if got, err := in.ReadString('\n'); err != nil || got != line+"\n" {
			w.t.Errorf("over a connection of another protocol: %q, %v", got, err)
		}
	}
}

// TestKilled: a process that dies or hangs is replaced, and knows what to serve.
func TestKilled(t *testing.T) {
	t.Parallel()
	for _, signal := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.start()
			w.set()
			w.until("DNS", func() error { return w.query("udp") })
			pid := w.pid()
			if signal == unix.SIGSTOP {
				w.stop() // an agent that starts finds it
			}
			if err := unix.Kill(pid, signal); err != nil {
				t.Fatal(err)
			}
			if signal == unix.SIGSTOP {
				w.until("the signal", func() error {
					stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
					if err == nil && !bytes.Contains(stat, []byte(") T ")) {
						err = fmt.Errorf("%s", stat)
					}
					return err
				})
				w.start()
				w.set()
			}
			w.until("another process", func() error {
				if pids, err := processes(w.cfg.Dir); err != nil || len(pids) != 1 || pids[0] == pid {
					return fmt.Errorf("%v, %v", pids, err)
				}
				return nil
			})
			for what, ask := range w.asking() {
				w.until(what, ask)
			}
		})
	}
}

// TestNoSuccessor: where a successor cannot begin, who is there goes on, and hears of changes.
func TestNoSuccessor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start()
	w.set()
	w.until("DNS", func() error { return w.query("udp") })
	before := w.pid()
	w.stop()
	logs := filepath.Join(filepath.Dir(w.cfg.Dir), "logs")
	if err := os.Mkdir(logs, 0o700); err != nil {
		t.Fatal(err)
	}
	in := *w.cfg.Config.Ingress
	in.AccessLog = filepath.Join(logs, "access.log")
	w.cfg.Config.Ingress = &in
	k, err := NewKeeper(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := os.RemoveAll(logs); err != nil {
		t.Fatal(err)
	}
	w.objects.Services = slices.Clone(w.objects.Services)
	w.objects.Services = append(w.objects.Services, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "x"}, Spec: corev1.ServiceSpec{ClusterIP: "10.97.0.81"}})
	if err := k.Set(t.Context(), w.objects); err != nil {
		t.Fatal(err)
	}
	if said := w.said.String(); !strings.Contains(said, "go on as they were") || !strings.Contains(said, "access log of Ingresses") {
		t.Errorf("it is not told why: %s", said)
	}
	if pids, err := processes(w.cfg.Dir); err != nil || len(pids) != 1 || pids[0] != before {
		t.Errorf("processes %v, %v; want %d", pids, err, before)
	}
	m, _, err := new(dns.Client).Exchange(new(dns.Msg).SetQuestion("x.default.svc.cluster.local.", dns.TypeA), w.at(53))
	if err != nil || len(m.Answer) != 1 {
		t.Errorf("a change: %v, %v", m, err)
	}
	if _, err := NewKeeper(w.cfg); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a configuration that cannot work is taken: %v", err)
	}
}

// TestProcess: the process has no rights but those to its ports and to files, tells its metrics, says what
// happens in the agent's log, and ends with Stop.
func TestProcess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	busy, err := net.Listen("tcp", w.at(80))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Dir(w.cfg.LogFile), nil, 0o600); err != nil { // no folder for a log
		t.Fatal(err)
	}
	w.start()
	w.set()
	w.until("DNS", func() error { return w.query("udp") })
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.pid()))
	if err != nil {
		t.Fatal(err)
	}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "1"}) {
		status = nil // see confine
	}
	for _, line := range []string{"CapInh:\t0000000000000000", "CapPrm:\t0000000000000402", "CapEff:\t0000000000000402", "CapBnd:\t0000000000000402", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1"} {
		if status != nil && !bytes.Contains(status, []byte(line+"\n")) {
			t.Errorf("no %q in\n%s", line, status)
		}
	}
	w.until("a line in the agent's log", func() error {
		if said := w.said.String(); !strings.Contains(said, "ingress does not listen") || !strings.Contains(said, "part=ingress") || !strings.Contains(said, "address already in use") {
			return errors.New(said)
		}
		return nil
	})
	families, err := w.keeper.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
	}
	for _, want := range []string{"decree_dns_queries_total", "decree_ingress_listening", "decree_front_process_resident_memory_bytes"} {
		if !slices.Contains(names, want) {
			t.Errorf("no metric %s in %v", want, names)
		}
	}
	w.stop()
	busy.Close()
	w.until("HTTP", func() error { return get(w.client(false), "http://web.example/") })
	if err := Stop(t.Context(), w.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if pids, err := processes(w.cfg.Dir); err != nil || len(pids) > 0 {
		t.Errorf("after Stop there are %v, %v", pids, err)
	}
	if families, err := w.keeper.Gather(); err != nil || len(families) > 0 {
		t.Errorf("metrics of nobody: %v, %v", families, err)
	}
}

// BenchmarkSet tells a process of 30,000 services with three endpoints each: all of them to a
// new process, and one that changes.
func BenchmarkSet(b *testing.B) {
	dir, err := os.MkdirTemp("", "front")
	if err != nil {
		b.Fatal(err)
	}
	cfg := KeeperConfig{Dir: filepath.Join(dir, "run"), LogFile: filepath.Join(dir, "front.log"), Log: slog.New(slog.DiscardHandler), Config: Config{Level: slog.LevelError}}
	defer func() {
		if err := errors.Join(Stop(context.Background(), cfg.Dir), os.RemoveAll(dir)); err != nil {
			b.Error(err)
		}
	}()
	port := int32(8080)
	slice := func(i, round int) *discoveryv1.EndpointSlice {
		s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("s%05d-1", i), Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("s%05d", i)}}, AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port}}}
		for j := range 3 {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{netip.AddrFrom4([4]byte{10, byte(round), byte(i >> 6), byte(i<<2 + j)}).String()}})
		}
		return s
	}
	var o Objects
	o.Node, o.Domain = "n1", "cluster.local"
	for i := range 30_000 {
		o.Services = append(o.Services, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("s%05d", i)}, Spec: corev1.ServiceSpec{ClusterIP: netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}).String(), Ports: []corev1.ServicePort{{Port: 80}}}})
		o.Slices = append(o.Slices, slice(i, 1))
	}
	keeper := func() *Keeper {
		k, err := NewKeeper(cfg)
		if err != nil {
			b.Fatal(err)
		}
		return k
	}
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			k := keeper()
			if err := k.Set(b.Context(), o); err != nil {
				b.Fatal(err)
			}
			k.Close()
		}
	})
	b.Run("one", func(b *testing.B) {
		k := keeper()
		defer k.Close()
		for i := 0; b.Loop(); i++ {
			o.Slices = slices.Clone(o.Slices)
			o.Slices[i%30_000] = slice(i%30_000, 2+i%200)
			if err := k.Set(b.Context(), o); err != nil {
				b.Fatal(err)
			}
		}
	})
	if pids, err := processes(cfg.Dir); err == nil && len(pids) == 1 {
		if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0])); err == nil {
			for line := range strings.Lines(string(status)) {
				if strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "RssAnon") {
					b.Log(strings.TrimSpace(line))
				}
			}
		}
	}
}

// TestRetired: a process that has a successor takes nothing more, and begets no second one.
func TestRetired(t *testing.T) {
	p := &process{retired: true}
	if err := p.set(delta{To: "x"}); !errors.Is(err, errRetired) {
		t.Errorf("it is taken: %v", err)
	}
	w := httptest.NewRecorder()
	if p.succeed(w, httptest.NewRequest(http.MethodPost, "/successor", strings.NewReader("{}"))); w.Code != http.StatusConflict {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// TestLeft: what a predecessor leaves and nobody serves is closed, or clients would wait there.
func TestLeft(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := ln.Addr().String()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err := errors.Join(err, f.Close(), ln.Close()); err != nil {
		t.Fatal(err)
	}
	sockets := &Sockets{}
	sockets.inherit([]string{socketKey("tcp", at)}, []int{fd})
	s, err := New(Config{Ingress: &Ingress{HTTP: at}}, sockets, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatalf("the socket is not left: %v", err)
	}
	conn.Close()
	s.Set(Objects{})
	if conn, err := net.Dial("tcp", at); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a port that nobody serves: %v, %v", conn, err)
	}
}

// TestAddresses: DNS may have an address that the node is about to get; one that an operator
// mistyped is refused.
func TestAddresses(t *testing.T) {
	s := &Sockets{}
	const nobodys = "192.0.2.99:0"
	ln, err := s.Listen(t.Context(), "tcp", nobodys)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if ln, err := s.ListenHere(t.Context(), "tcp", nobodys); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("%v, %v", ln, err)
	}
}
