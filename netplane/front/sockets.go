package front

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace"
)

// Sockets opens ports, and hands those that are open to another process: who waits there for
// an answer gets it from that one. All methods are safe for concurrent use.
type Sockets struct {
	// NetNS is the network namespace to listen in; empty: that of the process.
	NetNS string

	mu   sync.Mutex
	open map[string]syscall.Conn // by network and address; some may be closed
	left map[string]int          // descriptors that a predecessor left, and nobody took yet
}

// ListenHere is Listen for an address that the node has: a wrong one is refused.
func (s *Sockets) ListenHere(ctx context.Context, network, address string) (net.Listener, error) {
	return listen(s, network, address, net.FileListener, func(*net.ListenConfig) (net.Listener, error) {
		return (&net.ListenConfig{}).Listen(ctx, network, address)
	})
}

// Listen is that of [net.ListenConfig]. The address need not be the node's yet.
func (s *Sockets) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return listen(s, network, address, net.FileListener, func(lc *net.ListenConfig) (net.Listener, error) {
		return lc.Listen(ctx, network, address)
	})
}

// ListenPacket is that of [net.ListenConfig]. The address need not be the node's yet.
func (s *Sockets) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	return listen(s, network, address, net.FilePacketConn, func(lc *net.ListenConfig) (net.PacketConn, error) {
		return lc.ListenPacket(ctx, network, address)
	})
}

func listen[S any](s *Sockets, network, address string, inherit func(*os.File) (S, error), open func(*net.ListenConfig) (S, error)) (S, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := socketKey(network, address)
	var conn S
	var err error
	if s.open == nil {
		s.open = map[string]syscall.Conn{}
	}
	if fd, ok := s.left[key]; ok {
		delete(s.left, key)
		f := os.NewFile(uintptr(fd), key)
		conn, err = inherit(f)
		f.Close() // conn has a copy
	} else {
		lc := &net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error { return freebind(network, c) }}
		err = netspace.Do(s.NetNS, func() (err error) {
			conn, err = open(lc)
			return err
		})
	}
	if err != nil {
		return conn, err
	}
	s.open[key], _ = any(conn).(syscall.Conn) // sockets of package net are
	return conn, nil
}

func socketKey(network, address string) string { return network + " " + address }

// freebind lets a socket have an address that the node is about to get (ip(7)).
func freebind(network string, c syscall.RawConn) error {
	level, option := unix.IPPROTO_IP, unix.IP_FREEBIND
	if network[len(network)-1] == '6' {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_FREEBIND
	}
	var failed error
	err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), level, option, 1) })
	if err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt", failed)
}

// copies are copies of the sockets that are open, with what they are. They are the caller's
// to close.
func (s *Sockets) copies() (keys []string, fds []int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(s.open)) {
		rc, err := s.open[key].SyscallConn()
		if err != nil {
			return keys, fds, fmt.Errorf("socket %s: %w", key, err)
		}
		var failed error
		closed := rc.Control(func(fd uintptr) {
			var n int
			if n, failed = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); failed == nil {
				keys, fds = append(keys, key), append(fds, n)
			}
		})
		switch {
		case closed != nil:
			delete(s.open, key)
		case failed != nil:
			return keys, fds, fmt.Errorf("socket %s: %w", key, failed)
		}
	}
	return keys, fds, nil
}

// inherit takes over descriptors.
func (s *Sockets) inherit(keys []string, fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = map[string]int{}
	for i, key := range keys {
		unix.CloseOnExec(fds[i])
		s.left[key] = fds[i]
	}
}

// drop closes what was inherited and nobody is going to take.
func (s *Sockets) drop(wanted []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, fd := range s.left {
		if !slices.Contains(wanted, key) {
			unix.Close(fd)
			delete(s.left, key)
		}
	}
}
