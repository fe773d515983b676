package netspacetest

import (
	"errors"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Deaf is a network namespace that hears nothing of TCP, so that who talks to it has to send again.
type Deaf struct {
	t     testing.TB
	conn  *nftables.Conn
	table *nftables.Table
	chain *nftables.Chain
}

// Deafen makes one.
func Deafen(t testing.TB, path string) *Deaf {
	t.Helper()
	d := &Deaf{t: t, table: &nftables.Table{Name: "deaf", Family: nftables.TableFamilyINet}}
	d.chain = &nftables.Chain{Name: "input", Table: d.table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter}
	In(t, path, func() (err error) {
		if d.conn, err = nftables.New(nftables.AsLasting()); err != nil {
			return err
		}
		d.conn.AddTable(d.table)
		d.conn.AddChain(d.chain)
		d.conn.AddRule(&nftables.Rule{Table: d.table, Chain: d.chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop},
		}})
		return d.conn.Flush()
	})
	return d
}

// Missed waits until so many packets were not heard.
func (d *Deaf) Missed(packets int) {
	d.t.Helper()
	count := func() uint64 {
		rules, err := d.conn.GetRules(d.table, d.chain)
		if err != nil || len(rules) != 1 {
			d.t.Fatalf("%d rules: %v", len(rules), err)
		}
		return rules[0].Exprs[2].(*expr.Counter).Packets
	}
	for end := time.Now().Add(10 * time.Second); count() < uint64(packets); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("only %d of %d packets arrived", count(), packets)
		}
	}
}

// End makes it hear again.
func (d *Deaf) End() {
	d.t.Helper()
	d.conn.DelTable(d.table)
	if err := errors.Join(d.conn.Flush(), d.conn.CloseLasting()); err != nil {
		d.t.Fatal(err)
	}
}
