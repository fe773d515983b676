package healthcheck

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"decree.dev/decree/netplane/render"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a Server whose ports are others on loopback.
type lab struct {
	*Server
	addrs  map[uint16]string
	opened map[uint16]int
}

func newLab(t *testing.T) *lab {
	l := &lab{addrs: map[uint16]string{}, opened: map[uint16]int{}}
	l.Server = New(Config{Log: slog.New(slog.DiscardHandler), Listen: func(ctx context.Context, port uint16) (net.Listener, error) {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
		if err == nil {
			l.addrs[port] = ln.Addr().String()
			l.opened[port]++
		}
		return ln, err
	}})
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func (l *lab) set(t *testing.T, checks ...render.HealthCheck) {
	t.Helper()
	if err := l.Set(t.Context(), checks); err != nil {
		t.Fatal(err)
	}
}

// get asks on a connection of its own.
func (l *lab) get(t *testing.T, port uint16, method, path string) (*http.Response, string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+l.addrs[port]+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

func TestAnswers(t *testing.T) {
	l := newLab(t)
	l.set(t, render.HealthCheck{Namespace: "shop", Name: "web", Port: 30001, Endpoints: 2}, render.HealthCheck{Namespace: "shop", Name: "api", Port: 30002})
	for _, c := range []struct {
		port           uint16
		name           string
		endpoints, end int
	}{{30001, "web", 2, 200}, {30002, "api", 0, 503}} {
		for _, path := range []string{"/", "/healthz"} {
			res, body := l.get(t, c.port, "GET", path)
			want := fmt.Sprintf(`{"service":{"namespace":"shop","name":%q},"localEndpoints":%d,"serviceProxyHealthy":true}`, c.name, c.endpoints)
			if res.StatusCode != c.end || strings.TrimSpace(body) != want {
				t.Errorf("%s%s: %d %s, want %d %s", c.name, path, res.StatusCode, body, c.end, want)
			}
			for h, want := range map[string]string{"Content-Type": "application/json", "X-Content-Type-Options": "nosniff", "X-Load-Balancing-Endpoint-Weight": fmt.Sprint(c.endpoints)} {
				if got := res.Header.Get(h); got != want {
					t.Errorf("%s: header %s is %q, want %q", c.name, h, got, want)
				}
			}
		}
		if res, body := l.get(t, c.port, "HEAD", "/"); res.StatusCode != c.end || body != "" {
			t.Errorf("HEAD %s: %d %q", c.name, res.StatusCode, body)
		}
	}
}

// TestChanges: counts change without a new listener; what is not wanted any more is closed.
func TestChanges(t *testing.T) {
	l := newLab(t)
	check := render.HealthCheck{Namespace: "shop", Name: "web", Port: 30001}
	for _, n := range []int{0, 1, 0, 3} {
		check.Endpoints = n
		l.set(t, check)
		if res, _ := l.get(t, 30001, "GET", "/"); (res.StatusCode == 200) != (n > 0) {
			t.Errorf("%d endpoints: %d", n, res.StatusCode)
		}
	}
	check.Name = "other" // the port goes to another service
	l.set(t, check)
	if _, body := l.get(t, 30001, "GET", "/"); !strings.Contains(body, `"other"`) {
		t.Error(body)
	}
	if l.opened[30001] != 1 {
		t.Errorf("opened %d times", l.opened[30001])
	}
	l.set(t)
	if c, err := net.Dial("tcp", l.addrs[30001]); err == nil {
		c.Close()
		t.Error("the port of a service that is gone is open")
	}
	l.set(t, check)
	if res, _ := l.get(t, 30001, "GET", "/"); res.StatusCode != 200 {
		t.Errorf("opened again: %d", res.StatusCode)
	}
}

// TestTaken: a port in use does not keep the others from being served, and is tried again.
func TestTaken(t *testing.T) {
	taken, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(taken.Addr().(*net.TCPAddr).Port)
	s := New(Config{Log: slog.New(slog.DiscardHandler)})
	defer s.Close()
	check := []render.HealthCheck{{Namespace: "shop", Name: "web", Port: port, Endpoints: 1}}
	if err := s.Set(t.Context(), check); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("service shop/web on node port %d", port)) {
		t.Errorf("a port in use: %v", err)
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Set(t.Context(), check); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"127.0.0.1", "::1"} { // all addresses of the node
		l := &lab{addrs: map[uint16]string{port: net.JoinHostPort(host, fmt.Sprint(port))}}
		if res, _ := l.get(t, port, "GET", "/"); res.StatusCode != 200 {
			t.Errorf("%s: %d", host, res.StatusCode)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Set(t.Context(), check); !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestFailed: a listener that fails is opened again by the next Set.
func TestFailed(t *testing.T) {
	broken := errors.New("broken")
	var lns []*failing
	s := New(Config{Log: slog.New(slog.DiscardHandler), Listen: func(context.Context, uint16) (net.Listener, error) {
		lns = append(lns, &failing{err: broken, accepted: make(chan struct{})})
		return lns[len(lns)-1], nil
	}})
	defer s.Close()
	check := []render.HealthCheck{{Port: 30001}}
	for i := range 2 {
		if err := s.Set(t.Context(), check); err != nil {
			t.Fatal(err)
		}
		<-lns[i].accepted
		s.wg.Wait()
	}
	if len(lns) != 2 {
		t.Errorf("%d listeners", len(lns))
	}
}

type failing struct {
	err      error
	accepted chan struct{}
}

func (f *failing) Accept() (net.Conn, error) { close(f.accepted); return nil, f.err }
func (f *failing) Close() error              { return nil }
func (f *failing) Addr() net.Addr            { return &net.TCPAddr{} }
