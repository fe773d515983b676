package ingress

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"decree.dev/decree/netplane/ingress/route"
)

// app is a backend that ends as pods do: once nobody new is led to it, with grace.
type app struct {
	srv   *http.Server
	url   string
	ended chan struct{}
}

func newApp(t *testing.T, h http.Handler) *app {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := &app{srv: &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}, url: "http://" + ln.Addr().String(), ended: make(chan struct{})}
	go func() { defer close(a.ended); _ = a.srv.Serve(ln) }()
	return a
}

func (a *app) end() {
	_ = a.srv.Shutdown(context.Background())
	<-a.ended
}

// TestChurn streams requests while the endpoints change a thousand times, and the servers
// that are no longer wanted end: not one request is lost, whatever its method is.
func TestChurn(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if r.URL.Path == "/slow" { // goes on while its endpoint leaves
			_, _ = io.WriteString(w, "slow ")
			w.(http.Flusher).Flush()
			time.Sleep(5 * time.Millisecond)
		}
		_, _ = w.Write(body)
	})
	apps := []*app{newApp(t, handler), newApp(t, handler)}
	w := newWorld(t, Config{}, func(w *world) {
		w.service("web", apps[0].url, apps[1].url)
		w.secure(w.ingress("web.example", "web", "ssl-redirect", "false", "retries", "0"), "web.example")
	})
	one, two := w.client(func(t *http.Transport) { t.MaxIdleConnsPerHost = 8 }), w.client(func(t *http.Transport) { t.Protocols.SetHTTP2(true) })
	ctx, stop := context.WithCancel(t.Context())
	var clients, ending sync.WaitGroup
	progress := make(chan struct{})
	var served, lost atomic.Int64
	for n := range 8 {
		c, url := one, "http://web.example/"
		if n%2 == 1 {
			c, url = two, "https://web.example/"
		}
		if n%4 > 1 {
			url += "slow"
		}
		clients.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				want := fmt.Sprint(n, " ", i)
				res, err := c.Post(url, "text/plain", strings.NewReader(want))
				if err != nil {
					lost.Add(1)
					t.Errorf("lost: %v", err)
					continue
				}
				body, err := io.ReadAll(res.Body)
				res.Body.Close()
				if err != nil || res.StatusCode != 200 || !strings.HasSuffix(string(body), want) {
					lost.Add(1)
					t.Errorf("lost: %d %.100q %v", res.StatusCode, body, err)
					continue
				}
				served.Add(1)
				select {
				case progress <- struct{}{}:
				case <-ctx.Done():
				}
			}
		})
	}
	for range 1000 {
		if len(apps) < 4 && rand.IntN(2) == 0 || len(apps) == 1 {
			apps = append(apps, newApp(t, handler))
		} else {
			i := rand.IntN(len(apps))
			gone := apps[i]
			apps = append(apps[:i:i], apps[i+1:]...)
			defer gone.srv.Close()
			old := endpointOf(w, gone)
			ending.Go(func() {
				for !old.gone.Load() || old.underWay.Load() > 0 { // what the agent's lingering is for
					time.Sleep(time.Millisecond)
				}
				gone.end()
			})
		}
		var urls []string
		for _, a := range apps {
			urls = append(urls, a.url)
		}
		w.objects.Slices = endpoints("web", urls...)
		w.Set(w.objects)
		for range 3 {
			<-progress
		}
		if lost.Load() > 0 {
			break
		}
	}
	stop()
	clients.Wait()
	ending.Wait()
	for _, a := range apps {
		w.objects.Slices = nil
		w.Set(w.objects)
		a.end()
	}
	t.Logf("%d requests, %d lost", served.Load(), lost.Load())
	if served.Load() < 3000 {
		t.Errorf("only %d requests: the test proves little", served.Load())
	}
}

func endpointOf(w *world, a *app) *endpoint {
	for _, e := range *w.pools[w.now.Load().Backends[0].BackendKey].endpoints.Load() {
		if strings.HasSuffix(a.url, e.address) {
			return e
		}
	}
	w.t.Fatalf("no endpoint %s", a.url)
	return nil
}

// TestBalance: of two endpoints the one with less to do is asked.
func TestBalance(t *testing.T) {
	p := newPool(&route.Backend{}, nil)
	p.set(&route.Backend{Endpoints: []string{"a:1", "b:1"}})
	count := map[string]int{}
	for range 100 {
		count[p.pick(nil).address]++
	}
	if count["a:1"] != 50 {
		t.Errorf("100 requests that do not end: %v", count)
	}
	all := *p.endpoints.Load()
	for range 20 {
		all[0].leave()
	}
	for range 20 {
		if e := p.pick(nil); e != all[0] {
			t.Fatalf("%s is asked, which has more to do", e.address)
		}
	}
	all[0].failed.Store(time.Now().UnixNano())
	for range 20 {
		if e := p.pick(nil); e != all[1] {
			t.Fatalf("%s is asked, which could not be reached", e.address)
		}
	}
	if e := p.pick(all[1:]); e != all[0] {
		t.Errorf("with no other one left: %v", e)
	}
	if e := p.pick(all); e != nil {
		t.Errorf("with none left: %s", e.address)
	}
}

// echo is a gRPC service without generated code.
var echo = grpc.ServiceDesc{ServiceName: "test.Echo", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{
	StreamName: "Talk", ServerStreams: true, ClientStreams: true,
	Handler: func(_ any, s grpc.ServerStream) error {
		for {
			var m wrapperspb.StringValue
			if err := s.RecvMsg(&m); err == io.EOF {
				s.SetTrailer(metadata.Pairs("talk", "over"))
				return status.Error(codes.DataLoss, "as asked for")
			} else if err != nil {
				return err
			}
			if err := s.SendMsg(wrapperspb.String("echo " + m.Value)); err != nil {
				return err
			}
		}
	},
}}}

// TestGRPC talks both ways on one stream, and gets the status and the trailers at its end.
func TestGRPC(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	srv.RegisterService(&echo, struct{}{})
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-served })
	w := newWorld(t, Config{}, func(w *world) {
		w.service("talk", ln.Addr().String())
		w.secure(w.ingress("talk.example", "talk", "backend-protocol", "GRPC"), "talk.example")
	})
	conn, err := grpc.NewClient("passthrough:///talk.example", grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(w.roots, "")),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", w.https)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := conn.NewStream(t.Context(), &echo.Streams[0], "/test.Echo/Talk")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 { // each waits for the one before
		var m wrapperspb.StringValue
		if err := s.SendMsg(wrapperspb.String(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&m); err != nil || m.Value != fmt.Sprint("echo ", i) {
			t.Fatalf("%q, %v", m.Value, err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	err = s.RecvMsg(&wrapperspb.StringValue{})
	if status.Code(err) != codes.DataLoss || s.Trailer().Get("talk")[0] != "over" {
		t.Errorf("ended with %v and %v", err, s.Trailer())
	}
}

// pipes is a listener of connections in memory.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "tcp" }
func (pipeAddr) String() string  { return "192.0.2.1:1" }

type pipeConn struct{ net.Conn }

func (pipeConn) RemoteAddr() net.Addr { return pipeAddr{} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return pipeAddr{} }
func (p *pipes) dial() net.Conn {
	here, there := net.Pipe()
	p.conns <- pipeConn{there}
	return here
}

// TestSlowClients: whoever does not go on loses the connection, after a time that is known.
func TestSlowClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		front, back := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}, &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
		app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			if r.URL.Path == "/late" {
				time.Sleep(50 * time.Second)
			}
			for range 100 {
				_, _ = w.Write(make([]byte, 64<<10))
			}
		})}
		appEnded := make(chan struct{})
		go func() { defer close(appEnded); _ = app.Serve(back) }()
		w := &world{t: t}
		var err error
		w.Server, err = New(Config{
			Log: slog.New(slog.DiscardHandler),
			Listen: func(_ context.Context, _, address string) (net.Listener, error) {
				if address == ":80" {
					return front, nil
				}
				return nil, net.ErrClosed
			},
			ListenPacket: func(context.Context, string, string) (net.PacketConn, error) { return nil, net.ErrClosed },
			Dial:         func(context.Context, string, string) (net.Conn, error) { return back.dial(), nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		w.service("web", "192.0.2.7:80")
		w.ingress("", "web")
		w.Set(w.objects)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = w.Run(ctx) }()
		for name, tt := range map[string]struct {
			send  string
			after time.Duration
			want  string
		}{
			"headers":         {"GET / HTTP/1.1\r\nHost: a\r\nX: ", headerTimeout, ""},
			"nothing":         {"", headerTimeout, ""},
			"body":            {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc", stallTimeout + restTimeout, "HTTP/1.1 408"},
			"unwanted body":   {"POST /../ HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc", restTimeout, "HTTP/1.1 400"},
			"late, but comes": {"POST /late HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", 50 * time.Second, "HTTP/1.1 200"},
			"taking nothing":  {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", stallTimeout, "HTTP/1.1 200"},
		} {
			begun := time.Now()
			c := front.dial()
			if tt.send != "" {
				if _, err := io.WriteString(c, tt.send); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			if name == "taking nothing" { // beyond what anybody keeps for it
				_, _ = io.ReadFull(c, make([]byte, 300<<10))
				time.Sleep(2 * stallTimeout)
				tt.after *= 2
			}
			answer, _ := io.ReadAll(c)
			if got := time.Since(begun); got < tt.after || got > tt.after+time.Second {
				t.Errorf("%s: ended after %s, want %s", name, got, tt.after)
			}
			if name == "taking nothing" {
				if len(answer) > 1<<20 {
					t.Errorf("%s: all was sent to somebody who took nothing for two minutes", name)
				}
			} else if !strings.HasPrefix(string(answer), tt.want) || tt.want == "" && strings.Contains(string(answer), "200") {
				t.Errorf("%s: %.100q, want %s", name, answer, tt.want)
			}
			c.Close()
		}
		cancel()
		<-ended
		w.Set(route.Objects{})
		app.Close()
		<-appEnded
		time.Sleep(time.Minute) // what waits for its time ends
	})
}
