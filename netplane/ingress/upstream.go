package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"decree.dev/decree/netplane/ingress/route"
	"decree.dev/decree/schemas/api"
)

const (
	// idleUpstream is how long a connection to a backend waits for the next request:
	// less than the 5 seconds after which common servers close theirs, as a request that
	// meets the end of its connection may be lost.
	idleUpstream = 4 * time.Second
	// idlePerEndpoint is how many connections to one endpoint may wait.
	idlePerEndpoint = 512
	// maxResponseHeader bounds a response's headers in bytes.
	maxResponseHeader = 256 << 10
	// setAside is for how long an endpoint that could not be reached is asked last.
	setAside = time.Second
)

// errNoEndpoint: the service has nobody to answer.
var errNoEndpoint = errors.New("the service has no ready endpoint")

// dialError is a connection that could not be made: nothing was sent.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// pool is the endpoints of one backend.
type pool struct {
	key       route.BackendKey
	alias     bool
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	endpoints atomic.Pointer[[]*endpoint]
}

// endpoint is one server, with the connections to it.
type endpoint struct {
	address   string
	transport *http.Transport
	underWay  atomic.Int64
	gone      atomic.Bool  // no new requests
	failed    atomic.Int64 // when it last could not be reached, in Unix nanoseconds
}

func newPool(b *route.Backend, dial func(context.Context, string, string) (net.Conn, error)) *pool {
	p := &pool{key: b.BackendKey, alias: b.Alias, dial: dial}
	p.endpoints.Store(&[]*endpoint{})
	return p
}

// set makes the endpoints those of b. When it returns, no new request goes to others.
func (p *pool) set(b *route.Backend) {
	old := *p.endpoints.Load()
	if slices.EqualFunc(old, b.Endpoints, func(e *endpoint, address string) bool { return e.address == address }) {
		return
	}
	next := make([]*endpoint, 0, len(b.Endpoints))
	for _, address := range b.Endpoints {
		i := slices.IndexFunc(old, func(e *endpoint) bool { return e.address == address })
		if i >= 0 {
			next = append(next, old[i])
		} else {
			next = append(next, &endpoint{address: address, transport: p.transport()})
		}
	}
	p.endpoints.Store(&next)
	for _, e := range old {
		if !slices.Contains(next, e) {
			e.gone.Store(true)
			e.rest()
		}
	}
}

// transport makes the connections to one endpoint.
func (p *pool) transport() *http.Transport {
	t := &http.Transport{
		DialContext: p.connect, DisableCompression: true, MaxIdleConnsPerHost: idlePerEndpoint, IdleConnTimeout: idleUpstream,
		ResponseHeaderTimeout: p.key.Timeout, ExpectContinueTimeout: time.Second, MaxResponseHeaderBytes: maxResponseHeader,
		TLSHandshakeTimeout: p.key.ConnectTimeout, Protocols: new(http.Protocols),
	}
	switch p.key.Protocol {
	case api.BackendH2C:
		t.Protocols.SetUnencryptedHTTP2(true)
		t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second}
	case api.BackendHTTPS:
		t.Protocols.SetHTTP1(true)
		t.Protocols.SetHTTP2(true)
		// Pods have certificates for names that nobody here knows; an alias has a name.
		t.TLSClientConfig = &tls.Config{InsecureSkipVerify: !p.alias, MinVersion: tls.VersionTLS12}
	default:
		t.Protocols.SetHTTP1(true)
	}
	return t
}

func (p *pool) connect(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.key.ConnectTimeout)
	defer cancel()
	conn, err := p.dial(ctx, network, address)
	if err == nil && p.alias {
		if err = allowed(conn.RemoteAddr()); err != nil {
			conn.Close()
		}
	}
	if err != nil {
		return nil, &dialError{err}
	}
	return conn, nil
}

// allowed keeps names that users choose from leading to what only the node itself reaches.
func allowed(remote net.Addr) error {
	tcp, ok := remote.(*net.TCPAddr)
	if !ok {
		return nil
	}
	a, _ := netip.AddrFromSlice(tcp.IP)
	if a = a.Unmap(); a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast() {
		return fmt.Errorf("the name leads to %s, which is this node's own", a)
	}
	return nil
}

// pick chooses an endpoint that is not one of tried, and takes a place there: of two at
// random the one with fewer requests under way (Mitzenmacher, The Power of Two Choices in
// Randomized Load Balancing). Nil: there is none.
func (p *pool) pick(tried []*endpoint) *endpoint {
	for {
		all := *p.endpoints.Load()
		e := choose(all, tried)
		if e == nil {
			return nil
		}
		e.underWay.Add(1)
		if !e.gone.Load() {
			return e
		}
		e.leave() // the list has just changed
	}
}

func choose(all, tried []*endpoint) *endpoint {
	switch n := len(all); {
	case n == 0:
		return nil
	case n == 1 && len(tried) == 0:
		return all[0]
	case n > 1 && len(tried) == 0:
		i, j := rand.IntN(n), rand.IntN(n-1)
		if j >= i {
			j++
		}
		a, b := all[i], all[j]
		if a.failed.Load() == 0 && b.failed.Load() == 0 {
			if b.underWay.Load() < a.underWay.Load() {
				return b
			}
			return a
		}
	}
	// Some could not be reached: all of them are looked at.
	var best *endpoint
	now, start := time.Now().UnixNano(), rand.IntN(len(all))
	for i := range all {
		e := all[(start+i)%len(all)]
		if !slices.Contains(tried, e) && (best == nil || e.better(best, now)) {
			best = e
		}
	}
	return best
}

// better reports whether e is to be asked rather than o.
func (e *endpoint) better(o *endpoint, now int64) bool {
	a, b := now-e.failed.Load() < int64(setAside), now-o.failed.Load() < int64(setAside)
	if a != b {
		return b
	}
	return e.underWay.Load() < o.underWay.Load()
}

// leave gives a place back.
func (e *endpoint) leave() {
	if e.underWay.Add(-1) == 0 && e.gone.Load() {
		e.rest()
	}
}

// rest closes the connections of an endpoint that is gone, once nobody uses it.
func (e *endpoint) rest() {
	if e.underWay.Load() == 0 {
		e.transport.CloseIdleConnections()
	}
}

// ask sends one request to the endpoint. The place is given back with the response's body,
// or at once if there is an error.
func (e *endpoint) ask(req *http.Request) (*http.Response, error) {
	res, err := e.transport.RoundTrip(req)
	if err != nil {
		if _, ok := errors.AsType[*dialError](err); ok {
			e.failed.Store(time.Now().UnixNano())
		}
		e.leave()
		return nil, err
	}
	if e.failed.Load() != 0 {
		e.failed.Store(0)
	}
	body := &tracked{ReadCloser: res.Body, endpoint: e}
	res.Body = body
	if rw, ok := body.ReadCloser.(io.ReadWriteCloser); ok && res.StatusCode == http.StatusSwitchingProtocols {
		res.Body = &trackedStream{body, rw}
	}
	return res, nil
}

// tracked is a response's body; with its end the request has ended.
type tracked struct {
	io.ReadCloser
	endpoint *endpoint
	closed   atomic.Bool
}

func (t *tracked) Close() error {
	err := t.ReadCloser.Close()
	if !t.closed.Swap(true) {
		t.endpoint.leave()
	}
	return err
}

// trackedStream is what follows an upgrade: both directions.
type trackedStream struct {
	*tracked
	io.Writer
}

// replayable is a request's body of which it is known whether any of it was read.
type replayable struct {
	io.Reader
	read atomic.Bool
	left int64 // of a length that is known; negative: it is not
}

// Read ends with the last byte: the transport would read on to see the end, which may no
// longer be there to be read once the response has begun.
func (b *replayable) Read(p []byte) (int, error) {
	b.read.Store(true)
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.Reader.Read(p)
	if b.left > 0 {
		if b.left -= int64(n); b.left <= 0 && err == nil {
			err = io.EOF
		}
	}
	return n, err
}

// Close does nothing: the transport would close it after each try. Its owner does.
func (b *replayable) Close() error { return nil }

// idempotent are the methods that mean the same when they are carried out twice
// (RFC 9110, 9.2.2).
func idempotent(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// send asks endpoints of the pool until one responds. A connection that cannot be made is
// tried elsewhere, as nothing was sent; a connection that ended without a response only
// when the request is idempotent and has no body, and not more than retries times.
func (p *pool) send(req *http.Request, retries int, last **endpoint) (*http.Response, error) {
	var body *replayable
	if req.Body != nil && req.Body != http.NoBody {
		body = &replayable{Reader: req.Body, left: req.ContentLength}
		req.Body = body
	}
	var tried []*endpoint
	failure := errNoEndpoint
	for {
		e := p.pick(tried)
		if e == nil {
			return nil, failure
		}
		*last = e
		req.URL.Host = e.address
		res, err := e.ask(req)
		if err == nil || req.Context().Err() != nil {
			return res, err
		}
		failure = err
		if _, ok := errors.AsType[*dialError](err); ok && (body == nil || !body.read.Load()) {
			tried = append(tried, e)
			continue
		}
		if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() || body != nil || !idempotent(req.Method) || retries == 0 {
			return nil, err
		}
		retries--
		if tried = append(tried, e); len(*p.endpoints.Load()) == 1 {
			tried = nil // the only one there is, by another connection
		}
	}
}
