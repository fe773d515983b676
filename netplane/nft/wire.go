package nft

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxMessage keeps the elements of one message well below the 65,535 bytes that a
	// netlink attribute can hold.
	maxMessage = 32 << 10
	// sendBuffer is the largest transaction the socket takes.
	sendBuffer = 8 << 20
	// replyTimeout bounds the wait for the kernel; it answers within the send.
	replyTimeout = 10 * time.Second
)

const (
	// setElemKeyEnd is NFTA_SET_ELEM_KEY_END of nf_tables.h.
	setElemKeyEnd = 10
	// nfDrop is NF_DROP of netfilter.h.
	nfDrop = 0
	// verdictDrop stands for a verdict instead of the name of a chain.
	verdictDrop = "drop"
)

// errInterrupted: the tables changed while they were read. The rest of that answer
// is skipped by its number.
var errInterrupted = errors.New("the tables changed while they were read")

// wire sends set elements to the kernel. It is apart from the netlink library
// because that one costs several allocations for each attribute of each element,
// and a cluster's services are hundreds of thousands of them.
type wire struct {
	fd  int
	seq uint32
	buf []byte
	in  [64 << 10]byte
}

// openWire opens a socket in the network namespace of the calling thread.
func openWire() (*wire, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	w := &wire{fd: fd}
	if err := w.configure(); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return w, nil
}

func (w *wire) configure() error {
	if err := unix.Bind(w.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind netlink socket: %w", err)
	}
	if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer); err != nil {
		return fmt.Errorf("enlarge netlink send buffer (needs CAP_NET_ADMIN): %w", err)
	}
	tv := unix.NsecToTimeval(replyTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("bound netlink replies: %w", err)
	}
	return nil
}

func (w *wire) close() error { return unix.Close(w.fd) }

// commit deletes, then adds elements of a table, in one transaction: all or none.
// It reorders both slices by set, so that one message carries as many as it can.
func (w *wire) commit(ctx context.Context, f *family, table string, dels, adds []element) error {
	if len(dels)+len(adds) == 0 {
		return nil
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	w.buf = w.buf[:0]
	first := w.seq + 1
	w.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	last := w.elements(unix.NFT_MSG_DELSETELEM, f, table, dels)
	if n := w.elements(unix.NFT_MSG_NEWSETELEM, f, table, adds); n >= 0 {
		last = n
	}
	// Only the last message asks for an answer; refused ones answer anyway.
	flags := w.buf[last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	want := binary.NativeEndian.Uint32(w.buf[last+8:])
	w.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	if err := unix.Sendto(w.fd, w.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send %d bytes of set elements: %w", len(w.buf), err)
	}
	return w.reply(first, want)
}

// reply waits for the answer to message want; an error of any message since first
// is the error of the transaction.
func (w *wire) reply(first, want uint32) error {
	for {
		done := false
		err := w.receive(func(kind, _ uint16, seq uint32, body []byte) error {
			if kind != unix.NLMSG_ERROR || seq-first > want-first {
				return nil
			}
			done = done || seq == want
			if err := errnoOf(body); err != nil {
				return fmt.Errorf("set elements: %w", err)
			}
			return nil
		})
		if err != nil || done {
			return err
		}
	}
}

// message begins a message and returns where; its length is set by end.
func (w *wire) message(kind, flags uint16, fam uint8, res uint16) int {
	at := len(w.buf)
	w.seq++
	b := binary.NativeEndian.AppendUint32(w.buf, unix.NLMSG_HDRLEN+4)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, w.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, fam, unix.NFNETLINK_V0)
	w.buf = binary.BigEndian.AppendUint16(b, res)
	return at
}

func (w *wire) end(at int) {
	binary.NativeEndian.PutUint32(w.buf[at:], uint32(len(w.buf)-at))
}

// nest begins an attribute that holds attributes.
func (w *wire) nest(kind uint16) int {
	at := len(w.buf)
	w.buf = append(w.buf, 0, 0, 0, 0)
	binary.NativeEndian.PutUint16(w.buf[at+2:], kind|unix.NLA_F_NESTED)
	return at
}

func (w *wire) unnest(at int) {
	binary.NativeEndian.PutUint16(w.buf[at:], uint16(len(w.buf)-at))
}

func (w *wire) attr(kind uint16, v string) {
	b := binary.NativeEndian.AppendUint16(w.buf, uint16(4+len(v)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, v...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	w.buf = b
}

func (w *wire) attr32(kind uint16, v uint32) {
	b := binary.NativeEndian.AppendUint16(w.buf, 8)
	b = binary.NativeEndian.AppendUint16(b, kind)
	w.buf = binary.BigEndian.AppendUint32(b, v)
}

// elements writes messages of the given kind, and returns where the last one
// begins, or -1.
func (w *wire) elements(kind uint16, f *family, table string, es []element) int {
	sortElements(es)
	at := -1
	for len(es) > 0 {
		id := es[0].set
		at = w.message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_CREATE, uint8(f.nf), 0)
		w.attr(unix.NFTA_SET_ELEM_LIST_TABLE, table+"\x00")
		w.attr(unix.NFTA_SET_ELEM_LIST_SET, setNames[id]+"\x00")
		list := w.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for len(es) > 0 && es[0].set == id && len(w.buf)-at < maxMessage {
			w.element(&es[0], kind == unix.NFT_MSG_NEWSETELEM)
			es = es[1:]
		}
		w.unnest(list)
		w.end(at)
	}
	return at
}

func (w *wire) element(e *element, value bool) {
	item := w.nest(unix.NFTA_LIST_ELEM)
	if e.end {
		w.attr32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	key := w.nest(unix.NFTA_SET_ELEM_KEY)
	w.attr(unix.NFTA_DATA_VALUE, e.key)
	w.unnest(key)
	switch {
	case e.set == allowed:
		last := w.nest(setElemKeyEnd)
		w.attr(unix.NFTA_DATA_VALUE, e.val)
		w.unnest(last)
	case !value || e.val == "":
	case e.set == services || e.set == split:
		data := w.nest(unix.NFTA_SET_ELEM_DATA)
		w.verdict(e.val)
		w.unnest(data)
	default:
		data := w.nest(unix.NFTA_SET_ELEM_DATA)
		w.attr(unix.NFTA_DATA_VALUE, e.val)
		w.unnest(data)
	}
	w.unnest(item)
}

// verdict writes where to go: a chain, or nowhere.
func (w *wire) verdict(chain string) {
	verdict := w.nest(unix.NFTA_DATA_VERDICT)
	if chain == verdictDrop {
		w.attr32(unix.NFTA_VERDICT_CODE, nfDrop)
	} else {
		code := int32(unix.NFT_GOTO)
		w.attr32(unix.NFTA_VERDICT_CODE, uint32(code))
		w.attr(unix.NFTA_VERDICT_CHAIN, chain+"\x00")
	}
	w.unnest(verdict)
}

// ruleTags returns the user data of the rules of each chain of a table, in order.
// The netlink library decodes the rules' expressions too, and not all of them.
func (w *wire) ruleTags(f *family, table string) (map[string][]string, error) {
	w.buf = w.buf[:0]
	at := w.message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, uint8(f.nf), 0)
	w.attr(unix.NFTA_RULE_TABLE, table+"\x00")
	w.end(at)
	tags := map[string][]string{}
	err := w.dump(unix.NFT_MSG_NEWRULE, func(body []byte) {
		chain, tag := "", ""
		attributes(body, func(kind uint16, v []byte) {
			switch kind {
			case unix.NFTA_RULE_CHAIN:
				chain = string(bytes.TrimRight(v, "\x00"))
			case unix.NFTA_RULE_USERDATA:
				tag = string(v)
			}
		})
		tags[chain] = append(tags[chain], tag)
	})
	return tags, err
}

// contents hands on the elements of a set. The kernel begins at the start of a set
// for every datagram, so that reading it in large ones matters.
func (w *wire) contents(f *family, table string, id setID, each func(element)) error {
	w.buf = w.buf[:0]
	at := w.message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, uint8(f.nf), 0)
	w.attr(unix.NFTA_SET_ELEM_LIST_TABLE, table+"\x00")
	w.attr(unix.NFTA_SET_ELEM_LIST_SET, setNames[id]+"\x00")
	w.end(at)
	return w.dump(unix.NFT_MSG_NEWSETELEM, func(body []byte) {
		attributes(body, func(kind uint16, list []byte) {
			if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			attributes(list, func(_ uint16, item []byte) { each(decodeElement(id, item)) })
		})
	})
}

func decodeElement(id setID, item []byte) element {
	e := element{set: id}
	attributes(item, func(kind uint16, v []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = len(v) == 4 && binary.BigEndian.Uint32(v)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_KEY:
			attributes(v, func(_ uint16, v []byte) { e.key = string(v) })
		case setElemKeyEnd:
			attributes(v, func(_ uint16, v []byte) { e.val = string(v) })
		case unix.NFTA_SET_ELEM_DATA:
			attributes(v, func(kind uint16, v []byte) {
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
	attributes(b, func(kind uint16, v []byte) {
		switch {
		case kind == unix.NFTA_VERDICT_CHAIN:
			chain = string(bytes.TrimRight(v, "\x00"))
		case kind == unix.NFTA_VERDICT_CODE && len(v) == 4 && binary.BigEndian.Uint32(v) == nfDrop:
			chain = verdictDrop
		}
	})
	return chain
}

// dump sends the request in w.buf and hands on the bodies of the answers of a kind,
// after their nfgenmsg.
func (w *wire) dump(want uint16, each func(body []byte)) error {
	seq := w.seq
	if err := unix.Sendto(w.fd, w.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send netlink request: %w", err)
	}
	for done := false; !done; {
		err := w.receive(func(kind, flags uint16, s uint32, body []byte) error {
			switch {
			case s != seq:
			case flags&unix.NLM_F_DUMP_INTR != 0:
				return errInterrupted
			case kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR:
				done = true
				return errnoOf(body)
			case kind == unix.NFNL_SUBSYS_NFTABLES<<8|want:
				each(body[4:])
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// receive reads one datagram and hands on its messages.
func (w *wire) receive(each func(kind, flags uint16, seq uint32, body []byte) error) error {
	n, _, err := unix.Recvfrom(w.fd, w.in[:], 0)
	for errors.Is(err, unix.EINTR) {
		n, _, err = unix.Recvfrom(w.fd, w.in[:], 0)
	}
	if err != nil {
		return fmt.Errorf("receive netlink reply: %w", err)
	}
	for b := w.in[:n]; len(b) >= unix.NLMSG_HDRLEN+4; {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN+4 || size > len(b) {
			return fmt.Errorf("netlink reply of %d bytes in a datagram of %d: %w", size, len(b), unix.EBADMSG)
		}
		if err := each(binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), binary.NativeEndian.Uint32(b[8:]), b[unix.NLMSG_HDRLEN:size]); err != nil {
			return err
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil
}

// errnoOf is the error that the body of an NLMSG_ERROR carries, or nil.
func errnoOf(body []byte) error {
	if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}

// attributes hands on the attributes in b; it stops at one that does not fit.
func attributes(b []byte, each func(kind uint16, v []byte)) {
	for len(b) >= 4 {
		size := int(binary.NativeEndian.Uint16(b))
		if size < 4 || size > len(b) {
			return
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:size])
		b = b[min((size+3)&^3, len(b)):]
	}
}
