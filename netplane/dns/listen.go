package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/ipv4"
)

const (
	// maxQuery bounds the messages that are read: no query is that long.
	maxQuery = 4096
	// batch is how many datagrams one system call receives or sends at most: these calls
	// are most of the work.
	batch = 32
	// maxWaiting bounds the queries that wait for upstreams, and maxClientWaiting those of
	// one address; more are not answered, which is what makes clients back off.
	maxWaiting, maxClientWaiting = 1024, 256
	// maxConns bounds the TCP connections, maxClientConns those of one address, and
	// maxPipelined the queries of one that wait for upstreams.
	maxConns, maxClientConns, maxPipelined = 512, 32, 32
	// tcpIdle is how long a connection may be without a query (RFC 7766, 6.2.3), and
	// tcpStall how long a message may take.
	tcpIdle, tcpStall = 10 * time.Second, 5 * time.Second
	// tcpLast is how long the queries of a connection are read when the server ends: some may
	// be on their way.
	tcpLast = time.Second
)

// park copies the query that a worker read, for as long as it takes to answer it.
func (w *worker) park() *query {
	q := w.q
	q.question = slices.Clone(q.question)
	return &q
}

// datagrams are those that one system call receives, with what answering them takes, and
// those that one system call sends.
type datagrams struct {
	in, out []ipv4.Message
	workers []worker
}

func newDatagrams(n int) *datagrams {
	d := &datagrams{make([]ipv4.Message, n), make([]ipv4.Message, n), make([]worker, n)}
	for i := range n {
		d.in[i].Buffers, d.out[i].Buffers = [][]byte{make([]byte, maxQuery)}, make([][]byte, 1)
	}
	return d
}

// serveUDP answers datagrams until reading from the socket fails, and works for them until ctx
// ends. There is one such loop for a socket: several would wake each other for every packet.
func (s *Server) serveUDP(ctx context.Context, conn *net.UDPConn, busy *sync.WaitGroup) error {
	pc := ipv4.NewPacketConn(conn) // receives and sends IPv6 as well
	d := newDatagrams(batch)
	for {
		n, err := pc.ReadBatch(d.in, 0)
		if err != nil {
			return err
		}
		begun := time.Now()
		answers := 0
		for i := range n {
			w, from := &d.workers[i], d.in[i].Addr
			answer, wait := s.quick(w, d.in[i].Buffers[0][:d.in[i].N], true)
			switch {
			case wait:
				s.later(ctx, w.park(), client(from), busy, func(answer []byte) {
					_, err := conn.WriteTo(answer, from)
					s.sent(begun, 1, err)
				})
			case answer != nil:
				d.out[answers].Buffers[0], d.out[answers].Addr = answer, from
				answers++
			}
		}
		s.sendBatch(pc, d.out[:answers], begun)
	}
}

// sendBatch sends answers. One that cannot be sent does not hold up the others.
func (s *Server) sendBatch(pc *ipv4.PacketConn, out []ipv4.Message, begun time.Time) {
	for len(out) > 0 {
		n, err := pc.WriteBatch(out, 0)
		if err != nil || n == 0 {
			n = 1 // it is about the first one
		}
		s.sent(begun, n, err)
		out = out[n:]
	}
}

// sent notes that n answers went out, or that one did not. Whoever misses it asks again.
func (s *Server) sent(begun time.Time, n int, err error) {
	if err != nil {
		s.log.Debug("dns answer not sent", "err", err)
		return
	}
	for range n {
		s.metrics.latency.Observe(time.Since(begun).Seconds())
	}
}

// later answers a datagram's query in a goroutine of its own, unless too many wait already.
func (s *Server) later(ctx context.Context, q *query, from netip.Addr, busy *sync.WaitGroup, send func([]byte)) {
	if !s.waiting.take(from) {
		s.metrics.dropped.Inc()
		return
	}
	busy.Go(func() {
		defer s.waiting.give(from)
		send(s.slow(ctx, q, true))
	})
}

// serveTCP accepts connections until the listener fails, reads queries from them until ctx
// ends, and works for those until work ends.
func (s *Server) serveTCP(ctx, work context.Context, ln net.Listener, busy *sync.WaitGroup) error {
	open := quota{most: maxConns, each: maxClientConns}
	for {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		from := client(conn.RemoteAddr())
		if !open.take(from) {
			s.metrics.dropped.Inc()
			conn.Close()
			continue
		}
		busy.Go(func() {
			defer open.give(from)
			c := &tcpConn{server: s, Conn: conn, from: from}
			if err := c.serve(ctx, work); err != nil && !errors.Is(err, io.EOF) {
				s.log.Debug("dns connection ended", "from", conn.RemoteAddr(), "err", err)
			}
		})
	}
}

// tcpConn is one client's connection. Queries are answered as soon as they can be, which
// may be in another order (RFC 7766, 6.2.1.1).
type tcpConn struct {
	net.Conn
	server  *Server
	from    netip.Addr
	last    time.Time // when the reading of queries ends; zero: not yet
	writing sync.Mutex
}

func (c *tcpConn) serve(ctx, work context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Now().Add(tcpLast)) })
	var busy sync.WaitGroup
	pipelined := make(chan struct{}, maxPipelined)
	defer func() { // what waits is answered even if the client has sent all it had to say
		busy.Wait()
		stop()
		c.Close()
	}()
	w := &worker{}
	buf := make([]byte, 0, 512)
	for {
		var err error
		if buf, err = c.readMessage(ctx, buf); err != nil {
			return err
		}
		begun := time.Now()
		answer, wait := c.server.quick(w, buf, false)
		if wait {
			pipelined <- struct{}{} // a client in a hurry waits here
			if c.server.waiting.take(c.from) {
				q := w.park()
				busy.Go(func() {
					defer func() { <-pipelined; c.server.waiting.give(c.from) }()
					c.later(work, q, begun)
				})
				continue
			}
			<-pipelined
			c.server.metrics.dropped.Inc()
			answer = appendRcode(w.out[:0], &w.q, dns.RcodeServerFailure)
		}
		if answer == nil {
			return errors.New("it sent what is no query")
		}
		if err := c.writeMessage(answer); err != nil {
			return err
		}
		c.server.metrics.latency.Observe(time.Since(begun).Seconds())
	}
}

func (c *tcpConn) later(ctx context.Context, q *query, begun time.Time) {
	_ = c.writeMessage(c.server.slow(ctx, q, false)) // reading fails as well
	c.server.metrics.latency.Observe(time.Since(begun).Seconds())
}

// readMessage reads one message into buf, which it may replace. When ctx has ended, it does not
// wait for long.
func (c *tcpConn) readMessage(ctx context.Context, buf []byte) ([]byte, error) {
	var length [2]byte
	_ = c.SetReadDeadline(time.Now().Add(tcpIdle))
	if ctx.Err() != nil {
		if c.last.IsZero() {
			c.last = time.Now().Add(tcpLast)
		}
		_ = c.SetReadDeadline(c.last)
	}
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	_ = c.SetReadDeadline(time.Now().Add(tcpStall))
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > maxQuery {
		return buf, fmt.Errorf("it sent %d bytes, which is no query", n)
	}
	buf = slices.Grow(buf[:0], n)[:n]
	_, err := io.ReadFull(c, buf)
	return buf, err
}

func (c *tcpConn) writeMessage(m []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	_ = c.SetWriteDeadline(time.Now().Add(tcpStall))
	out := make([]byte, 0, 2+len(m))
	out = binary.BigEndian.AppendUint16(out, uint16(len(m)))
	_, err := c.Write(append(out, m...))
	return err
}

// quota counts what clients have at a time, so that no pod takes what is there for all.
type quota struct {
	most, each int // of all clients, and of one

	mu   sync.Mutex
	all  int
	held map[netip.Addr]int
}

// take counts one more for a client, unless there are too many.
func (q *quota) take(client netip.Addr) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.all >= q.most || q.held[client] >= q.each {
		return false
	}
	if q.held == nil {
		q.held = map[netip.Addr]int{}
	}
	q.all++
	q.held[client]++
	return true
}

func (q *quota) give(client netip.Addr) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all--
	if q.held[client]--; q.held[client] == 0 {
		delete(q.held, client)
	}
}

// client is who counts: an address, whatever its ports.
func client(a net.Addr) netip.Addr {
	if u, ok := a.(*net.UDPAddr); ok {
		return u.AddrPort().Addr()
	}
	p, _ := netip.ParseAddrPort(a.String()) // all unknown ones are one client
	return p.Addr()
}
