// Package flows makes the kernel forget the connections of addresses that are given back, so
// that who gets an address next has nothing of what another one began: what conntrack
// remembers of translated UDP would send its answers, and its packets, to the wrong place.
package flows

import (
	"bytes"
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

// Forget deletes from the connection tracking of a network namespace (its path; empty: the
// current one) all flows that one of addrs began, or answers, by whatever address it was
// called, and returns how many. The kernel looks at all connections for that: with
// 50,000 of them it takes 40 ms in IPv4, more in IPv6. Nobody may have the addresses meanwhile.
func Forget(netns string, addrs ...netip.Addr) (n int, err error) {
	err = netspace.Do(netns, func() error {
		var errs []error
		for _, a := range addrs {
			for _, list := range lists(a.Unmap()) {
				m, err := forget(a.Unmap(), list)
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

// forget deletes what is a's of a list.
func forget(a netip.Addr, list *nl.NetlinkRequest) (n int, err error) {
	found, err := list.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("list: %w", err)
	}
	for _, flow := range found {
		attrs := flow[min(len(flow), nl.SizeofNfgenmsg):]
		if !concerns(attrs, a) {
			continue
		}
		del := request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, a)
		del.AddRawData(attrs)
		// What has ended by itself meanwhile is as good as deleted.
		if _, err := del.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return n, fmt.Errorf("delete: %w", err)
		}
		n++
	}
	return n, nil
}

// request begins a message of ctnetlink.
func request(operation, flags int, a netip.Addr) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|operation, flags)
	family := uint8(unix.AF_INET6)
	if a.Is4() {
		family = unix.AF_INET
	}
	r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return r
}

// lists are what to ask for, so that all flows of a are among the answers. Filters by address
// do not work in IPv6: the kernel leaves out what is equal (ctnetlink_filter_match_tuple, seen
// in Linux 6.18), so that everything is listed there.
func lists(a netip.Addr) (out []*nl.NetlinkRequest) {
	if a.Is6() {
		return []*nl.NetlinkRequest{request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, a)}
	}
	for _, s := range sides {
		r := request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, a)
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

// concerns reports whether a flow is one that a began, or answers.
func concerns(flow []byte, a netip.Addr) bool {
	source := nl.CTA_IP_V6_SRC
	if a.Is4() {
		source = nl.CTA_IP_V4_SRC
	}
	for _, s := range sides {
		if bytes.Equal(within(flow, s.tuple, nl.CTA_TUPLE_IP, source), a.AsSlice()) {
			return true
		}
	}
	return false
}

// within finds an attribute by those that it is nested in; nil if there is none.
func within(attrs []byte, path ...int) []byte {
	for _, attr := range path {
		list, err := nl.ParseRouteAttr(attrs)
		if err != nil {
			return nil
		}
		attrs = nil
		for _, found := range list {
			if int(found.Attr.Type&nl.NLA_TYPE_MASK) == attr {
				attrs = found.Value
			}
		}
	}
	return attrs
}
