package join

import (
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits bound what strangers may cost. Zero values take the defaults. Guessing is
// not what they are against, a secret has 256 bits, but work: each request that
// gets as far as the token costs a read of the replicated state.
type Limits struct {
	PerSource rate.Limit // requests a second from one address (IPv6: one /64); 5
	Burst     int        // requests at once from one address; 50: a rack behind one NAT
	Overall   rate.Limit // requests a second from all; 100
	InFlight  int        // requests at once from all; 64
}

func (l *Limits) setDefaults() {
	if l.PerSource == 0 {
		l.PerSource = 5
	}
	if l.Burst == 0 {
		l.Burst = 50
	}
	if l.Overall == 0 {
		l.Overall = 100
	}
	if l.InFlight == 0 {
		l.InFlight = 64
	}
}

// maxSources bounds the memory for addresses that are remembered.
const maxSources = 8192

// limiter holds back who asks too often, by a key such as an address.
type limiter struct {
	each  rate.Limit
	burst int
	all   *rate.Limiter
	slots chan struct{}

	mu      sync.Mutex
	sources map[string]*rate.Limiter
	swept   time.Time // when idle sources were last forgotten
}

func newLimiter(l Limits) *limiter {
	return &limiter{
		each: l.PerSource, burst: l.Burst,
		all:     rate.NewLimiter(l.Overall, max(2*int(l.Overall), 1)),
		slots:   make(chan struct{}, l.InFlight),
		sources: map[string]*rate.Limiter{},
	}
}

// enter reports whether a request may go on; then leave must be called.
func (l *limiter) enter(key string, now time.Time) bool {
	// The source first: one that asks too often must not use up what is for all.
	if !l.source(key, now).AllowN(now, 1) || !l.all.AllowN(now, 1) {
		return false
	}
	select {
	case l.slots <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l *limiter) leave() { <-l.slots }

// source returns the limiter of a key. When too many are remembered, those that have
// been idle long enough to be as good as new are forgotten; if there are none, a
// newcomer shares one limiter with all other newcomers.
func (l *limiter) source(key string, now time.Time) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s, ok := l.sources[key]; ok {
		return s
	}
	if len(l.sources) >= maxSources && now.Sub(l.swept) >= time.Second { // it costs
		l.swept = now
		for k, s := range l.sources {
			if s.TokensAt(now) >= float64(l.burst) {
				delete(l.sources, k)
			}
		}
	}
	if len(l.sources) >= maxSources {
		key = "" // no address
		if s, ok := l.sources[key]; ok {
			return s
		}
	}
	s := rate.NewLimiter(l.each, l.burst)
	l.sources[key] = s
	return s
}

// sourceOf is whom a request is counted to: an IPv4 address, or the /64 that one
// IPv6 customer has.
func sourceOf(r *http.Request) string {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	addr := ap.Addr().Unmap().WithZone("")
	if addr.Is6() {
		if p, err := addr.Prefix(64); err == nil {
			return p.String()
		}
	}
	return addr.String()
}
