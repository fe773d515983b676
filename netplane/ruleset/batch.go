package ruleset

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	// maxMessage keeps the elements of one message well below the 65,535 bytes that a
	// netlink attribute can hold.
	maxMessage = 32 << 10
	// maxTransaction is the most that is sent at once, in bytes; what is more is several
	// transactions, each of which leaves the table sound.
	maxTransaction = 6 << 20
)

// What nf_tables.h and nft's own header files number.
const (
	setConcat     = 0x80 // NFT_SET_CONCAT
	setDescConcat = 2    // NFTA_SET_DESC_CONCAT

	typeIPAddr      = 7
	typeIP6Addr     = 8
	typeInetProto   = 12
	typeInetService = 13
	typeBits        = 6
)

// batch is a transaction that is being written; what does not fit is sent in between.
type batch struct {
	k     *Kernel
	first uint32
	last  int // where the last message begins, and its number
	seq   uint32
	err   error
}

func (k *Kernel) begin() *batch {
	b := &batch{k: k}
	b.open()
	return b
}

func (b *batch) open() {
	b.k.c.Reset()
	_, b.first = b.control(unix.NFNL_MSG_BATCH_BEGIN)
	b.seq = 0
}

func (b *batch) control(kind uint16) (at int, seq uint32) {
	return b.k.c.Message(kind, 0, [4]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES})
}

// message begins one; end ends it.
func (b *batch) message(kind, flags uint16) {
	if len(b.k.c.Buf) > maxTransaction {
		b.flush()
		b.open()
	}
	b.last, b.seq = b.k.c.Message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, [4]byte{b.k.f.Number, unix.NFNETLINK_V0})
}

func (b *batch) end() { b.k.c.End(b.last) }

func (b *batch) text(kind uint16, s string) { b.k.c.Attr(kind, s+"\x00") }

func (b *batch) number(kind uint16, n uint32) {
	b.k.c.Attr(kind, string(binary.BigEndian.AppendUint32(nil, n)))
}

// commit sends what was written and waits for the kernel's answer.
func (b *batch) commit() error {
	b.flush()
	return b.err
}

func (b *batch) flush() {
	if b.seq == 0 || b.err != nil {
		return
	}
	c := b.k.c
	c.Ask(b.last) // refused messages answer anyway
	b.control(unix.NFNL_MSG_BATCH_END)
	if b.err = c.Send(); b.err == nil {
		b.err = c.Wait(b.first, b.seq, func(seq uint32, err error) error {
			return fmt.Errorf("message %d of %d: %w", seq-b.first, b.seq-b.first, err)
		})
	}
}

func (b *batch) table(kind, flags uint16) {
	b.message(kind, flags)
	b.text(unix.NFTA_TABLE_NAME, b.k.name)
	b.end()
}

// named is a message about something with a name.
func (b *batch) named(kind, table, attr uint16, name string) {
	b.message(kind, 0)
	b.text(table, b.k.name)
	b.text(attr, name)
	b.end()
}

func (b *batch) newChain(name string, hook *Hook) {
	c := b.k.c
	b.message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE)
	b.text(unix.NFTA_CHAIN_TABLE, b.k.name)
	b.text(unix.NFTA_CHAIN_NAME, name)
	if hook != nil {
		nest := c.Nest(unix.NFTA_CHAIN_HOOK)
		b.number(unix.NFTA_HOOK_HOOKNUM, hook.Number)
		b.number(unix.NFTA_HOOK_PRIORITY, uint32(hook.Priority))
		c.Unnest(nest)
		b.text(unix.NFTA_CHAIN_TYPE, "filter")
	}
	b.end()
}

func (b *batch) newRule(chain string, rule []expr.Any) error {
	c, f := b.k.c, b.k.f
	mark, err := Tag(f.Number, rule)
	if err != nil {
		return fmt.Errorf("chain %s: %w", chain, err)
	}
	b.message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND)
	b.text(unix.NFTA_RULE_TABLE, b.k.name)
	b.text(unix.NFTA_RULE_CHAIN, chain)
	list := c.Nest(unix.NFTA_RULE_EXPRESSIONS)
	for _, e := range rule {
		body, err := expr.Marshal(f.Number, e)
		if err != nil {
			return fmt.Errorf("chain %s: encode %T: %w", chain, e, err)
		}
		c.Attr(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, string(body))
	}
	c.Unnest(list)
	c.Attr(unix.NFTA_RULE_USERDATA, mark)
	b.end()
	return nil
}

// flushChain removes all rules of a chain.
func (b *batch) flushChain(name string) {
	b.named(unix.NFT_MSG_DELRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, name)
}

// shape is how the kernel knows a kind: the type that listings show, and the lengths of
// the fields of a key.
func (f *Family) shape(kind Kind) (typ, flags uint32, fields []uint32) {
	switch kind {
	case Ranges:
		return f.addrType, unix.NFT_SET_INTERVAL, []uint32{f.Bytes()}
	case Pairs:
		return f.addrType<<typeBits | f.addrType, setConcat, []uint32{f.Bytes(), f.Bytes()}
	case Ports:
		return (f.addrType<<typeBits|typeInetProto)<<typeBits | typeInetService, setConcat, []uint32{f.Bytes(), 1, 2}
	case Verdicts:
		return f.addrType, unix.NFT_SET_MAP, []uint32{f.Bytes()}
	}
	return f.addrType, 0, []uint32{f.Bytes()}
}

func (b *batch) newSet(name string, kind Kind) {
	c := b.k.c
	typ, flags, fields := b.k.f.shape(kind)
	b.k.sets++
	b.message(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE)
	b.text(unix.NFTA_SET_TABLE, b.k.name)
	b.text(unix.NFTA_SET_NAME, name)
	b.number(unix.NFTA_SET_ID, b.k.sets)
	b.number(unix.NFTA_SET_FLAGS, flags)
	b.number(unix.NFTA_SET_KEY_TYPE, typ)
	b.number(unix.NFTA_SET_KEY_LEN, keyBytes(fields))
	if kind == Verdicts {
		b.number(unix.NFTA_SET_DATA_TYPE, unix.NFT_DATA_VERDICT)
		b.number(unix.NFTA_SET_DATA_LEN, 0)
	}
	if flags&setConcat != 0 { // nft lists such sets by it
		desc := c.Nest(unix.NFTA_SET_DESC)
		concat := c.Nest(setDescConcat)
		for _, n := range fields {
			field := c.Nest(unix.NFTA_LIST_ELEM)
			b.number(1, n) // NFTA_SET_FIELD_LEN
			c.Unnest(field)
		}
		c.Unnest(concat)
		c.Unnest(desc)
	}
	// That keys are in network byte order, for nft (libnftnl's udata.h).
	c.Attr(unix.NFTA_SET_USERDATA, string(binary.NativeEndian.AppendUint32([]byte{0, 4}, 2)))
	b.end()
}

// keyBytes is the length of a key with its parts padded.
func keyBytes(fields []uint32) (n uint32) {
	for _, f := range fields {
		n += (f + 3) &^ 3
	}
	return n
}

func (b *batch) elements(c change) {
	b.list(unix.NFT_MSG_DELSETELEM, c, c.dels)
	b.list(unix.NFT_MSG_NEWSETELEM, c, c.adds)
}

func (b *batch) list(kind uint16, c change, es []Elem) {
	w := b.k.c
	for len(es) > 0 {
		b.message(kind, unix.NLM_F_CREATE)
		b.text(unix.NFTA_SET_ELEM_LIST_TABLE, b.k.name)
		b.text(unix.NFTA_SET_ELEM_LIST_SET, c.name)
		list := w.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for len(es) > 0 && len(w.Buf)-b.last < maxMessage {
			b.element(c.kind, es[0], kind == unix.NFT_MSG_NEWSETELEM)
			es = es[1:]
		}
		w.Unnest(list)
		b.end()
	}
}

func (b *batch) element(kind Kind, e Elem, value bool) {
	if kind != Ranges {
		b.item(e.Key, 0, e.Val, value && kind == Verdicts)
		return
	}
	b.item(e.Key, 0, "", false)
	last, _ := netip.AddrFromSlice([]byte(e.Val))
	if after := last.Next(); after.IsValid() {
		b.item(string(after.AsSlice()), unix.NFT_SET_ELEM_INTERVAL_END, "", false)
	}
}

func (b *batch) item(key string, flags uint32, chain string, verdict bool) {
	w := b.k.c
	item := w.Nest(unix.NFTA_LIST_ELEM)
	if flags != 0 {
		b.number(unix.NFTA_SET_ELEM_FLAGS, flags)
	}
	nest := w.Nest(unix.NFTA_SET_ELEM_KEY)
	w.Attr(unix.NFTA_DATA_VALUE, key)
	w.Unnest(nest)
	if verdict {
		data := w.Nest(unix.NFTA_SET_ELEM_DATA)
		v := w.Nest(unix.NFTA_DATA_VERDICT)
		code := int32(unix.NFT_GOTO)
		b.number(unix.NFTA_VERDICT_CODE, uint32(code))
		b.text(unix.NFTA_VERDICT_CHAIN, chain)
		w.Unnest(v)
		w.Unnest(data)
	}
	w.Unnest(item)
}
