package ingress

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/websocket"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/netplane/ingress/route"
	"decree.dev/decree/schemas/api"
)

// TestProtocols asks by every version of HTTP for the same page.
func TestProtocols(t *testing.T) {
	w := newWorld(t, Config{}, func(w *world) {
		w.service("web", backend(t, "one").URL)
		w.secure(w.ingress("web.example", "web", "ssl-redirect", "false"), "web.example")
	})
	three := &http3.Transport{TLSClientConfig: &tls.Config{RootCAs: w.roots, ServerName: "web.example"}}
	defer three.Close()
	port := w.https[strings.LastIndexByte(w.https, ':'):]
	for name, tt := range map[string]struct {
		client *http.Client
		url    string
		proto  string
	}{
		"1.1":          {w.client(nil), "http://web.example", "HTTP/1.1"},
		"2 clear":      {w.client(func(t *http.Transport) { *t.Protocols = http.Protocols{}; t.Protocols.SetUnencryptedHTTP2(true) }), "http://web.example", "HTTP/2.0"},
		"1.1 with TLS": {w.client(nil), "https://web.example", "HTTP/1.1"},
		"2":            {w.client(func(t *http.Transport) { t.Protocols.SetHTTP2(true) }), "https://web.example", "HTTP/2.0"},
		"3":            {&http.Client{Transport: three}, "https://127.0.0.1" + port, "HTTP/3.0"},
	} {
		req, _ := http.NewRequestWithContext(t.Context(), "POST", tt.url+"/a?b=c", strings.NewReader("body"))
		req.Host = "web.example"
		res, err := tt.client.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		code, body := read(t, res)
		if code != 200 || body != `one POST web.example /a?b=c "body"` || res.Proto != tt.proto {
			t.Errorf("%s: %s %d %s", name, res.Proto, code, body)
		}
		want := ""
		if strings.HasPrefix(tt.url, "https") && name != "3" {
			want = `h3="` + port + `"; ma=86400`
		}
		if got := res.Header.Get("Alt-Svc"); got != want {
			t.Errorf("%s: Alt-Svc %q, want %q", name, got, want)
		}
	}
	if n := w.metric("decree_ingress_requests_total", "namespace=shop", "ingress=web", "code=2xx"); n != 5 {
		t.Errorf("%v requests counted", n)
	}
}

// TestHeaders: backends learn where a request is from, and not what a client says about
// that; what is for the connection stays on it.
func TestHeaders(t *testing.T) {
	var got http.Header
	app := serving(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Clone()
		w.Header().Set("Keep-Alive", "timeout=1")
		w.Header().Set("X-App", "yes")
		w.WriteHeader(http.StatusTeapot)
	})
	w := newWorld(t, Config{}, func(w *world) { w.service("web", app.URL); w.ingress("", "web") })
	req, _ := http.NewRequest("GET", "http://Any.Example:80/", nil)
	for _, h := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-Ip", "X-Hop", "Proxy-Connection", "Te", "Upgrade"} {
		req.Header.Set(h, "forged")
	}
	req.Header.Set("Connection", "X-Hop, close")
	req.Header.Set("X-Kept", "kept")
	req.Header.Set("User-Agent", "")
	res, err := w.client(nil).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if code, _ := read(t, res); code != http.StatusTeapot || res.Header.Get("X-App") != "yes" || res.Header.Get("Keep-Alive") != "" {
		t.Errorf("%d %v", code, res.Header)
	}
	want := http.Header{"X-Forwarded-For": {"127.0.0.1"}, "X-Forwarded-Host": {"Any.Example:80"}, "X-Forwarded-Proto": {"http"}, "X-Real-Ip": {"127.0.0.1"}, "X-Kept": {"kept"}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the backend got %v, want %v", got, want)
	}
}

// TestAnswers are those that the proxy gives itself.
func TestAnswers(t *testing.T) {
	slow := serving(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	cut := serving(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	web := backend(t, "web")
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	w := newWorld(t, Config{}, func(w *world) {
		w.service("web", web.URL)
		w.service("idle")
		w.service("slow", slow.URL)
		w.service("cut", cut.URL)
		w.service("dead", dead.Addr().String())
		w.service("strict", web.URL)
		w.service("moved", web.URL)
		w.service("alias")
		alias := w.objects.Services[len(w.objects.Services)-1]
		alias.Spec.Type, alias.Spec.ExternalName = corev1.ServiceTypeExternalName, "localhost"
		for _, name := range []string{"idle", "cut", "dead", "absent", "alias"} {
			w.ingress(name+".example", name)
		}
		w.ingress("slow.example", "slow", "timeout", "100ms")
		w.ingress("strict.example", "strict", "max-body-size", "10")
		w.ingress("moved.example", "moved", "rewrite-prefix", "/new").Spec.Rules[0].HTTP.Paths[0].Path = "/old"
		w.secure(w.ingress("tls.example", "web"), "tls.example")
	})
	c := w.client(nil)
	for _, tt := range []struct {
		url  string
		code int
		body string
	}{
		{"http://other.example/", 404, "no ingress has a rule"},
		{"http://idle.example/", 503, "no ready endpoint"},
		{"http://absent.example/", 503, "the backend does not exist"},
		{"http://slow.example/", 504, "in time"},
		{"http://cut.example/", 502, "did not respond"},
		{"http://dead.example/", 502, "did not respond"},
		{"http://alias.example/", 502, "did not respond"}, // this node's own servers are not for users
		{"http://tls.example/a?b", 308, ""},
		{"https://tls.example/a?b", 200, `web GET tls.example /a?b ""`},
		{"http://strict.example/..%2fx", 400, "not one that clients send"},
		{"http://strict.example/a/%2e%2e/x", 400, "not one that clients send"},
		{"http://strict.example/a..b/..c/.d", 200, "/a..b/..c/.d"},
		{"http://moved.example/old/a%2Fb?c", 200, `/new/a%2Fb?c`},
	} {
		if code, body := w.get(c, tt.url); code != tt.code || !strings.Contains(body, tt.body) {
			t.Errorf("%s: %d %s", tt.url, code, body)
		}
	}
	res, err := c.Get("http://tls.example/a?b")
	if err != nil {
		t.Fatal(err)
	}
	read(t, res)
	if got, want := res.Header.Get("Location"), "https://tls.example"+w.https[strings.LastIndexByte(w.https, ':'):]+"/a?b"; got != want {
		t.Errorf("redirected to %s, want %s", got, want)
	}
	for body, want := range map[string]int{"0123456789": 200, "0123456789a": 413} {
		for _, chunked := range []bool{false, true} {
			var r io.Reader = strings.NewReader(body)
			if chunked {
				r = io.MultiReader(r)
			}
			res, err := c.Post("http://strict.example/", "text/plain", r)
			if err != nil {
				t.Fatal(err)
			}
			if code, text := read(t, res); code != want {
				t.Errorf("%s chunked %v: %d %s", body, chunked, code, text)
			}
		}
	}
	if _, err := c.Get("https://other.example/"); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("a name without a certificate: %v", err)
	}
	if n := w.metric("decree_ingress_upstream_errors_total"); n != 6 { // alias, dead, cut, slow, idle, and the body that grew
		t.Errorf("%v errors of backends counted", n)
	}
	if n := w.metric("decree_ingress_unrouted_total"); n != 3 {
		t.Errorf("%v requests without a rule counted", n)
	}
	if n := w.metric("decree_ingress_certificate_expiry_seconds", "secret=web"); time.Until(time.Unix(int64(n), 0)).Round(time.Hour) != time.Hour {
		t.Errorf("the certificate ends at %v", n)
	}
}

// TestRetries: what was not sent, or may be sent twice, finds another endpoint.
func TestRetries(t *testing.T) {
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	var mu sync.Mutex
	asked := map[string]int{}
	cut := serving(t, func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked[r.Method]++
		mu.Unlock()
		panic(http.ErrAbortHandler)
	})
	web := backend(t, "web")
	times := func(method string) int { // since it was last asked
		mu.Lock()
		defer mu.Unlock()
		n := asked[method]
		clear(asked)
		return n
	}
	w := newWorld(t, Config{}, func(w *world) {
		w.service("dead", dead.Addr().String(), web.URL)
		w.service("cut", cut.URL, web.URL)
		w.service("never", cut.URL)
		w.ingress("dead.example", "dead")
		w.ingress("cut.example", "cut")
		w.ingress("never.example", "never", "retries", "0")
	})
	c := w.client(nil)
	for range 50 {
		for _, method := range []string{"GET", "POST"} {
			req, _ := http.NewRequest(method, "http://dead.example/", strings.NewReader("body"))
			res, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if code, body := read(t, res); code != 200 || !strings.HasSuffix(body, `"body"`) {
				t.Fatalf("%s beside a dead endpoint: %d %s", method, code, body)
			}
		}
		if code, body := w.get(c, "http://cut.example/"); code != 200 {
			t.Fatalf("beside an endpoint that ends connections: %d %s", code, body)
		}
	}
	if times("GET") == 0 {
		t.Fatal("nobody asked the broken endpoint")
	}
	failed := 0
	for range 50 {
		res, err := c.Post("http://cut.example/", "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		if code, _ := read(t, res); code == 502 {
			failed++
		}
	}
	if tries := times("POST"); failed == 0 || failed != tries {
		t.Errorf("%d of 50 failed, and the broken endpoint was asked %d times: what is not idempotent was sent twice", failed, tries)
	}
	if code, _ := w.get(c, "http://never.example/"); code != 502 {
		t.Errorf("without retries: %d", code)
	}
	if tries := times("GET"); tries != 1 {
		t.Errorf("without retries: %d tries", tries)
	}
}

// TestWebSocket sends messages both ways.
func TestWebSocket(t *testing.T) {
	app := serving(t, websocket.Handler(func(c *websocket.Conn) { _, _ = io.Copy(c, c) }).ServeHTTP)
	w := newWorld(t, Config{}, func(w *world) {
		w.service("web", app.URL)
		w.secure(w.ingress("ws.example", "web", "ssl-redirect", "false"), "ws.example")
	})
	for scheme, address := range map[string]string{"ws": w.http, "wss": w.https} {
		cfg, err := websocket.NewConfig(scheme+"://ws.example/", "http://ws.example")
		if err != nil {
			t.Fatal(err)
		}
		raw, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		if scheme == "wss" {
			raw = tls.Client(raw, &tls.Config{RootCAs: w.roots, ServerName: "ws.example", NextProtos: []string{"http/1.1"}})
		}
		c, err := websocket.NewClient(cfg, raw)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			var echo string
			if err := websocket.Message.Send(c, fmt.Sprint("message ", i)); err != nil {
				t.Fatal(err)
			}
			if err := websocket.Message.Receive(c, &echo); err != nil || echo != fmt.Sprint("message ", i) {
				t.Fatalf("%q, %v", echo, err)
			}
		}
		if n := (*w.pools[w.now.Load().Backends[0].BackendKey].endpoints.Load())[0].underWay.Load(); n != 1 {
			t.Errorf("%s: %d requests under way", scheme, n)
		}
		c.Close()
	}
}

// TestLimits: one client cannot have more than its share.
func TestLimits(t *testing.T) {
	hold, begun := make(chan struct{}), make(chan struct{}, 2)
	slow := serving(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			begun <- struct{}{}
			<-hold
		}
	})
	w := newWorld(t, Config{}, func(w *world) {
		w.service("rps", slow.URL)
		w.service("few", slow.URL)
		w.ingress("rps.example", "rps", "limit-rps", "5")
		w.ingress("few.example", "few", "limit-connections", "2")
	})
	c := w.client(nil)
	codes := map[int]int{}
	for range 50 {
		code, _ := w.get(c, "http://rps.example/")
		codes[code]++
	}
	if codes[200] < 5 || codes[200] > 10 || codes[429] != 50-codes[200] {
		t.Errorf("5 a second: %v", codes)
	}
	var held sync.WaitGroup
	for range 2 {
		held.Go(func() {
			if code, _ := w.get(c, "http://few.example/slow"); code != 200 {
				t.Errorf("within the limit: %d", code)
			}
		})
	}
	<-begun
	<-begun
	few := func() int { code, _ := w.get(c, "http://few.example/"); return code }
	if code := few(); code != 429 {
		t.Errorf("with two under way: %d", code)
	}
	close(hold)
	held.Wait()
	if code := few(); code != 200 {
		t.Errorf("with nothing under way: %d", code)
	}
}

// TestSweep: clients are forgotten once they are within their limits, and not before.
func TestSweep(t *testing.T) {
	l := newLimits(&route.Ingress{IngressOptions: api.IngressOptions{RPS: 1, Connections: 1}})
	now := time.Unix(1e9, 0)
	here, there, same := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	_, leave := l.enter(here, now)
	if ok, _ := l.enter(here, now); ok || leave == nil {
		t.Error("the limit of connections has no effect")
	}
	if ok, done := l.enter(there, now); !ok {
		t.Error("one client counts for another")
	} else {
		done()
	}
	if ok, _ := l.enter(same, now); ok {
		t.Error("a client has more than one network")
	}
	l.enter(netip.MustParseAddr("10.0.0.2"), now.Add(time.Hour))
	if len(l.clients) != 2 || l.clients[here] == nil {
		t.Errorf("%d clients are known, want the one with a request under way and the last one", len(l.clients))
	}
	leave()
	if ok, _ := l.enter(here, now.Add(2*time.Hour)); !ok || l.clients[here].underWay != 1 {
		t.Error("a request that has ended still counts")
	}
}

// TestSmuggling: what another server might read as two requests reaches the backend as one.
func TestSmuggling(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	app := serving(t, func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, fmt.Sprintf("%s %s %q %v", r.Method, r.URL.Path, body, r.Header["Transfer-Encoding"]))
	})
	w := newWorld(t, Config{}, func(w *world) { w.service("web", app.URL); w.ingress("a", "web") })
	const inner = "GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, tt := range map[string]struct{ raw, code, want string }{
		"CL.TE":           {"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\nG", "200", `[POST /1 "" []]`},
		"two lengths":     {"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 36\r\n\r\n" + inner, "400", "[]"},
		"TE.TE":           {"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", "501", "[]"},
		"odd TE":          {"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "501", "[]"},
		"space before TE": {"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\nConnection: close\r\n\r\n0\r\n\r\n", "400", "[]"},
		"folded":          {"POST /1 HTTP/1.1\r\nHost: a\r\nX: b\r\n Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n", "200", `[POST /1 "" []]`},
		"plus in length":  {"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\n" + inner, "400", "[]"},
		"bad chunk":       {"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0x1\r\na\r\n0\r\n\r\n" + inner, "", "[]"},
		"two hosts":       {"GET /1 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400", "[]"},
		"no host":         {"GET /1 HTTP/1.1\r\n\r\n", "400", "[]"},
		"large headers":   {"GET /1 HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 80<<10) + "\r\n\r\n", "431", "[]"},
		"proxy":           {"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", "400", "[]"},
		"line in path":    {"GET /1%0d%0aX:y HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "200", "[GET /1\r\nX:y \"\" []]"},
	} {
		seen = nil
		c, err := net.Dial("tcp", w.http)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = io.WriteString(c, tt.raw)
		answer, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v after %q", name, err, answer)
		}
		c.Close()
		if !strings.HasPrefix(string(answer), strings.TrimRight("HTTP/1.1 "+tt.code, " ")) || strings.Count(string(answer), "HTTP/1.1 200") > 1 {
			t.Errorf("%s: answered %.200q, want %s", name, answer, tt.code)
		}
		mu.Lock()
		if fmt.Sprint(seen) != tt.want && tt.code != "" || strings.Contains(fmt.Sprint(seen), "evil") {
			t.Errorf("%s: the backend saw %v, want %s", name, seen, tt.want)
		}
		mu.Unlock()
	}
}

// TestPorts: they are open while there is something to serve; one that another process has
// is got when it is free.
func TestPorts(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	var log syncBuffer
	events := make(chan string, 16)
	s, err := New(Config{HTTP: taken.Addr().String(), HTTPS: "127.0.0.1:0", Log: slog.New(slog.NewTextHandler(&log, nil)), Listen: func(ctx context.Context, network, address string) (net.Listener, error) {
		ln, err := (&net.ListenConfig{}).Listen(ctx, network, address)
		events <- fmt.Sprint("open ", address, " ", err == nil)
		if err != nil {
			return nil, err
		}
		return &told{ln, address, events}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	w := &world{Server: s, t: t}
	w.service("web", backend(t, "web").URL)
	w.ingress("", "web")
	s.Set(w.objects)
	await := func(want string) {
		t.Helper()
		for {
			select {
			case got := <-events:
				if got == want {
					return
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("not seen: %s\n%s", want, log.String())
			}
		}
	}
	await("open " + s.cfg.HTTP + " false")
	await("open 127.0.0.1:0 true")
	taken.Close()
	await("open " + s.cfg.HTTP + " true")
	s.Set(w.objects)
	w.objects.Ingresses = nil
	s.Set(w.objects)
	await("close " + s.cfg.HTTP)
	await("close 127.0.0.1:0")
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Run ended with %v", err)
	}
	if n := strings.Count(log.String(), "ingress does not listen"); n != 1 {
		t.Errorf("a port that is taken was reported %d times:\n%s", n, log.String())
	}
}

type told struct {
	net.Listener
	address string
	events  chan string
}

func (l *told) Close() error {
	err := l.Listener.Close()
	if err == nil {
		l.events <- "close " + l.address
	}
	return err
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestAccessLog has a line for every request.
func TestAccessLog(t *testing.T) {
	var log syncBuffer
	web := backend(t, "web")
	w := newWorld(t, Config{AccessLog: &log}, func(w *world) { w.service("web", web.URL); w.ingress("a.example", "web") })
	c := w.client(nil)
	w.get(c, "http://a.example/x?y")
	w.get(c, "http://b.example/\"\n"[:17])
	c.CloseIdleConnections()
	w.stop()
	var lines []map[string]any
	for line := range strings.Lines(log.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		lines = append(lines, m)
	}
	if len(lines) != 2 {
		t.Fatalf("%d lines:\n%s", len(lines), log.String())
	}
	for k, want := range map[string]any{"status": 200.0, "host": "a.example", "uri": "/x?y", "method": "GET", "ingress": "shop/web", "service": "web", "endpoint": strings.TrimPrefix(web.URL, "http://"), "client": "127.0.0.1"} {
		if got := lines[0][k]; got != want {
			t.Errorf("%s: %v, want %v", k, got, want)
		}
	}
	if lines[1]["status"] != 404.0 || lines[1]["failure"] == nil {
		t.Errorf("%v", lines[1])
	}
}

// TestWarnings are logged once, and go with their ingress; so do its series.
func TestWarnings(t *testing.T) {
	var log syncBuffer
	w := newWorld(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))}, func(w *world) {
		w.service("web", backend(t, "web").URL)
		w.ingress("a.example", "web").Spec.TLS = []networkingv1.IngressTLS{{Hosts: []string{"a.example"}, SecretName: "absent"}}
		w.ingress("b.example", "web").Name = "other"
	})
	w.Set(w.objects)
	if n := strings.Count(log.String(), "there is no secret"); n != 1 || w.metric("decree_ingress_warnings") != 1 {
		t.Errorf("warned %d times:\n%s", n, log.String())
	}
	w.get(w.client(nil), "http://b.example/")
	if w.metric("decree_ingress_requests_total", "ingress=other", "code=2xx") != 1 {
		t.Error("the request is not counted")
	}
	w.objects.Ingresses = slices.DeleteFunc(w.objects.Ingresses, func(o *networkingv1.Ingress) bool { return o.Name == "other" })
	w.Set(w.objects)
	if w.metric("decree_ingress_request_seconds", "ingress=other") != 0 {
		t.Error("the series of an ingress that is gone are there")
	}
}
