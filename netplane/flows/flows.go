// Package flows makes the kernel forget connections: those of addresses that are given back, so
// that who gets an address next has nothing of what another one began (what conntrack remembers
// of translated UDP would send its answers, and its packets, to the wrong place), and those that
// services or network policies have ended.
package flows

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace"
)

// What nl lacks of linux/netfilter/nfnetlink_conntrack.h: filters of dumps, since Linux 5.8.
// An older kernel lists everything.
const (
	ctaFilter = 25 // CTA_FILTER; in it CTA_FILTER_ORIG_FLAGS and CTA_FILTER_REPLY_FLAGS
	filterSrc = 1  // bit of the source address
)

// sides are the two tuples of a flow, each with its attribute in ctaFilter: the source of the
// first is who began it, that of the second who answers.
var sides = []struct{ tuple, filter int }{{nl.CTA_TUPLE_ORIG, 1}, {nl.CTA_TUPLE_REPLY, 2}}

// Tuple is a flow in one direction, as its packets are. Protocols without ports have zeros.
type Tuple struct{ Src, Dst netip.AddrPort }

// Flow is what the kernel remembers of a connection.
type Flow struct {
	// Proto is the number of the protocol (RFC 790).
	Proto uint8
	// Orig is how it was begun, Reply how it is answered: after all translation.
	Orig, Reply Tuple
	// TCPState is one of nl.TCP_CONNTRACK_*; zero for other protocols.
	TCPState uint8

	family uint8
	attrs  []byte // as listed
}

// Table is the connection tracking of a network namespace. It is safe for concurrent use.
type Table struct{ sockets map[int]*nl.SocketHandle }

// Open opens that of the calling thread.
func Open() (*Table, error) {
	s, err := nl.GetNetlinkSocketAt(-1, -1, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open conntrack: %w", err)
	}
	return &Table{map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}}, nil
}

// Close closes the socket.
func (t *Table) Close() {
	for _, s := range t.sockets {
		s.Close()
	}
}

// Delete deletes the flows of a family (unix.AF_INET or AF_INET6) that are to be forgotten, and
// returns how many. The kernel lists all of its connections for that.
func (t *Table) Delete(family uint8, forgotten func(*Flow) bool) (n int, err error) {
	return t.deleteListed(t.request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, family), family, forgotten)
}

func (t *Table) deleteListed(list *nl.NetlinkRequest, family uint8, forgotten func(*Flow) bool) (n int, err error) {
	found, err := list.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("list connections: %w", err)
	}
	for _, m := range found {
		f, ok := parse(m[min(len(m), nl.SizeofNfgenmsg):], family)
		if !ok || !forgotten(&f) {
			continue
		}
		if err := t.delete(&f); err != nil {
			return n, fmt.Errorf("delete a connection: %w", err)
		}
		n++
	}
	return n, nil
}

// delete deletes a flow as it was listed, if it is still there.
//
// Connections come and go meanwhile, and a client that begins another one from the same port has
// the same first tuple, by which the kernel would find the new one. Nor does the kernel's number
// of it (CTA_ID) tell them apart: it is made of that tuple and of where in memory the flow is,
// and an entry that takes the place of another is often just there. So it is asked for by how it
// is answered, and the number, which must be right, too, says how it was begun.
func (t *Table) delete(f *Flow) error {
	req := t.request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, f.family)
	for attr := range attributes(f.attrs) {
		if attr.kind() != nl.CTA_TUPLE_ORIG {
			req.AddRawData(attr.padded())
		}
	}
	// What has ended by itself meanwhile is as good as deleted.
	if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// Forget deletes from the connection tracking of a network namespace (its path; empty: the
// current one) all flows that one of addrs began, or answers, by whatever address it was
// called, and returns how many. The kernel looks at all connections for that: with
// 50,000 of them it takes 40 ms in IPv4, more in IPv6. Nobody may have the addresses meanwhile.
func Forget(netns string, addrs ...netip.Addr) (n int, err error) {
	err = netspace.Do(netns, func() error {
		t, err := Open()
		if err != nil {
			return err
		}
		defer t.Close()
		var errs []error
		for _, a := range addrs {
			a = a.Unmap()
			family := uint8(unix.AF_INET6)
			if a.Is4() {
				family = unix.AF_INET
			}
			for _, list := range t.lists(a, family) {
				m, err := t.deleteListed(list, family, func(f *Flow) bool { return f.Orig.Src.Addr() == a || f.Reply.Src.Addr() == a })
				n += m
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return n, fmt.Errorf("forget connections of %v: %w", addrs, err)
	}
	return n, nil
}

// request begins a message of ctnetlink.
func (t *Table) request(operation, flags int, family uint8) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|operation, flags)
	r.Sockets = t.sockets
	r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return r
}

// lists are what to ask for, so that all flows of a are among the answers. Filters by address
// do not work in IPv6: the kernel leaves out what is equal (ctnetlink_filter_match_tuple, seen
// in Linux 6.18), so that everything is listed there.
func (t *Table) lists(a netip.Addr, family uint8) (out []*nl.NetlinkRequest) {
	if a.Is6() {
		return []*nl.NetlinkRequest{t.request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, family)}
	}
	for _, s := range sides {
		r := t.request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, family)
		tuple := nl.NewRtAttr(unix.NLA_F_NESTED|s.tuple, nil)
		tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil).AddRtAttr(nl.CTA_IP_V4_SRC, a.AsSlice())
		filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
		filter.AddRtAttr(s.filter, nl.Uint32Attr(filterSrc))
		r.AddData(tuple)
		r.AddData(filter)
		out = append(out, r)
	}
	return out
}

// parse reads a listed flow. One that lacks a tuple is none.
func parse(attrs []byte, family uint8) (f Flow, ok bool) {
	f.family, f.attrs = family, attrs
	var proto uint8
	if f.Orig, f.Proto, ok = parseTuple(within(attrs, nl.CTA_TUPLE_ORIG), family); !ok {
		return f, false
	}
	if f.Reply, proto, ok = parseTuple(within(attrs, nl.CTA_TUPLE_REPLY), family); !ok || proto != f.Proto {
		return f, false
	}
	if state := within(attrs, nl.CTA_PROTOINFO, nl.CTA_PROTOINFO_TCP, nl.CTA_PROTOINFO_TCP_STATE); len(state) == 1 {
		f.TCPState = state[0]
	}
	return f, true
}

func parseTuple(attrs []byte, family uint8) (t Tuple, proto uint8, ok bool) {
	src, dst := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if family == unix.AF_INET6 {
		src, dst = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	ip, l4 := within(attrs, nl.CTA_TUPLE_IP), within(attrs, nl.CTA_TUPLE_PROTO)
	from, ok1 := netip.AddrFromSlice(within(ip, src))
	to, ok2 := netip.AddrFromSlice(within(ip, dst))
	number := within(l4, nl.CTA_PROTO_NUM)
	if !ok1 || !ok2 || len(number) != 1 {
		return t, 0, false
	}
	port := func(attr int) uint16 {
		if b := within(l4, attr); len(b) == 2 {
			return binary.BigEndian.Uint16(b)
		}
		return 0
	}
	return Tuple{netip.AddrPortFrom(from, port(nl.CTA_PROTO_SRC_PORT)), netip.AddrPortFrom(to, port(nl.CTA_PROTO_DST_PORT))}, number[0], true
}

// attribute is one of netlink, with its header.
type attribute []byte

func (a attribute) kind() int { return int(nl.NativeEndian().Uint16(a[2:]) & nl.NLA_TYPE_MASK) }

// padded is a as it is in a message that goes on.
func (a attribute) padded() []byte {
	return append(bytes.Clone(a), make([]byte, (4-len(a)%4)%4)...)
}

// attributes yields those of a message, up to what is none.
func attributes(b []byte) func(yield func(attribute) bool) {
	return func(yield func(attribute) bool) {
		for len(b) >= unix.NLA_HDRLEN {
			n := int(nl.NativeEndian().Uint16(b))
			if n < unix.NLA_HDRLEN || n > len(b) || !yield(b[:n]) {
				return
			}
			b = b[min(len(b), (n+3)&^3):]
		}
	}
}

// within finds what is in an attribute by those that it is nested in; nil if there is none.
func within(b []byte, path ...int) []byte {
	for _, kind := range path {
		var found []byte
		for attr := range attributes(b) {
			if attr.kind() == kind {
				found = attr[unix.NLA_HDRLEN:]
				break
			}
		}
		b = found
	}
	return b
}
