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
	return &Kernel{rand: rand.New(rand.NewPCG(seed, 0)), now: now, memory: map[client]remembered{}, hosts: map[netip.Addr]bool{}, node: node}
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
	}
	return t
}

// Send follows the first packet of a connection from src to a port.
func (k *Kernel) Send(src netip.Addr, to render.Port) (Verdict, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	v := Verdict{To: netip.AddrPortFrom(to.Addr, to.Port), From: src}
	svc, listed := k.table.Find(to)
	switch {
	case listed && len(svc.Endpoints) > 0:
		v.To = k.pick(svc, src)
		if src == v.To.Addr() || !contains(k.table.Cluster, src) {
			v.Masqueraded = true
		}
	case slices.Contains(k.table.Local, to):
		return v, nil
	case listed || contains(k.table.Range, to.Addr):
		told := to.Proto == render.TCP || to.Proto == render.UDP || to.Proto == render.SCTP
		return Verdict{Rejected: told, Dropped: !told}, nil
	default:
		v.Masqueraded = contains(k.table.Pods, src) && !contains(k.table.Cluster, to.Addr)
	}
	if !k.hosts[v.To.Addr()] {
		return Verdict{Dropped: true}, nil
	}
	if v.Masqueraded {
		i := slices.IndexFunc(k.node, func(a Address) bool { return a.Net.Contains(v.To.Addr()) })
		if i < 0 {
			return Verdict{}, fmt.Errorf("the node has no address towards %s", v.To.Addr())
		}
		v.From = k.node[i].Addr
	}
	return v, nil
}

// pick draws an endpoint, or takes the one remembered while it is still there.
func (k *Kernel) pick(svc *render.Service, src netip.Addr) netip.AddrPort {
	if svc.Affinity == 0 {
		return svc.Endpoints[k.rand.IntN(len(svc.Endpoints))]
	}
	who, now := client{src, svc.Port}, k.now()
	r, ok := k.memory[who]
	if !ok || !now.Before(r.until) || !slices.Contains(svc.Endpoints, r.endpoint) {
		r.endpoint = svc.Endpoints[k.rand.IntN(len(svc.Endpoints))]
	}
	r.until = now.Add(svc.Affinity)
	k.memory[who] = r
	return r.endpoint
}

func contains(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}
