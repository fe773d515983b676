// Package simnet is an in-memory kernel for tests: it holds service tables as a
// backend does, and says what would become of a packet. It passes the same suite
// as the real backends.
package simnet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
)

// Verdict is what became of a packet. To and From are the addresses after
// translation; To is zero when it was not delivered.
type Verdict struct {
	To          netip.AddrPort
	From        netip.Addr
	Masqueraded bool
	Rejected    bool // the sender was told
	Dropped     bool // it was not
}

// Kernel is one node's kernel and the hosts around it. All methods are safe for
// concurrent use.
type Kernel struct {
	mu     sync.Mutex
	rand   *rand.Rand
	now    func() time.Time
	table  render.Table
	made   bool
	memory map[client]remembered
	hosts  map[netip.Addr]bool
	node   []Address
	served map[service]bool
	plan   *policy.Plan // nil: nobody is isolated
}

// service is what the node itself listens on, at all of its addresses.
type service struct {
	proto render.Proto
	port  uint16
}

// Address is an address of the node, used to masquerade what goes to Net.
type Address struct {
	Addr netip.Addr
	Net  netip.Prefix
}

// client is who a service with affinity remembers.
type client struct {
	addr netip.Addr
	port render.Port
}

type remembered struct {
	endpoint netip.AddrPort
	until    time.Time
}

// New returns a kernel. Its draws depend on seed only. now is its clock. The more
// specific of the node's addresses come first.
func New(seed uint64, now func() time.Time, node ...Address) *Kernel {
	return &Kernel{rand: rand.New(rand.NewPCG(seed, 0)), now: now, memory: map[client]remembered{}, hosts: map[netip.Addr]bool{}, node: node, served: map[service]bool{}}
}

// Serve makes the node listen on a port of all of its addresses.
func (k *Kernel) Serve(proto render.Proto, port uint16) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.served[service{proto, port}] = true
}

// AddHost makes an address one that packets can be delivered to.
func (k *Kernel) AddHost(a netip.Addr) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hosts[a] = true
}

// Sync implements netplane.Services.
func (k *Kernel) Sync(ctx context.Context, t render.Table) (int, error) {
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	n := len(diff.Services(k.table.Services, t.Services))
	if !k.made || !k.table.SameConfig(t) {
		n++
	}
	k.table, k.made = clone(t), true
	return n, nil
}

// Read implements netplane.Services.
func (k *Kernel) Read(ctx context.Context) (render.Table, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return clone(k.table), context.Cause(ctx)
}

// Purge implements netplane.Services.
func (k *Kernel) Purge(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.table, k.made = render.Table{}, false
	clear(k.memory)
	return context.Cause(ctx)
}

// Made reports whether there is a table.
func (k *Kernel) Made() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.made
}

// Tamper changes the table behind the backs of its users.
func (k *Kernel) Tamper(change func(*render.Table)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(&k.table)
}

func clone(t render.Table) render.Table {
	t.Services = slices.Clone(t.Services)
	for i := range t.Services {
		t.Services[i].Endpoints = slices.Clone(t.Services[i].Endpoints)
		t.Services[i].Outside = slices.Clone(t.Services[i].Outside)
	}
	return t
}

// Send follows the first packet of a connection from src to a port. A source that is an
// address of the node, or in the table's Range, which is local, is the node itself.
func (k *Kernel) Send(src netip.Addr, to render.Port) (Verdict, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	eps, svc, end := k.route(src, to)
	if end != nil {
		return *end, nil
	}
	at := eps[0]
	if svc != nil {
		at = k.pick(svc, eps, src)
	}
	return k.deliver(src, to, at)
}

// Outcomes are all that Send may say of such packets, whatever it draws and remembers.
func (k *Kernel) Outcomes(src netip.Addr, to render.Port) ([]Verdict, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	eps, _, end := k.route(src, to)
	if end != nil {
		return []Verdict{*end}, nil
	}
	var out []Verdict
	for _, at := range eps {
		v, err := k.deliver(src, to, at)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// route finds where a packet may go and which service, if any, leads there; or the end that
// it finds.
func (k *Kernel) route(src netip.Addr, to render.Port) ([]netip.AddrPort, *render.Service, *Verdict) {
	outside := !k.own(src) && !contains(k.table.Cluster, src)
	svc, listed := k.table.Find(to)
	switch {
	case listed && (svc.Drop || len(svc.Sources) > 0 && !contains(svc.Sources, src)):
		return nil, nil, &Verdict{Dropped: true}
	case listed && svc.Split && outside && len(svc.Outside) == 0:
		return nil, nil, &Verdict{Dropped: true}
	case listed && svc.Split && outside:
		return svc.Outside, svc, nil
	case listed && len(svc.Endpoints) > 0:
		return svc.Endpoints, svc, nil
	case slices.Contains(k.table.Local, to):
	case listed || contains(k.table.Range, to.Addr):
		return nil, nil, refused(to.Proto)
	case contains(k.table.Announced, to.Addr) && !k.own(src) && !k.holds(to.Addr):
		return nil, nil, refused(to.Proto)
	}
	return []netip.AddrPort{netip.AddrPortFrom(to.Addr, to.Port)}, nil, nil
}

// deliver takes a packet to where a service, or nobody, sent it on to.
func (k *Kernel) deliver(src netip.Addr, to render.Port, at netip.AddrPort) (Verdict, error) {
	v, own := Verdict{To: at, From: src}, k.own(src)
	if k.plan != nil && !k.plan.Judge(policy.Flow{From: src, To: at.Addr(), Proto: to.Proto, Port: at.Port(), FromNode: own}).Allowed {
		return Verdict{Dropped: true}, nil
	}
	switch translated := at != netip.AddrPortFrom(to.Addr, to.Port); {
	case k.holds(at.Addr()) && !k.served[service{to.Proto, at.Port()}]:
		return *refused(to.Proto), nil
	case k.holds(at.Addr()) && !own: // goes in, and never out
		return v, nil
	case !k.hosts[at.Addr()] && !k.holds(at.Addr()):
		return Verdict{Dropped: true}, nil
	case translated && (src == at.Addr() || !contains(k.table.Cluster, src) && (own || !slices.Contains(k.table.Near, at.Addr()))):
		v.Masqueraded = true
	default:
		v.Masqueraded = contains(k.table.Pods, src) && !contains(k.table.Cluster, at.Addr()) && !contains(k.table.Range, at.Addr())
	}
	if v.Masqueraded {
		i := slices.IndexFunc(k.node, func(a Address) bool { return a.Net.Contains(at.Addr()) })
		if i < 0 {
			return Verdict{}, fmt.Errorf("the node has no address towards %s", at.Addr())
		}
		v.From = k.node[i].Addr
	}
	return v, nil
}

// holds reports whether an address is the node's own.
func (k *Kernel) holds(a netip.Addr) bool {
	return slices.ContainsFunc(k.node, func(n Address) bool { return n.Addr == a })
}

// own reports whether a source is the node itself.
func (k *Kernel) own(src netip.Addr) bool { return k.holds(src) || contains(k.table.Range, src) }

// refused is the end of a packet whose sender is told, if the protocol has a way to.
func refused(p render.Proto) *Verdict {
	told := p == render.TCP || p == render.UDP || p == render.SCTP
	return &Verdict{Rejected: told, Dropped: !told}
}

// pick draws an endpoint, or takes the one remembered while it is still there.
func (k *Kernel) pick(svc *render.Service, eps []netip.AddrPort, src netip.Addr) netip.AddrPort {
	if svc.Affinity == 0 {
		return eps[k.rand.IntN(len(eps))]
	}
	who, now := client{src, svc.Port}, k.now()
	r, ok := k.memory[who]
	if !ok || !now.Before(r.until) || !slices.Contains(eps, r.endpoint) {
		r.endpoint = eps[k.rand.IntN(len(eps))]
	}
	r.until = now.Add(svc.Affinity)
	k.memory[who] = r
	return r.endpoint
}

func contains(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}
