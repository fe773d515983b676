package dns

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// reread is how often resolv.conf is checked for changes.
	reread = 5 * time.Second
	// firstProbe is how soon an upstream that does not answer is asked again, and
	// lastProbe how far apart that comes to be.
	firstProbe, lastProbe = 500 * time.Millisecond, 15 * time.Second
	// probeDomain is what probes ask for: a name that nobody has (RFC 6761, 6.4), each
	// another one. What comes back to this server shows a loop.
	probeDomain = ".probe.decree.invalid."
)

// probes are those under way.
type probes struct {
	mu   sync.Mutex
	sent map[string]*probe
}

type probe struct {
	to   *upstream
	back bool // it came to this server
}

// send makes a name that shows when u leads back here.
func (p *probes) send(u *upstream) (name string) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	name = hex.EncodeToString(b[:]) + probeDomain
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sent == nil {
		p.sent = map[string]*probe{}
	}
	p.sent[name] = &probe{to: u}
	return name
}

// done ends a probe and reports whether it came back.
func (p *probes) done(name string) (back bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	back = p.sent[name].back
	delete(p.sent, name)
	return back
}

// seen notes a query from outside, and reports whether it is a probe of ours.
func (p *probes) seen(name string) bool {
	if !strings.HasSuffix(name, probeDomain) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	sent := p.sent[name]
	if sent == nil {
		return false
	}
	sent.back = true
	sent.to.loops()
	return true
}

// loops notes that the upstream asks this server.
func (u *upstream) loops() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state != looping {
		u.f.log.Error("upstream name server asks the cluster DNS in return, and is left out; name another one in the node's resolv.conf or as the stub domain's server", "server", u.addr)
	}
	u.state = looping
}

// watch follows resolv.conf and probes upstreams, each when it is new and whenever it does
// not answer, until ctx ends.
func (f *forwarder) watch(ctx context.Context) {
	var busy sync.WaitGroup
	defer busy.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		case <-timer.C:
		}
		f.reload()
		now := f.now()
		next := now + reread
		for _, u := range f.all() {
			due, ok := u.probeDue(now)
			if ok {
				busy.Go(func() { u.probe(ctx) })
			}
			if due > 0 {
				next = min(next, due)
			}
		}
		timer.Reset(next - now)
	}
}

// all are the upstreams of all groups.
func (f *forwarder) all() (list []*upstream) {
	for _, g := range append([]*group{f.upstream.Load()}, f.stubs...) {
		list = append(list, g.servers...)
	}
	return list
}

// close closes the sockets that are kept for the next questions.
func (f *forwarder) close() {
	for _, u := range f.all() {
		u.ports.close()
	}
}

// never is when an upstream is due that works.
const never time.Duration = -1

// probeDue reports whether to probe now, and when to look again; that is put off then.
func (u *upstream) probeDue(now time.Duration) (due time.Duration, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.due == never || now < u.due {
		return u.due, false
	}
	u.wait = min(max(2*u.wait, firstProbe), lastProbe)
	u.due = now + u.wait + tryTimeout // unless the probe says otherwise first
	return u.due, true
}

// probe asks the upstream for a name that nobody has. Any answer will do.
func (u *upstream) probe(ctx context.Context) {
	name := u.f.probes.send(u)
	_, err := u.exchange(ctx, name, dns.TypeA, 0)
	back := u.f.probes.done(name)
	u.mu.Lock()
	defer u.mu.Unlock()
	if err != nil || back {
		return
	}
	if u.state == looping {
		u.f.log.Info("upstream name server does not ask the cluster DNS any more", "server", u.addr)
		u.state = unsure
	}
	u.due, u.wait = never, 0
}
