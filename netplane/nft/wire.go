package nft

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/wire"
)

// maxMessage keeps the elements of one message well below the 65,535 bytes that a
// netlink attribute can hold.
const maxMessage = 32 << 10

const (
	// setElemKeyEnd is NFTA_SET_ELEM_KEY_END of nf_tables.h.
	setElemKeyEnd = 10
	// nfDrop is NF_DROP of netfilter.h.
	nfDrop = 0
	// verdictDrop stands for a verdict instead of the name of a chain.
	verdictDrop = "drop"
)

// elementWire sends set elements to the kernel. It is apart from the netlink library
// because that one costs several allocations for each attribute of each element,
// and a cluster's services are hundreds of thousands of them.
type elementWire struct{ *wire.Conn }

// openWire opens a socket in the network namespace of the calling thread.
func openWire() (*elementWire, error) {
	c, err := wire.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &elementWire{c}, nil
}

// commit deletes, then adds elements of a table, in one transaction: all or none.
// One message carries as many of one set as it can.
func (w *elementWire) commit(ctx context.Context, f *family, table string, dels, adds []element) error {
	if len(dels)+len(adds) == 0 {
		return nil
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	w.Reset()
	_, first := w.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	at, last := w.elements(unix.NFT_MSG_DELSETELEM, f, table, dels)
	if len(adds) > 0 {
		at, last = w.elements(unix.NFT_MSG_NEWSETELEM, f, table, adds)
	}
	// Only the last message asks for an answer; refused ones answer anyway.
	w.Ask(at)
	w.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	if err := w.Send(); err != nil {
		return err
	}
	return w.Wait(first, last, func(_ uint32, err error) error { return fmt.Errorf("set elements: %w", err) })
}

// message begins a message with an nfgenmsg.
func (w *elementWire) message(kind, flags uint16, fam uint8, res uint16) (at int, seq uint32) {
	return w.Message(kind, flags, [4]byte{fam, unix.NFNETLINK_V0, byte(res >> 8), byte(res)})
}

func (w *elementWire) attr32(kind uint16, v uint32) {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	w.Attr(kind, string(b[:]))
}

// elements writes messages of the given kind, and returns where the last one
// begins and its number.
func (w *elementWire) elements(kind uint16, f *family, table string, es []element) (at int, seq uint32) {
	es = grouped(es)
	for len(es) > 0 {
		id := es[0].set
		at, seq = w.message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_CREATE, uint8(f.nf), 0)
		w.Attr(unix.NFTA_SET_ELEM_LIST_TABLE, table+"\x00")
		w.Attr(unix.NFTA_SET_ELEM_LIST_SET, setNames[id]+"\x00")
		list := w.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for len(es) > 0 && es[0].set == id && len(w.Buf)-at < maxMessage {
			w.element(&es[0], kind == unix.NFT_MSG_NEWSETELEM)
			es = es[1:]
		}
		w.Unnest(list)
		w.End(at)
	}
	return at, seq
}

func (w *elementWire) element(e *element, value bool) {
	item := w.Nest(unix.NFTA_LIST_ELEM)
	if e.end {
		w.attr32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	key := w.Nest(unix.NFTA_SET_ELEM_KEY)
	w.Attr(unix.NFTA_DATA_VALUE, e.key)
	w.Unnest(key)
	switch {
	case e.set == allowed:
		last := w.Nest(setElemKeyEnd)
		w.Attr(unix.NFTA_DATA_VALUE, e.val)
		w.Unnest(last)
	case !value || e.val == "":
	case e.set == balancers:
		data := w.Nest(unix.NFTA_SET_ELEM_DATA)
		w.verdict(e.val)
		w.Unnest(data)
	default:
		data := w.Nest(unix.NFTA_SET_ELEM_DATA)
		w.Attr(unix.NFTA_DATA_VALUE, e.val)
		w.Unnest(data)
	}
	w.Unnest(item)
}

// verdict writes where to go: a chain, or nowhere.
func (w *elementWire) verdict(chain string) {
	verdict := w.Nest(unix.NFTA_DATA_VERDICT)
	if chain == verdictDrop {
		w.attr32(unix.NFTA_VERDICT_CODE, nfDrop)
	} else {
		code := int32(unix.NFT_GOTO)
		w.attr32(unix.NFTA_VERDICT_CODE, uint32(code))
		w.Attr(unix.NFTA_VERDICT_CHAIN, chain+"\x00")
	}
	w.Unnest(verdict)
}

// contents hands on the elements of a set. The kernel begins at the start of a set
// for every datagram, so that reading it in large ones matters.
func (w *elementWire) contents(f *family, table string, id setID, each func(element)) error {
	w.Reset()
	at, _ := w.message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, uint8(f.nf), 0)
	w.Attr(unix.NFTA_SET_ELEM_LIST_TABLE, table+"\x00")
	w.Attr(unix.NFTA_SET_ELEM_LIST_SET, setNames[id]+"\x00")
	w.End(at)
	return w.Dump(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWSETELEM, func(body []byte) {
		wire.Attributes(body, func(kind uint16, list []byte) {
			if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			wire.Attributes(list, func(_ uint16, item []byte) { each(decodeElement(id, item)) })
		})
	})
}

func decodeElement(id setID, item []byte) element {
	e := element{set: id}
	wire.Attributes(item, func(kind uint16, v []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = len(v) == 4 && binary.BigEndian.Uint32(v)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_KEY:
			wire.Attributes(v, func(_ uint16, v []byte) { e.key = string(v) })
		case setElemKeyEnd:
			wire.Attributes(v, func(_ uint16, v []byte) { e.val = string(v) })
		case unix.NFTA_SET_ELEM_DATA:
			wire.Attributes(v, func(kind uint16, v []byte) {
				if kind == unix.NFTA_DATA_VERDICT {
					e.val = verdictOf(v)
				} else {
					e.val = string(v)
				}
			})
		}
	})
	return e
}

// verdictOf takes the chain, or verdictDrop, out of an encoded verdict.
func verdictOf(b []byte) (chain string) {
	wire.Attributes(b, func(kind uint16, v []byte) {
		switch {
		case kind == unix.NFTA_VERDICT_CHAIN:
			chain = string(bytes.TrimRight(v, "\x00"))
		case kind == unix.NFTA_VERDICT_CODE && len(v) == 4 && binary.BigEndian.Uint32(v) == nfDrop:
			chain = verdictDrop
		}
	})
	return chain
}
