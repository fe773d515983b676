package peer_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// trusting is a port whose CAs change, with calls and HTTP behind it.
type trusting struct {
	t         *testing.T
	old, next *pki.Issuer
	keeper    *pki.Keeper
	mux       *peer.Mux
	address   string
	hangs     chan struct{} // gets one for every call that hangs

	mu      sync.Mutex
	refused map[string]error // by common name
}

func newTrusting(t *testing.T) *trusting {
	t.Helper()
	now := time.Now()
	first, err := pki.NewAuthoritySpec(now)
	if err != nil {
		t.Fatal(err)
	}
	both, err := pki.Successor(first, now)
	if err != nil {
		t.Fatal(err)
	}
	x := &trusting{t: t, refused: map[string]error{}, hangs: make(chan struct{}, 1)}
	x.old = x.issuer(both)
	both.Active = both.CAs[1].Fingerprint
	both.CAs[1].Cross = "" // so that its certificates lead to it alone
	x.next = x.issuer(both)
	x.keeper = x.keep(x.next, pki.ServerIdentity("s1"), x.next.Bundle(), now)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	x.address = l.Addr().String()
	x.mux = peer.NewMux(l, peer.MuxConfig{TLS: x.keeper.ServerTLS()})
	calls, web := x.mux.Listen(peer.ProtocolPeer), x.mux.Listen("http/1.1")
	server := &peer.Server{Store: scripted{}, Refuse: x.refuse, Handlers: map[string]peer.Handler{
		"hang": peer.On(func(ctx context.Context, _ peer.Identity, _ struct{}) (any, error) {
			x.hangs <- struct{}{}
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}),
	}}
	site := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })}
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { x.mux.Serve(ctx) })
	parts.Go(func() { server.Serve(ctx, calls) })
	parts.Go(func() { site.Serve(web) })
	t.Cleanup(func() { cancel(); site.Close(); parts.Wait() })
	return x
}

func (x *trusting) issuer(spec api.AuthoritySpec) *pki.Issuer {
	x.t.Helper()
	i, err := pki.NewIssuer(spec)
	if err != nil {
		x.t.Fatal(err)
	}
	return i
}

// keep makes a keeper with a certificate that was signed at a time.
func (x *trusting) keep(by *pki.Issuer, who pki.Request, bundle []byte, at time.Time) *pki.Keeper {
	x.t.Helper()
	k, err := pki.OpenKeeper(x.t.TempDir(), nil)
	if err != nil {
		x.t.Fatal(err)
	}
	csr, err := k.JoinRequest()
	if err != nil {
		x.t.Fatal(err)
	}
	chain, err := by.Sign(csr, who, at)
	if err != nil {
		x.t.Fatal(err)
	}
	if err := k.Install(chain, bundle, at); err != nil {
		x.t.Fatal(err)
	}
	return k
}

func (x *trusting) refuse(who peer.Identity) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.refused[who.Name]
}

// hanging is a client with a call under way, whose end tells that of the connection.
func (x *trusting) hanging(by *pki.Issuer, name string, lifetime time.Duration) (*peer.Client, <-chan error) {
	x.t.Helper()
	who := pki.ServerIdentity(name)
	who.Lifetime = lifetime
	k := x.keep(by, who, x.next.Bundle(), time.Now())
	c := peer.NewClient(func() *tls.Config { return k.ClientTLS() })
	x.t.Cleanup(c.Close)
	if _, err := c.ReadIndex(deadline(x.t), x.address); err != nil {
		x.t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- c.Call(deadline(x.t), x.address, "hang", struct{}{}, nil) }()
	<-x.hangs
	return c, end
}

func pemOf(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// recheck judges all connections by what is trusted at a time.
func (x *trusting) recheck(at time.Time) int {
	return x.mux.Recheck(func(_ string, state tls.ConnectionState) error {
		if len(state.VerifiedChains) == 0 {
			return nil
		}
		return x.keeper.Recheck(state.VerifiedChains, at)
	})
}

// browser is a connection for HTTP, kept alive.
type browser struct {
	conn net.Conn
	r    *bufio.Reader
}

func (x *trusting) browser(k *pki.Keeper) *browser {
	x.t.Helper()
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}} // the server is not what is looked at
	if k != nil {
		config = k.ClientTLS("http/1.1")
	}
	conn, err := tls.Dial("tcp", x.address, config)
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { conn.Close() })
	return &browser{conn, bufio.NewReader(conn)}
}

func (b *browser) get() error {
	b.conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprint(b.conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(b.r, nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func ended(t *testing.T, what string, end <-chan error, want bool) {
	t.Helper()
	if !want {
		select {
		case err := <-end:
			t.Errorf("%s: the connection ended: %v", what, err)
		default:
		}
		return
	}
	select {
	case err := <-end:
		if !errors.Is(err, raftstore.ErrLeadershipLost) { // the outcome of what was under way is not known
			t.Errorf("%s: %v", what, err)
		}
	case <-time.After(10 * time.Second):
		t.Errorf("%s: the connection goes on", what)
	}
}

// TestTrustEnds: connections end with the trust that they were made by, those of others
// go on, and nobody comes back the old way.
func TestTrustEnds(t *testing.T) {
	x := newTrusting(t)
	before, beforeEnd := x.hanging(x.old, "s2", 0)
	after, afterEnd := x.hanging(x.next, "s3", 0)
	short, shortEnd := x.hanging(x.next, "s4", time.Hour)
	operator := x.browser(x.keep(x.old, pki.Admin("ada"), x.next.Bundle(), time.Now()))
	stranger := x.browser(nil)
	for _, b := range []*browser{operator, stranger} {
		if err := b.get(); err != nil {
			t.Fatal(err)
		}
	}
	if n := x.recheck(time.Now().Add(-24 * time.Hour)); n != 0 {
		t.Errorf("%d connections were closed when nothing had changed but a clock that was set back", n)
	}
	if n := x.recheck(time.Now().Add(2 * time.Hour)); n != 1 {
		t.Errorf("%d connections were closed when one certificate had ended", n)
	}
	ended(t, "its certificate has ended", shortEnd, true)
	if _, err := short.ReadIndex(deadline(t), x.address); err != nil {
		t.Errorf("the handshake goes by the real clock: %v", err)
	}

	active, err := pki.ParseBundle(x.next.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	if err := x.keeper.SetBundle(pemOf(active[1])); err != nil {
		t.Fatal(err)
	}
	ended(t, "before anybody looked", beforeEnd, false)
	if n := x.recheck(time.Now()); n != 2 { // s2's, and the operator's
		t.Errorf("%d connections were closed with their CA", n)
	}
	ended(t, "of the old CA", beforeEnd, true)
	ended(t, "of the new CA", afterEnd, false)
	if _, err := after.ReadIndex(deadline(t), x.address); err != nil {
		t.Errorf("of the new CA: %v", err)
	}
	if _, err := before.ReadIndex(deadline(t), x.address); err == nil {
		t.Error("a certificate of the old CA is taken")
	}
	if err := operator.get(); err == nil {
		t.Error("an operator of the old CA is served")
	}
	if err := stranger.get(); err != nil {
		t.Errorf("a stranger, who was not trusted before, is cut off: %v", err)
	}
}

// TestRefused: whoever must not do anything any more is told so, by an error that it
// can tell from others.
func TestRefused(t *testing.T) {
	x := newTrusting(t)
	c, end := x.hanging(x.next, "s2", 0)
	x.mu.Lock()
	x.refused[pki.ServerPrefix+"s2"] = gone{}
	x.mu.Unlock()
	if n := x.mux.Recheck(func(_ string, state tls.ConnectionState) error {
		who, _ := peer.IdentityOf(state)
		return x.refuse(who)
	}); n != 1 {
		t.Errorf("%d connections were closed", n)
	}
	ended(t, "refused", end, true)
	_, err := c.Propose(deadline(t), x.address, []byte("hello"))
	var remote *peer.RemoteError
	if !errors.As(err, &remote) || remote.Code != "gone" {
		t.Errorf("propose: %v", err)
	}
	if _, err := c.ReadIndex(deadline(t), x.address); !errors.As(err, &remote) {
		t.Errorf("read: %v", err)
	}
	if err := c.Call(deadline(t), x.address, "hang", struct{}{}, nil); !errors.As(err, &remote) {
		t.Errorf("call: %v", err)
	}
}
