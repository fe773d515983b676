package ruleset

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/wire"
)

// Kernel is one table of one family in the kernel. It is not safe for concurrent use.
type Kernel struct {
	f    *Family
	name string
	c    *wire.Conn
	sets uint32 // numbers for the sets of a transaction
	// have is what the kernel holds, nil if that is not known; empty says that there is
	// no table.
	have  *Table
	empty bool
	// closed: a socket's number may be another's by now.
	closed bool
}

// Open opens the socket, in the network namespace of the calling thread, and changes
// nothing yet.
func Open(f *Family, name string) (*Kernel, error) {
	c, err := wire.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &Kernel{f: f, name: name, c: c}, nil
}

// Close closes the socket; what the kernel holds stays.
func (k *Kernel) Close() error {
	if k.closed {
		return nil
	}
	k.closed = true
	return k.c.Close()
}

// Apply makes the kernel hold want, nil meaning no table, and returns how many chains,
// sets and elements it had to change. What it began and could not finish is read back and
// finished by the next call. want must not change afterwards.
func (k *Kernel) Apply(ctx context.Context, want *Table) (int, error) {
	if k.closed {
		return 0, fmt.Errorf("table %s %s: %w", k.f.Name, k.name, os.ErrClosed)
	}
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	if k.have == nil && !k.empty {
		if err := k.Read(ctx, want); err != nil {
			return 0, err
		}
	}
	if want == nil {
		return k.drop()
	}
	have, anew := k.have, false
	if have == nil || changed(have, want) {
		have, anew = &Table{}, true
	}
	b, n, err := k.plan(have, want, anew)
	if err != nil || n == 0 {
		return 0, err
	}
	k.have, k.empty = nil, false // until all is done
	if err := b.commit(); err != nil {
		return n, fmt.Errorf("table %s %s: %w", k.f.Name, k.name, err)
	}
	k.have = want
	return n, nil
}

// changed reports whether something would have to change that never does.
func changed(have, want *Table) bool {
	for name, s := range want.Sets {
		if h := have.Sets[name]; h != nil && (h.Kind != s.Kind || s.Kind == Ranges && !slices.Equal(h.Elems, s.Elems)) {
			return true
		}
	}
	return false
}

func (k *Kernel) drop() (int, error) {
	if k.empty {
		return 0, nil
	}
	k.have = nil
	b := k.begin()
	b.table(unix.NFT_MSG_DELTABLE, 0)
	if err := b.commit(); err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, fmt.Errorf("delete table %s %s: %w", k.f.Name, k.name, err)
	}
	k.empty = true
	return 1, nil
}

// plan writes the transaction from have to want. Everything that is new is there before
// anything leads to it, and what is old goes when nothing does any more.
func (k *Kernel) plan(have, want *Table, anew bool) (*batch, int, error) {
	b, n := k.begin(), 0
	if anew {
		b.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE) // so that deleting it cannot fail
		b.table(unix.NFT_MSG_DELTABLE, 0)
		b.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
		n++
	}
	setsBefore, setsAfter := names(have.Sets, want.Sets)
	for _, name := range setsAfter {
		b.newSet(name, want.Sets[name].Kind)
	}
	changes := elementChanges(have, want)
	for _, c := range changes {
		n += len(c.dels) + len(c.adds)
		if c.kind != Verdicts {
			b.elements(c)
		}
	}
	chainsBefore, chainsAfter := names(have.Chains, want.Chains)
	for _, name := range chainsAfter {
		b.newChain(name, want.Chains[name].Hook)
	}
	for _, name := range chainsAfter {
		for _, rule := range want.Chains[name].Rules {
			if err := b.newRule(name, rule); err != nil {
				return nil, 0, err
			}
		}
	}
	for _, c := range changes {
		if c.kind == Verdicts {
			b.elements(c)
		}
	}
	for _, name := range chainsBefore {
		b.flushChain(name)
	}
	for _, name := range chainsBefore {
		b.named(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, name)
	}
	for _, name := range setsBefore {
		b.named(unix.NFT_MSG_DELSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, name)
	}
	return b, n + len(setsBefore) + len(setsAfter) + len(chainsBefore) + len(chainsAfter), nil
}

// names are those that only have has, and those that only want has, in order.
func names[T any](have, want map[string]T) (before, after []string) {
	for name := range have {
		if _, ok := want[name]; !ok {
			before = append(before, name)
		}
	}
	for name := range want {
		if _, ok := have[name]; !ok {
			after = append(after, name)
		}
	}
	slices.Sort(before)
	slices.Sort(after)
	return before, after
}

// elementChanges are those of all sets of want that differ, in the order of their names.
func elementChanges(have, want *Table) []change {
	var out []change
	for _, name := range slices.Sorted(maps.Keys(want.Sets)) {
		c := change{name: name, kind: want.Sets[name].Kind}
		var before []Elem
		if h := have.Sets[name]; h != nil {
			if before = h.Elems; h == want.Sets[name] {
				continue
			}
		}
		if c.dels, c.adds = difference(before, want.Sets[name].Elems); len(c.dels)+len(c.adds) > 0 {
			out = append(out, c)
		}
	}
	return out
}
