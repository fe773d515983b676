// Package route turns Ingresses into a table: which request goes to which backend, and
// which certificate a host has. The table is immutable, and says what of the objects it
// could not follow, and why.
//
// It is pure: no clock, no I/O, no goroutines. Serving by a table is for netplane/ingress.
package route

import (
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/schemas/api"
)

// Objects is what a table is made of. They are shared and never modified.
type Objects struct {
	render.Desired // for services, their endpoints, and how near those are
	Ingresses      []*networkingv1.Ingress
	Classes        []*networkingv1.IngressClass
	Secrets        []*corev1.Secret
}

// Table is where requests go. All methods are safe for concurrent use.
type Table struct {
	// Ingresses are those that are served, the oldest first.
	Ingresses []Ingress
	// Backends are what their rules lead to, each once.
	Backends []Backend
	// Certificates are those of secrets, in use or not, each once.
	Certificates []*Certificate
	// Managed are hosts whose certificates are to be obtained (ACME), in order.
	Managed []string
	// Others are addresses of the other nodes that serve Ingresses, one of each, if there is
	// something to be obtained.
	Others []netip.Addr
	// Warnings are what could not be followed, in order of ingresses.
	Warnings []Warning

	names     map[string]*host // by name
	wildcards map[string]*host // "example.com" for *.example.com
	any       *host            // rules without a host
	fallback  *Route

	certificates certificates
}

// Ingress is one that is served.
type Ingress struct {
	Namespace, Name string
	api.IngressOptions
}

// Backend is one port of a service as some ingresses want it used.
type Backend struct {
	BackendKey
	// Endpoints are "address:port"; of an alias (ExternalName), one "name:port".
	Endpoints []string
	// Alias: the name of the endpoint is from a user, and may lead anywhere.
	Alias bool
}

// BackendKey tells backends apart. What connections depend on is part of it.
type BackendKey struct {
	Namespace, Service, Port string
	Protocol                 string // api.BackendHTTP, BackendHTTPS or BackendH2C
	Timeout, ConnectTimeout  time.Duration
}

// Route is where a request goes.
type Route struct {
	Ingress int // of Table.Ingresses
	Backend int // of Table.Backends; negative: the backend does not exist
	// Path is what matched, without a slash at its end, for a rewrite; Exact: all of it.
	Path  string
	Exact bool
	// Redirect: clients without TLS are sent to https.
	Redirect bool
}

// Warning is a part of an Ingress that has no effect.
type Warning struct {
	Namespace, Name string
	Message         string
}

// host is the rules of one host.
type host struct {
	exact map[string]*Route
	// prefixes are without the slash at their ends; "" is everything.
	prefixes map[string]*Route
	longest  int // of prefixes, in bytes
	// fallback is the default backend of the first ingress of the host that has one.
	fallback *Route
}

// Empty reports whether there is nothing to serve.
func (t *Table) Empty() bool { return len(t.Ingresses) == 0 }

// Match returns the route of a request: of the rules of its host; with none, of those of
// the wildcard that covers it; with none, of those without a host. Among these the longest
// path wins, an exact one before a prefix; then the default backend. Nil: nobody wants it.
//
// name is in lower case and without a port, path is decoded and without dot segments.
func (t *Table) Match(name, path string) *Route {
	h := t.names[name]
	if h == nil {
		if _, parent, ok := strings.Cut(name, "."); ok {
			h = t.wildcards[parent]
		}
	}
	if h == nil {
		h = t.any
	}
	if h != nil {
		if r := h.match(path); r != nil {
			return r
		}
		if h.fallback != nil {
			return h.fallback
		}
	}
	return t.fallback
}

func (h *host) match(path string) *Route {
	if path == "" || path[0] != '/' {
		return nil
	}
	if r := h.exact[path]; r != nil {
		return r
	}
	if len(h.prefixes) == 0 {
		return nil
	}
	// Whole elements are left out from the end. What is longer than any prefix is not
	// looked up, or else a path of slashes would cost the square of its length.
	p := path
	if len(p) > h.longest {
		if p = p[:h.longest+1]; p[h.longest] != '/' {
			p = p[:strings.LastIndexByte(p, '/')+1]
		}
		p = strings.TrimSuffix(p, "/")
	}
	for {
		if r := h.prefixes[p]; r != nil {
			return r
		}
		i := strings.LastIndexByte(p, '/')
		if i < 0 {
			return nil
		}
		p = p[:i]
	}
}

// Rewritten is the path that a backend sees, for an ingress with the option Rewrite.
func (r *Route) Rewritten(path, rewrite string) string {
	if rewrite == "" || r.Exact {
		return path
	}
	rest := strings.TrimPrefix(path, r.Path)
	rewrite = strings.TrimSuffix(rewrite, "/")
	if rest == "" && rewrite == "" {
		return "/"
	}
	return rewrite + rest
}
