package ingress

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"decree.dev/decree/netplane/ingress/route"
)

// maxClients is how many clients one ingress keeps apart. When there are more, those that
// were idle longest are forgotten: they are within their limits.
const maxClients = 100_000

// limits are those of one ingress, for each client.
type limits struct {
	rps, connections int
	mu               sync.Mutex
	clients          map[netip.Addr]*visitor
	swept            time.Time
}

// visitor is a client.
type visitor struct {
	rate     *rate.Limiter
	underWay int
	seen     time.Time
}

// newLimits returns nil if there are none.
func newLimits(o *route.Ingress) *limits {
	if o.RPS == 0 && o.Connections == 0 {
		return nil
	}
	return &limits{rps: o.RPS, connections: o.Connections, clients: map[netip.Addr]*visitor{}}
}

// enter reports whether a client may begin a request; leave, if not nil, ends it. A client
// may be ahead of its rate by the requests of one second. In IPv6 a client is a network of
// 64 bits, which is the least that one is given (RFC 6177).
func (l *limits) enter(client netip.Addr, now time.Time) (ok bool, leave func()) {
	if l == nil {
		return true, nil
	}
	if client.Is6() {
		p, _ := client.WithZone("").Prefix(64)
		client = p.Addr()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.clients[client]
	if v == nil {
		l.sweep(now)
		v = &visitor{}
		if l.rps > 0 {
			v.rate = rate.NewLimiter(rate.Limit(l.rps), l.rps)
		}
		l.clients[client] = v
	}
	v.seen = now
	if l.connections > 0 && v.underWay >= l.connections || v.rate != nil && !v.rate.AllowN(now, 1) {
		return false, nil
	}
	if l.connections == 0 {
		return true, nil
	}
	v.underWay++
	return true, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		v.underWay--
	}
}

// sweep forgets who has nothing under way and was not seen for long enough to be within
// its rate. The caller holds mu.
func (l *limits) sweep(now time.Time) {
	if now.Sub(l.swept) < time.Minute && len(l.clients) < maxClients {
		return
	}
	l.swept = now
	for a, v := range l.clients {
		if v.underWay == 0 && (now.Sub(v.seen) > 2*time.Second || len(l.clients) >= maxClients) {
			delete(l.clients, a)
		}
	}
}
