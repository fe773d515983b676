// Package wire writes and reads netlink messages in bulk, for the service tables:
// many messages in one datagram, without an allocation for each attribute.
//
// It knows netlink (RFC 3549) and headers of four bytes, which nfnetlink and generic
// netlink both have; what the messages mean is up to its users. A Conn is not safe
// for concurrent use.
package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// sendBuffer is the largest datagram the socket takes, in bytes, and receiveBuffer how
	// much may wait to be read: the kernel answers all messages of a datagram before any
	// answer is read, and drops what there is no room for.
	sendBuffer, receiveBuffer = 8 << 20, 32 << 20
	// replyTimeout bounds the wait for the kernel; it answers within the send.
	replyTimeout = 10 * time.Second
)

// ErrInterrupted: what was read changed meanwhile. The rest of that answer is skipped
// by its number.
var ErrInterrupted = errors.New("the tables changed while they were read")

// Conn is a netlink socket and the datagram that is being written for it.
type Conn struct {
	Buf []byte
	fd  int
	seq uint32
	in  [64 << 10]byte
}

// Open opens a socket for a netlink protocol, such as NETLINK_NETFILTER, in the
// network namespace of the calling thread.
func Open(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	w := &Conn{fd: fd}
	if err := w.configure(); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return w, nil
}

func (w *Conn) configure() error {
	if err := unix.Bind(w.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind netlink socket: %w", err)
	}
	if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer); err != nil {
		return fmt.Errorf("enlarge netlink send buffer (needs CAP_NET_ADMIN): %w", err)
	}
	if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer); err != nil {
		return fmt.Errorf("enlarge netlink receive buffer (needs CAP_NET_ADMIN): %w", err)
	}
	if err := unix.SetsockoptInt(w.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1); err != nil {
		return fmt.Errorf("shorten netlink replies: %w", err)
	}
	tv := unix.NsecToTimeval(replyTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("bound netlink replies: %w", err)
	}
	return nil
}

// Close closes the socket.
func (w *Conn) Close() error { return unix.Close(w.fd) }

// Reset begins a datagram.
func (w *Conn) Reset() { w.Buf = w.Buf[:0] }

// Message begins a message with a header of four bytes, and returns where it is and
// its number. Its length is set by End.
func (w *Conn) Message(kind, flags uint16, header [4]byte) (at int, seq uint32) {
	at = len(w.Buf)
	w.seq++
	b := binary.NativeEndian.AppendUint32(w.Buf, uint32(unix.NLMSG_HDRLEN+len(header)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, w.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	w.Buf = append(b, header[:]...)
	return at, w.seq
}

// End ends the message at a place.
func (w *Conn) End(at int) {
	binary.NativeEndian.PutUint32(w.Buf[at:], uint32(len(w.Buf)-at))
}

// Ask makes the message at a place one that is answered even if all is well.
func (w *Conn) Ask(at int) {
	flags := w.Buf[at+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
}

// Nest begins an attribute that holds attributes.
func (w *Conn) Nest(kind uint16) int {
	at := len(w.Buf)
	w.Buf = append(w.Buf, 0, 0, 0, 0)
	binary.NativeEndian.PutUint16(w.Buf[at+2:], kind|unix.NLA_F_NESTED)
	return at
}

// Unnest ends what Nest began.
func (w *Conn) Unnest(at int) {
	binary.NativeEndian.PutUint16(w.Buf[at:], uint16(len(w.Buf)-at))
}

// Attr adds an attribute.
func (w *Conn) Attr(kind uint16, v string) {
	b := binary.NativeEndian.AppendUint16(w.Buf, uint16(4+len(v)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, v...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	w.Buf = b
}

// Send sends the datagram.
func (w *Conn) Send() error {
	if err := unix.Sendto(w.fd, w.Buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send %d bytes over netlink: %w", len(w.Buf), err)
	}
	return nil
}

// Wait waits for the answer to message last, and hands on the error of every message
// since first; what failed returns, unless nil, ends the wait.
func (w *Conn) Wait(first, last uint32, failed func(seq uint32, err error) error) error {
	for done := false; !done; {
		err := w.Receive(func(kind, _ uint16, seq uint32, body []byte) error {
			if kind != unix.NLMSG_ERROR || seq-first > last-first {
				return nil
			}
			done = done || seq == last
			if err := Errno(body); err != nil {
				return failed(seq, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Dump sends the request that was written and hands on the bodies of the answers of a
// kind, after their header.
func (w *Conn) Dump(want uint16, each func(body []byte)) error {
	seq := w.seq
	if err := w.Send(); err != nil {
		return err
	}
	for done := false; !done; {
		err := w.Receive(func(kind, flags uint16, s uint32, body []byte) error {
			switch {
			case s != seq:
			case flags&unix.NLM_F_DUMP_INTR != 0:
				return ErrInterrupted
			case kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR:
				done = true
				return Errno(body)
			case kind == want:
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

// readAttempts bounds how often tables are read that change meanwhile. Any change of any
// table counts: some hosts have busy ones.
const readAttempts = 10

// errUnsettled: no two readings agreed.
var errUnsettled = errors.New("the tables read differently each time")

// Settled reads nftables until what was read is as expected, or the same twice in a row.
//
// Once would not do: after many additions the kernel makes the hash table of a set larger in
// the background, and a dump meanwhile misses some elements and repeats others without a
// word (nft_rhash_walk goes by position, and NLM_F_DUMP_INTR tells of transactions only).
func Settled[T any](ctx context.Context, read func() (T, error), expected func(T) bool, same func(a, b T) bool) (T, error) {
	var before T
	have, last := false, errUnsettled
	for range readAttempts {
		if err := context.Cause(ctx); err != nil {
			return before, err
		}
		got, err := read()
		if errors.Is(err, ErrInterrupted) {
			last = err
			continue
		}
		if err != nil || expected(got) || have && same(before, got) {
			return got, err
		}
		before, have, last = got, true, errUnsettled
	}
	return before, last
}

// Receive reads one datagram and hands on its messages.
func (w *Conn) Receive(each func(kind, flags uint16, seq uint32, body []byte) error) error {
	n, _, err := unix.Recvfrom(w.fd, w.in[:], 0)
	for errors.Is(err, unix.EINTR) {
		n, _, err = unix.Recvfrom(w.fd, w.in[:], 0)
	}
	if err != nil {
		return fmt.Errorf("receive netlink reply: %w", err)
	}
	return Messages(w.in[:n], each)
}

// Messages hands on the messages in b; an error of each ends it.
func Messages(b []byte, each func(kind, flags uint16, seq uint32, body []byte) error) error {
	for len(b) >= unix.NLMSG_HDRLEN+4 {
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

// Errno is the error that the body of an NLMSG_ERROR or NLMSG_DONE carries, or nil.
func Errno(body []byte) error {
	if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}

// Attributes hands on the attributes in b; it stops at one that does not fit.
func Attributes(b []byte, each func(kind uint16, v []byte)) {
	for len(b) >= 4 {
		size := int(binary.NativeEndian.Uint16(b))
		if size < 4 || size > len(b) {
			return
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:size])
		b = b[min((size+3)&^3, len(b)):]
	}
}
