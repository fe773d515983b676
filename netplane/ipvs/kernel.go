package ipvs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/netplane/wire"
)

// Numbers of linux/ip_vs.h.
const (
	cmdNewService, cmdSetService, cmdDelService, cmdGetService = 1, 2, 3, 4
	cmdNewDest, cmdSetDest, cmdDelDest, cmdGetDest             = 5, 6, 7, 8
	cmdSetConfig, cmdGetConfig                                 = 12, 13

	attrService, attrDest                             = 1, 2
	attrTimeoutTCP, attrTimeoutTCPFin, attrTimeoutUDP = 4, 5, 6

	svcFamily, svcProtocol, svcAddr, svcPort, svcMark          = 1, 2, 3, 4, 5
	svcScheduler, svcFlags, svcTimeout, svcNetmask             = 6, 7, 8, 9
	svcStats, statsConns                                       = 12, 1
	destAddr, destPort, destMethod, destWeight                 = 1, 2, 3, 4
	destUpper, destLower, destActive, destInactive, destFamily = 5, 6, 7, 8, 11

	flagPersistent, flagHashed = 1, 2
	flagFallback               = 8 // of sh and mh: who hashes to a server without weight goes to another
	methodMask                 = 7 // of which zero is masquerading, the only one that changes ports
)

// version of the generic netlink family.
const version = 1

// batch is how many bytes of commands go to the kernel at once.
const batch = 256 << 10

// ErrMissing is what errors match when the kernel has no IPVS.
var ErrMissing = errors.New("the kernel has no IPVS")

// kernel speaks with IPVS over generic netlink.
type kernel struct {
	*wire.Conn
	family uint16
}

// openKernel opens a socket in the network namespace of the calling thread. Asking
// for the family makes the kernel load IPVS, if it can.
func openKernel() (*kernel, error) {
	c, err := wire.Open(unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}
	k := &kernel{Conn: c}
	at := k.begin(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, unix.NLM_F_ACK)
	k.Attr(unix.CTRL_ATTR_FAMILY_NAME, "IPVS\x00")
	k.End(at)
	err = k.Dump(unix.GENL_ID_CTRL, func(body []byte) {
		wire.Attributes(body, func(kind uint16, v []byte) {
			if kind == unix.CTRL_ATTR_FAMILY_ID && len(v) == 2 {
				k.family = binary.NativeEndian.Uint16(v)
			}
		})
	})
	if errors.Is(err, unix.ENOENT) || err == nil && k.family == 0 {
		err = ErrMissing
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look for IPVS: %w", err), c.Close())
	}
	return k, nil
}

// begin begins a datagram with one message.
func (k *kernel) begin(family uint16, cmd uint8, flags uint16) int {
	k.Reset()
	at, _ := k.Message(family, flags, [4]byte{cmd, version})
	return at
}

func (k *kernel) attr16(kind, v uint16) {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], v)
	k.Attr(kind, string(b[:]))
}

func (k *kernel) attr32(kind uint16, v uint32) {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], v)
	k.Attr(kind, string(b[:]))
}

// attrPort adds a port, in network byte order.
func (k *kernel) attrPort(kind, v uint16) {
	k.Attr(kind, string([]byte{byte(v >> 8), byte(v)}))
}

func (k *kernel) attrAddr(kind uint16, a netip.Addr) {
	if a.Is4() {
		b := a.As4()
		k.Attr(kind, string(b[:]))
		return
	}
	b := a.As16()
	k.Attr(kind, string(b[:]))
}

func familyOf(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// netmask makes each client address one of its own: a mask of IPv4 or a length of
// IPv6.
func netmask(a netip.Addr) uint32 {
	if a.Is4() {
		return ^uint32(0)
	}
	return 128
}

// schedulerFlags are those that a scheduler needs so that draining servers cost nothing.
func schedulerFlags(name string) uint32 {
	if name == "sh" || name == "mh" {
		return flagFallback
	}
	return 0
}

// service adds the attribute that names a service, with all that it has if whole.
func (k *kernel) service(v *virtual, whole bool) {
	n := k.Nest(attrService)
	k.attr16(svcFamily, familyOf(v.Addr))
	if v.mark != 0 {
		k.attr32(svcMark, v.mark)
	} else {
		k.attr16(svcProtocol, uint16(v.Proto))
		k.attrAddr(svcAddr, v.Addr)
		k.attrPort(svcPort, v.Port.Port)
	}
	if whole {
		flags := schedulerFlags(v.scheduler)
		if v.affinity > 0 {
			flags |= flagPersistent
		}
		k.Attr(svcScheduler, v.scheduler+"\x00")
		b := binary.NativeEndian.AppendUint32(nil, flags)
		k.Attr(svcFlags, string(binary.NativeEndian.AppendUint32(b, ^uint32(0))))
		k.attr32(svcTimeout, uint32(v.affinity/time.Second))
		k.attr32(svcNetmask, netmask(v.Addr))
	}
	k.Unnest(n)
}

// dest adds the attribute that is a server.
func (k *kernel) dest(s *server, whole bool) {
	n := k.Nest(attrDest)
	k.attr16(destFamily, familyOf(s.addr.Addr()))
	k.attrAddr(destAddr, s.addr.Addr())
	k.attrPort(destPort, s.addr.Port())
	if whole {
		k.attr32(destMethod, 0)
		k.attr32(destWeight, s.weight)
		k.attr32(destUpper, 0)
		k.attr32(destLower, 0)
	}
	k.Unnest(n)
}

// refusal is a command that the kernel did not carry out.
type refusal struct {
	cmd command
	err error
}

func (r *refusal) Error() string { return fmt.Sprintf("%s: %v", r.cmd, r.err) }

func (r *refusal) Unwrap() error { return r.err }

// do carries out commands in their order, and goes on after one that is refused. The
// error is that of the first one.
func (k *kernel) do(ctx context.Context, cmds []command) error {
	var refused error
	for len(cmds) > 0 {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		k.Reset()
		var first, last uint32
		at, n := 0, 0
		for n < len(cmds) && len(k.Buf) < batch {
			at, last = k.command(&cmds[n])
			if n == 0 {
				first = last
			}
			n++
		}
		k.Ask(at)
		if err := k.Send(); err != nil {
			return err
		}
		err := k.Wait(first, last, func(seq uint32, err error) error {
			if refused == nil {
				refused = &refusal{cmds[seq-first], err}
			}
			return nil
		})
		if err != nil {
			return err
		}
		cmds = cmds[n:]
	}
	return refused
}

func (k *kernel) command(c *command) (at int, seq uint32) {
	cmd := [...]uint8{newService: cmdNewService, setService: cmdSetService, delService: cmdDelService,
		newServer: cmdNewDest, setServer: cmdSetDest, delServer: cmdDelDest}[c.verb]
	at, seq = k.Message(k.family, 0, [4]byte{cmd, version})
	k.service(c.service, c.verb == newService || c.verb == setService)
	if c.verb >= newServer {
		k.dest(&c.server, c.verb != delServer)
	}
	k.End(at)
	return at, seq
}

// services returns all services of the network namespace, without their servers. The
// kernel goes on in its list by how many it has shown, those of other namespaces
// included: a change there makes it show some twice or not at all. So it is asked until
// it says the same twice.
func (k *kernel) services() ([]*virtual, error) {
	before, err := k.list()
	for range 5 {
		if err != nil {
			return nil, err
		}
		var now []*virtual
		if now, err = k.list(); err == nil && slices.EqualFunc(before, now, func(a, b *virtual) bool { return a.key == b.key && a.sameHeader(b) }) {
			return now, nil
		}
		before = now
	}
	return before, err
}

// list asks once.
func (k *kernel) list() ([]*virtual, error) {
	at := k.begin(k.family, cmdGetService, unix.NLM_F_DUMP)
	k.End(at)
	var out []*virtual
	err := k.Dump(k.family, func(body []byte) {
		wire.Attributes(body, func(kind uint16, v []byte) {
			if s := parseService(v); kind == attrService && s != nil {
				out = append(out, s)
			}
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list IPVS services: %w", err)
	}
	return out, nil
}

// fill reads the servers of a service.
func (k *kernel) fill(v *virtual) error {
	at := k.begin(k.family, cmdGetDest, unix.NLM_F_DUMP)
	k.service(v, false)
	k.End(at)
	v.servers = nil
	err := k.Dump(k.family, func(body []byte) {
		wire.Attributes(body, func(kind uint16, b []byte) {
			if s, ok := parseServer(b, v.Addr); kind == attrDest && ok {
				v.servers = append(v.servers, s)
			}
		})
	})
	if err != nil {
		return fmt.Errorf("list IPVS servers of %s: %w", v.key, err)
	}
	sortServers(v.servers)
	return nil
}

// parseService returns nil for what is not a service.
func parseService(b []byte) *virtual {
	v := &virtual{}
	var addr []byte
	var family uint16
	var flags, timeout, mask uint32
	wire.Attributes(b, func(kind uint16, x []byte) {
		switch kind {
		case svcFamily:
			family = uint16(number(x))
		case svcProtocol:
			v.Proto = render.Proto(number(x))
		case svcAddr:
			addr = x
		case svcPort:
			v.Port.Port = port(x)
		case svcMark:
			v.mark = number(x)
		case svcScheduler:
			v.scheduler = string(bytes.TrimRight(x, "\x00"))
		case svcFlags:
			if len(x) == 8 {
				flags = number(x[:4])
			}
		case svcTimeout:
			timeout = number(x)
		case svcNetmask:
			mask = number(x)
		case svcStats:
			wire.Attributes(x, func(kind uint16, n []byte) {
				if kind == statsConns && len(n) == 8 {
					v.used = binary.NativeEndian.Uint64(n) > 0
				}
			})
		}
	})
	if v.mark != 0 && (family == unix.AF_INET || family == unix.AF_INET6) {
		v.key = byMark(v.mark, map[uint16]netip.Addr{unix.AF_INET: netip.IPv4Unspecified()}[family])
	} else if v.Addr = address(addr, family); !v.Addr.IsValid() {
		return nil
	}
	if flags&flagPersistent != 0 {
		v.affinity = time.Duration(timeout) * time.Second
	}
	v.odd = flags&^(flagPersistent|flagHashed) != schedulerFlags(v.scheduler) || mask != netmask(v.Addr)
	return v
}

func parseServer(b []byte, service netip.Addr) (server, bool) {
	s := server{}
	var addr []byte
	var at uint16
	family := familyOf(service)
	wire.Attributes(b, func(kind uint16, x []byte) {
		switch kind {
		case destAddr:
			addr = x
		case destPort:
			at = port(x)
		case destMethod:
			s.odd = s.odd || number(x)&methodMask != 0
		case destWeight:
			s.weight = number(x)
		case destUpper, destLower:
			s.odd = s.odd || number(x) != 0
		case destActive, destInactive:
			s.conns += uint64(number(x))
		case destFamily:
			family = uint16(number(x))
		}
	})
	a := address(addr, family)
	s.addr = netip.AddrPortFrom(a, at)
	return s, a.IsValid()
}

// number reads an integer of two or four bytes.
func number(b []byte) uint32 {
	switch len(b) {
	case 2:
		return uint32(binary.NativeEndian.Uint16(b))
	case 4:
		return binary.NativeEndian.Uint32(b)
	}
	return 0
}

// port reads a port, in network byte order.
func port(b []byte) uint16 {
	if len(b) != 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

// address reads an address, which has room for the longest one.
func address(b []byte, family uint16) netip.Addr {
	n := map[uint16]int{unix.AF_INET: 4, unix.AF_INET6: 16}[family]
	if n == 0 || len(b) < n {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(b[:n])
	return a
}

// timeouts returns the timeouts in force, in seconds, by attribute.
func (k *kernel) timeouts() (map[uint16]uint32, error) {
	at := k.begin(k.family, cmdGetConfig, unix.NLM_F_ACK)
	k.End(at)
	out := map[uint16]uint32{}
	err := k.Dump(k.family, func(body []byte) {
		wire.Attributes(body, func(kind uint16, v []byte) { out[kind] = number(v) })
	})
	if err != nil {
		return nil, fmt.Errorf("read IPVS timeouts: %w", err)
	}
	return out, nil
}

// setTimeouts changes the timeouts named, in seconds; zero would leave one as it is.
func (k *kernel) setTimeouts(values map[uint16]uint32) error {
	at := k.begin(k.family, cmdSetConfig, unix.NLM_F_ACK)
	for kind, v := range values {
		k.attr32(kind, v)
	}
	k.End(at)
	if err := k.Dump(k.family, func([]byte) {}); err != nil {
		return fmt.Errorf("set IPVS timeouts: %w", err)
	}
	return nil
}
