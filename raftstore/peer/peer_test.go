package peer_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scripted is a store that answers by what the transaction says.
type scripted struct{}

func (scripted) ProposeEncoded(_ context.Context, txn []byte, done func(command.Result, error)) error {
	switch what, _, _ := strings.Cut(string(txn), " "); what {
	case "follower":
		return raftstore.ErrNotLeader
	case "lost":
		go done(command.Result{}, raftstore.ErrLeadershipLost)
	case "reject":
		go done(command.Result{Revision: 7, Rejected: &command.Rejection{Code: command.Conflict, Key: api.Key{Resource: api.Pods, Namespace: "a", Name: "b"}, Message: "no"}}, nil)
	case "broken":
		go done(command.Result{}, errors.New("the disk is full"))
	default:
		go done(command.Result{Revision: uint64(len(txn)), Missing: 3}, nil)
	}
	return nil
}

func (scripted) ReadIndex(context.Context) (uint64, error) { return 42, nil }

type gone struct{}

func (gone) Error() string     { return "it is gone" }
func (gone) ErrorCode() string { return "gone" }

// cluster is one server and the certificates for its clients.
type cluster struct {
	t       *testing.T
	ca      *pki.Authority
	address string
	mux     *peer.Mux
}

func (c *cluster) config(r pki.Request) *tls.Config {
	c.t.Helper()
	pair, err := c.ca.Issue(r, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := pair.TLS()
	if err != nil {
		c.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.ca.CertPEM())
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: pool, ClientCAs: pool, ClientAuth: tls.VerifyClientCertIfGiven, ServerName: pki.ServerName}
}

func newCluster(t *testing.T, limits peer.Limits) *cluster {
	ca, err := pki.Open(t.TempDir(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, ca: ca, address: l.Addr().String()}
	c.mux = peer.NewMux(l, peer.MuxConfig{TLS: c.config(pki.ServerIdentity("s1")), Limits: limits, Admit: func(_ string, state tls.ConnectionState) error {
		who, ok := peer.IdentityOf(state)
		if !ok || who.Groups[0] != pki.GroupServers {
			return fmt.Errorf("%q is no server", who.Name)
		}
		return nil
	}})
	calls := c.mux.Listen(peer.ProtocolPeer)
	server := &peer.Server{Store: scripted{}, Handlers: map[string]peer.Handler{
		"upper": peer.On(func(_ context.Context, from peer.Identity, in string) (any, error) {
			return from.Name + " " + strings.ToUpper(in), nil
		}),
		"gone": peer.On(func(context.Context, peer.Identity, struct{}) (any, error) { return nil, gone{} }),
		"hang": peer.On(func(ctx context.Context, _ peer.Identity, _ struct{}) (any, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}),
	}}
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { c.mux.Serve(ctx) })
	parts.Go(func() { server.Serve(ctx, calls) })
	t.Cleanup(func() { cancel(); parts.Wait() })
	return c
}

func (c *cluster) client(r pki.Request) *peer.Client {
	config := c.config(r)
	client := peer.NewClient(func() *tls.Config { return config })
	c.t.Cleanup(client.Close)
	return client
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestCalls(t *testing.T) {
	c := newCluster(t, peer.Limits{})
	p, ctx := c.client(pki.ServerIdentity("s2")), deadline(t)
	if r, err := p.Propose(ctx, c.address, []byte("hello")); err != nil || r.Revision != 5 || r.Missing != 3 || r.Rejected != nil {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := p.Propose(ctx, c.address, []byte("reject")); err != nil || r.Rejected == nil || r.Rejected.Code != command.Conflict || r.Rejected.Key.String() != `pods "a/b"` || r.Rejected.Message != "no" {
		t.Errorf("%+v, %v", r, err)
	}
	for what, want := range map[string]error{"follower": raftstore.ErrNotLeader, "lost": raftstore.ErrLeadershipLost} {
		if _, err := p.Propose(ctx, c.address, []byte(what)); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var remote *peer.RemoteError
	if _, err := p.Propose(ctx, c.address, []byte("broken")); !errors.As(err, &remote) || remote.Text != "the disk is full" {
		t.Errorf("%v", err)
	}
	if revision, err := p.ReadIndex(ctx, c.address); err != nil || revision != 42 {
		t.Errorf("%d, %v", revision, err)
	}
	var out string
	if err := p.Call(ctx, c.address, "upper", "x", &out); err != nil || out != pki.ServerPrefix+"s2 X" {
		t.Errorf("%q, %v", out, err)
	}
	if err := p.Call(ctx, c.address, "gone", struct{}{}, nil); !errors.As(err, &remote) || remote.Code != "gone" {
		t.Errorf("%v", err)
	}
	if err := p.Call(ctx, c.address, "new", struct{}{}, nil); !errors.As(err, &remote) || !strings.Contains(remote.Text, "older") {
		t.Errorf("%v", err)
	}
	if err := p.Call(ctx, c.address, "upper", 5, nil); err == nil {
		t.Error("an argument of another type was taken")
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := p.Call(short, c.address, "hang", struct{}{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	big := strings.Repeat("x", 30<<20)
	if r, err := p.Propose(ctx, c.address, []byte(big)); err != nil || r.Revision != uint64(len(big)) {
		t.Errorf("%d bytes: %v", len(big), err)
	}
}

func TestManyCalls(t *testing.T) {
	c := newCluster(t, peer.Limits{})
	p, ctx := c.client(pki.ServerIdentity("s2")), deadline(t)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			for n := range 50 {
				txn := strings.Repeat("y", i*50+n+1)
				if r, err := p.Propose(ctx, c.address, []byte(txn)); err != nil || r.Revision != uint64(len(txn)) {
					t.Errorf("an answer to another call: %+v, %v", r, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestNoServer: others than servers are not heard.
func TestNoServer(t *testing.T) {
	c := newCluster(t, peer.Limits{})
	for what, r := range map[string]pki.Request{"an agent": pki.Node("n1"), "an administrator": pki.Admin("eve")} {
		if _, err := c.client(r).ReadIndex(deadline(t), c.address); err == nil {
			t.Errorf("%s was answered", what)
		}
	}
	// Nothing was asked of anybody: it is safe to ask another server.
	if _, err := c.client(pki.ServerIdentity("s2")).Propose(deadline(t), "127.0.0.1:1", []byte("x")); !errors.Is(err, raftstore.ErrNotLeader) {
		t.Errorf("a server that is not there: %v", err)
	}
}

// TestGarbage: what no client sends ends the connection, and nothing else.
func TestGarbage(t *testing.T) {
	c := newCluster(t, peer.Limits{})
	config := c.config(pki.ServerIdentity("s2"))
	config.NextProtos = []string{peer.ProtocolPeer}
	for what, bytes := range map[string][]byte{
		"a frame of 4 GB":   append(binary.BigEndian.AppendUint32(nil, 1<<32-1), "xxxxxxxxxxxx"...),
		"an empty frame":    make([]byte, 64),
		"HTTP":              []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"a frame cut off":   binary.BigEndian.AppendUint32(nil, 100),
		"an unknown method": append(binary.BigEndian.AppendUint32(nil, 6), 0, 0, 0, 1, 99, 1),
		"a call cut off":    append(binary.BigEndian.AppendUint32(nil, 6), 0, 0, 0, 1, 3, 200),
	} {
		conn, err := tls.Dial("tcp", c.address, config)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if _, err := conn.Write(bytes); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		conn.CloseWrite()
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) || err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: the connection stays open", what)
		}
		conn.Close()
	}
	if _, err := c.client(pki.ServerIdentity("s2")).ReadIndex(deadline(t), c.address); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// TestIdleConnections: ten thousand strangers who connect and say nothing are bounded,
// and do not keep a server out.
func TestIdleConnections(t *testing.T) {
	c := newCluster(t, peer.Limits{Handshake: time.Second})
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	for i := range 10_000 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, byte(i%200), 1)}, Timeout: 5 * time.Second}
		conn, err := d.Dial("tcp", c.address)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		conns = append(conns, conn)
	}
	ctx := deadline(t)
	p := c.client(pki.ServerIdentity("s2"))
	for {
		if _, err := p.ReadIndex(ctx, c.address); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("a server is kept out")
		}
		time.Sleep(20 * time.Millisecond) // until the strangers' time is up
	}
	for i, conn := range conns {
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Fatalf("stranger %d is still there: %v", i, err)
		}
	}
}
