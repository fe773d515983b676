package ingress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"decree.dev/decree/netplane/ingress/route"
)

// statusClientGone is what is counted when a client leaves before there is a response (a
// convention of nginx; it is never sent).
const statusClientGone = 499

// exchange is one request and its response. It is used again and again.
type exchange struct {
	server *Server
	proxy  httputil.ReverseProxy

	begun    time.Time
	client   netip.Addr
	request  *http.Request
	response response
	body     *timely // of a request by HTTP/1; nil: none that is read
	route    *route.Route
	ingress  *ingress // nil: none wants the request
	pool     *pool
	endpoint *endpoint // that was asked last
	failure  string    // why there is no response of a backend
}

func newExchange(s *Server) *exchange {
	x := &exchange{server: s}
	x.proxy = httputil.ReverseProxy{
		Rewrite: x.rewrite, Transport: x, ErrorHandler: x.fail, BufferPool: &s.buffers,
		ErrorLog: discard, ModifyResponse: x.announce,
	}
	return x
}

// serve is the handler of all ports.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	x := s.states.Get().(*exchange)
	x.begun, x.request, x.client = time.Now(), r, clientOf(r)
	x.response = response{ResponseWriter: w}
	defer func() {
		x.end()
		p := recover()
		x.request, x.response, x.body, x.route, x.ingress, x.pool, x.endpoint, x.failure = nil, response{}, nil, nil, nil, nil, nil, ""
		s.states.Put(x)
		if p != nil { // the response was cut off: the client has to see that
			panic(p)
		}
	}()
	x.handle()
}

func (x *exchange) handle() {
	w, r, s := &x.response, x.request, x.server
	if dotted(r.URL.Path) || r.URL.Path == "" || r.URL.Path[0] != '/' || r.Method == http.MethodConnect {
		x.refuse(http.StatusBadRequest, "the path is not one that clients send")
		return
	}
	g := s.now.Load()
	name := hostName(r.Host)
	if x.route = g.Match(name, r.URL.Path); x.route == nil {
		x.refuse(http.StatusNotFound, "no ingress has a rule for this host and path")
		return
	}
	x.ingress = g.ingresses[x.route.Ingress]
	if r.TLS == nil && x.route.Redirect {
		x.redirect(name)
		return
	}
	if x.route.Backend < 0 {
		x.refuse(http.StatusServiceUnavailable, "the backend does not exist")
		return
	}
	x.pool = g.pools[x.route.Backend]
	if ok, leave := x.ingress.limits.enter(x.client, x.begun); !ok {
		w.Header().Set("Retry-After", "1")
		x.refuse(http.StatusTooManyRequests, "this client is over the limit")
		return
	} else if leave != nil {
		defer leave()
	}
	if !x.bound() {
		x.refuse(http.StatusRequestEntityTooLarge, "the request is too large")
		return
	}
	x.proxy.ServeHTTP(w, r)
}

// bound bounds how long a request's body is, and how slowly it may come.
func (x *exchange) bound() bool {
	r := x.request
	if r.Body == nil || r.Body == http.NoBody {
		return true
	}
	if most := x.ingress.MaxBody; most > 0 {
		if r.ContentLength > most {
			return false
		}
		r.Body = http.MaxBytesReader(&x.response, r.Body, most)
	}
	if r.ProtoMajor == 1 { // the others have streams that may be silent for long
		x.body = &timely{ReadCloser: r.Body, control: http.NewResponseController(x.response.ResponseWriter)}
		r.Body = x.body
		// Or else the body is closed with the response's first byte, and who still reads
		// it takes that for a failure.
		_ = x.body.control.EnableFullDuplex()
	}
	return true
}

// redirect sends a client to the same place with TLS.
func (x *exchange) redirect(name string) {
	if p := x.server.port.Load(); p != 443 && p != 0 {
		name = net.JoinHostPort(name, strconv.Itoa(int(p)))
	}
	x.response.Header().Set("Location", "https://"+name+x.request.URL.RequestURI())
	x.response.WriteHeader(http.StatusPermanentRedirect)
}

// refuse answers without a backend.
func (x *exchange) refuse(code int, why string) {
	x.failure = why
	h := x.response.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	if x.request.ProtoMajor == 1 && (x.request.ContentLength != 0 || x.request.Method == http.MethodConnect) {
		h.Set("Connection", "close") // rather than read what nobody wants
	}
	x.response.WriteHeader(code)
	fmt.Fprintf(&x.response, "%d %s: %s\n", code, http.StatusText(code), why)
}

// rewrite makes the request that backends see. What the client says about where it comes
// from is replaced: it might say anything.
func (x *exchange) rewrite(p *httputil.ProxyRequest) {
	out := p.Out
	out.URL.Scheme = "http"
	if x.pool.key.Protocol == "HTTPS" {
		out.URL.Scheme = "https"
	}
	out.Host = p.In.Host
	if to := x.ingress.Rewrite; to != "" {
		raw := out.URL.RawPath
		out.URL.Path = x.route.Rewritten(out.URL.Path, to)
		if out.URL.RawPath = ""; strings.HasPrefix(raw, x.route.Path) {
			out.URL.RawPath = x.route.Rewritten(raw, to)
		}
	}
	client := x.client.String()
	out.Header["X-Forwarded-For"] = []string{client}
	out.Header["X-Real-Ip"] = []string{client}
	out.Header["X-Forwarded-Host"] = []string{p.In.Host}
	if p.In.TLS != nil {
		out.Header["X-Forwarded-Proto"] = https
	} else {
		out.Header["X-Forwarded-Proto"] = plain
	}
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = none // or else the transport would add its own
	}
}

var https, plain, none = []string{"https"}, []string{"http"}, []string{""}

// RoundTrip implements [http.RoundTripper] for the one request.
func (x *exchange) RoundTrip(req *http.Request) (*http.Response, error) {
	return x.pool.send(req, x.ingress.Retries, &x.endpoint)
}

// announce tells clients of HTTP/3 (RFC 7838).
func (x *exchange) announce(res *http.Response) error {
	if s := x.server; x.request.TLS != nil && x.request.ProtoMajor < 3 && s.quic.Load() && res.Header.Get("Alt-Svc") == "" {
		res.Header.Set("Alt-Svc", fmt.Sprintf(`h3=":%d"; ma=86400`, s.port.Load()))
	}
	return nil
}

// fail answers when no backend did.
func (x *exchange) fail(_ http.ResponseWriter, r *http.Request, err error) {
	code, why := http.StatusBadGateway, "the backend did not respond"
	var timeout net.Error
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	switch {
	case tooLarge:
		code, why = http.StatusRequestEntityTooLarge, "the request is too large"
	case x.body != nil && x.body.stalled.Load(): // the server may have given up on the client, too
		code, why = http.StatusRequestTimeout, errStalled.Error()
	case errors.Is(r.Context().Err(), context.Canceled):
		x.failure, x.response.code = "the client left", statusClientGone
		panic(http.ErrAbortHandler) // an answer of the library's own would be a lie
	case errors.Is(err, errNoEndpoint):
		code, why = http.StatusServiceUnavailable, err.Error()
	case errors.As(err, &timeout) && timeout.Timeout():
		code, why = http.StatusGatewayTimeout, "the backend did not respond in time"
	}
	x.ingress.failed(code)
	if x.server.log.Enabled(r.Context(), -4) {
		x.server.log.Debug("no response of a backend", "ingress", x.ingress.name.namespace+"/"+x.ingress.name.name, "service", x.pool.key.Service, "err", err)
	}
	x.refuse(code, why)
}

// end writes down what happened.
func (x *exchange) end() {
	w := &x.response
	w.settle()
	x.rest()
	took := time.Since(x.begun)
	if x.ingress != nil {
		x.ingress.count(w.code, took)
	} else {
		x.server.metrics.unrouted.Inc()
	}
	if x.server.access != nil {
		x.server.access.add(x.record(took))
	}
}

// rest leaves the request's body to the server, which reads what nobody has, to find the next
// request behind it: it shall not wait for long.
func (x *exchange) rest() {
	r := x.request
	switch {
	case x.body != nil:
		x.body.end()
	case r.ProtoMajor == 1 && r.Body != nil && r.Body != http.NoBody:
		_ = http.NewResponseController(x.response.ResponseWriter).SetReadDeadline(time.Now().Add(restTimeout))
	}
}

// hostName is the name in a Host header, as tables have it: in lower case, without a port
// and the dot at the end.
func hostName(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host = host[:i]
	}
	host = strings.TrimSuffix(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"), ".")
	for i := range len(host) {
		if 'A' <= host[i] && host[i] <= 'Z' {
			return strings.ToLower(host)
		}
	}
	return host
}

// dotted reports whether a path has "." or ".." as an element. Clients remove them
// (RFC 3986, 5.2.4); who does not wants a backend to see another path than the rules did.
func dotted(path string) bool {
	for rest := path; ; {
		i := strings.Index(rest, "/.")
		if i < 0 {
			return false
		}
		rest = rest[i+2:]
		next := strings.TrimPrefix(rest, ".")
		if next == "" || next[0] == '/' || next[0] == '\\' || rest == "" || rest[0] == '/' {
			return true
		}
	}
}

// clientOf is the address of the client.
func clientOf(r *http.Request) netip.Addr {
	a, _ := netip.ParseAddrPort(r.RemoteAddr)
	return a.Addr().Unmap()
}

// bufferPool is for the copying of bodies.
type bufferPool struct{ pool sync.Pool }

func (b *bufferPool) Get() []byte {
	if p, ok := b.pool.Get().(*[]byte); ok {
		return *p
	}
	return make([]byte, 32<<10)
}

func (b *bufferPool) Put(p []byte) { b.pool.Put(&p) }
