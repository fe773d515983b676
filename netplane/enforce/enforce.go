// Package enforce holds a plan of network policies in the kernel: in nftables tables of
// their own, whatever balances services, and by ending connections that are not allowed
// any more.
//
// Packets are judged on their way out of the node's network stack, where their destination
// is the real one and their source still is (see DESIGN.md of netplane). Every packet that
// the beginner of a connection sends is judged, replies are not.
package enforce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/flows"
	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/ruleset"
)

// DefaultTable is the name of the tables unless told otherwise.
const DefaultTable = "decree-policy"

var families = [...]*ruleset.Family{ruleset.IPv4, ruleset.IPv6}

// Policies are the network policies that a kernel enforces. All methods are safe for
// concurrent use; they take turns.
type Policies struct {
	log *slog.Logger

	mu      sync.Mutex
	kernels [len(families)]*ruleset.Kernel
	flows   *flows.Table
	links   *netlink.Handle
	// want is the last plan, nil before the first; tables are what it came to.
	want   *policy.Plan
	tables [len(families)]*ruleset.Table
	// unswept: connections that want does not allow may go on.
	unswept bool
}

// New opens the sockets, in the network namespace of the calling thread, and changes
// nothing yet. table names the tables; empty means DefaultTable.
func New(table string, log *slog.Logger) (*Policies, error) {
	if table == "" {
		table = DefaultTable
	}
	e := &Policies{log: log}
	for i, f := range families {
		k, err := ruleset.Open(f, table)
		if err != nil {
			return nil, errors.Join(err, e.Close())
		}
		e.kernels[i] = k
	}
	var err error
	if e.flows, err = flows.Open(); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	if e.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, errors.Join(fmt.Errorf("open routes: %w", err), e.Close())
	}
	return e, nil
}

// Close closes the sockets; what the kernel holds stays.
func (e *Policies) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	for _, k := range e.kernels {
		if k != nil {
			errs = append(errs, k.Close())
		}
	}
	if e.flows != nil {
		e.flows.Close()
	}
	if e.links != nil {
		e.links.Close()
	}
	return errors.Join(errs...)
}

// Set makes the kernel enforce a plan, which must not change afterwards, and returns how
// much of its tables it had to change. Everything of a family changes at once. ranges are
// addresses that are local to the node, besides those of its interfaces.
//
// Connections that the plan does not allow any more end: their packets are dropped as soon
// as it is in force, and what the kernel remembers of them is deleted before Set returns.
// After an error the next Set does what is left.
func (e *Policies) Set(ctx context.Context, p *policy.Plan, ranges []netip.Prefix) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.want == nil || closes(e.want, p) {
		e.unswept = len(p.Subjects) > 0
	}
	n := 0
	for i, f := range families {
		t := table(f, p)
		m, err := e.kernels[i].Apply(ctx, t)
		n += m
		if err != nil {
			e.want = nil // so that nothing is taken for enforced
			return n, fmt.Errorf("network policies: %w", err)
		}
		e.tables[i] = t
	}
	e.want = p
	if !e.unswept {
		return n, nil
	}
	if err := e.sweep(p, ranges); err != nil {
		return n, fmt.Errorf("end connections that network policies do not allow: %w", err)
	}
	e.unswept = false
	return n, nil
}

// Read compares the kernel with the last Set; what differs is repaired by the next one. It
// returns whether all was as it should be, and does nothing before the first Set.
func (e *Policies) Read(ctx context.Context) (bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.want == nil {
		return true, nil
	}
	sound := true
	for i, k := range e.kernels {
		if err := k.Read(ctx, e.tables[i]); err != nil {
			return false, fmt.Errorf("network policies: %w", err)
		}
		sound = sound && k.Holds(e.tables[i])
	}
	if !sound {
		e.unswept = true
	}
	return sound, nil
}

// Purge removes the tables: nothing is isolated any more.
func (e *Policies) Purge(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.want, e.unswept = nil, false
	for i, k := range e.kernels {
		if _, err := k.Apply(ctx, nil); err != nil {
			return fmt.Errorf("network policies: %w", err)
		}
		e.tables[i] = nil
	}
	return nil
}
