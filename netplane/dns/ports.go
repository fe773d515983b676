package dns

import (
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// Sockets are used again, as opening one is most of the work of asking an upstream. For
// who wants to forge answers the port stays unknown: it is one of many, and is found out
// no sooner than it is closed.
const (
	maxPorts = 64
	portUses = 16
	portAge  = time.Second
)

// ports are the sockets to an upstream whose questions have all been answered.
type ports struct {
	mu   sync.Mutex
	free []port
}

type port struct {
	net.Conn
	opened time.Duration
	uses   int
}

// take returns any of the sockets that are not too old, if there is one.
func (p *ports) take(now time.Duration) (port, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n := len(p.free); n > 0; n = len(p.free) {
		i := rand.IntN(n)
		s := p.free[i]
		p.free[i] = p.free[n-1]
		p.free = p.free[:n-1]
		if now-s.opened <= portAge {
			return s, true
		}
		s.Close()
	}
	return port{}, false
}

// give takes a socket back. Nothing may be under way on it.
func (p *ports) give(s port) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.uses++; s.uses >= portUses || len(p.free) >= maxPorts {
		s.Close()
		return
	}
	p.free = append(p.free, s)
}

// close closes the sockets that are not in use.
func (p *ports) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.free {
		s.Close()
	}
	p.free = nil
}
