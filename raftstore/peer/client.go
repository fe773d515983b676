package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
)

const (
	dialTimeout = 3 * time.Second
	// maxCalls is how many calls of one connection may be under way.
	maxCalls = 8192
)

// keepAlive finds a machine that vanished without a word within about three seconds.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}

// Client calls other servers, over one connection to each. It is safe for concurrent
// use. It implements [raftstore.Peers].
type Client struct {
	tls func() *tls.Config

	mu     sync.Mutex
	conns  map[string]*clientConn // by address
	closed bool
}

var _ raftstore.Peers = (*Client)(nil)

// NewClient returns a Client; config is asked before every connection, so that a
// renewed certificate is used without a restart.
func NewClient(config func() *tls.Config) *Client {
	return &Client{tls: config, conns: map[string]*clientConn{}}
}

// Close ends all connections; calls under way fail.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, conn := range c.conns {
		conn.fail(net.ErrClosed)
	}
}

// Propose implements [raftstore.Peers].
func (c *Client) Propose(ctx context.Context, address string, txn []byte) (command.Result, error) {
	f, err := c.call(ctx, address, methodPropose, txn)
	if err != nil {
		return command.Result{}, err
	}
	return parseResult(f.kind, f.payload)
}

// ReadIndex implements [raftstore.Peers].
func (c *Client) ReadIndex(ctx context.Context, address string) (uint64, error) {
	f, err := c.call(ctx, address, methodReadIndex)
	if err != nil {
		return 0, err
	}
	if f.kind != statusOK {
		return 0, answerError(f.kind, f.payload)
	}
	revision, n := binary.Uvarint(f.payload)
	if n <= 0 {
		return 0, errMalformed
	}
	return revision, nil
}

// Call calls the handler name of the server at address with in as JSON, and decodes
// what it answers into out, unless that is nil.
func (c *Client) Call(ctx context.Context, address, name string, in, out any) error {
	data, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("call %s: %w", name, err)
	}
	f, err := c.call(ctx, address, methodCall, append([]byte{byte(len(name))}, name...), data)
	if err == nil && f.kind != statusOK {
		err = answerError(f.kind, f.payload)
	}
	if err == nil && out != nil {
		err = json.Unmarshal(f.payload, out)
	}
	if err != nil {
		return fmt.Errorf("call %s of %s: %w", name, address, err)
	}
	return nil
}

// call sends one message and waits for its answer. If it was never sent, the error
// matches raftstore.ErrNotLeader, if the connection broke later, ErrLeadershipLost:
// what became of it is then unknown.
func (c *Client) call(ctx context.Context, address string, method byte, payload ...[]byte) (frame, error) {
	conn, err := c.conn(ctx, address)
	if err != nil {
		return frame{}, fmt.Errorf("%w: %w", raftstore.ErrNotLeader, err)
	}
	id, answer, err := conn.begin()
	if err != nil {
		return frame{}, fmt.Errorf("%w: %w", raftstore.ErrNotLeader, err)
	}
	if err := conn.out.add(id, method, payload...); err != nil {
		conn.abandon(id)
		return frame{}, fmt.Errorf("%w: %w", raftstore.ErrNotLeader, err)
	}
	select {
	case f, ok := <-answer:
		if !ok {
			return frame{}, fmt.Errorf("%w: %w", raftstore.ErrLeadershipLost, conn.cause())
		}
		return f, nil
	case <-ctx.Done():
		conn.abandon(id)
		return frame{}, fmt.Errorf("waiting for an answer, the outcome is unknown: %w", context.Cause(ctx))
	}
}

// conn returns a connection to address that works as far as is known.
func (c *Client) conn(ctx context.Context, address string) (*clientConn, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, net.ErrClosed
	}
	conn := c.conns[address]
	if conn == nil {
		conn = newClientConn()
		c.conns[address] = conn
		go c.run(conn, address)
	}
	c.mu.Unlock()
	select {
	case <-conn.ready:
		return conn, nil
	case <-conn.ended:
		return nil, conn.cause()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// run dials and serves a connection until it ends.
func (c *Client) run(conn *clientConn, address string) {
	err := conn.serve(c.tls(), address)
	c.mu.Lock()
	if c.conns[address] == conn {
		delete(c.conns, address)
	}
	c.mu.Unlock()
	conn.fail(err)
	conn.end()
}

// clientConn is one connection with the calls that wait for answers.
type clientConn struct {
	out   *outbox
	ready chan struct{} // closed when the handshake is complete
	ended chan struct{} // closed after the last answer

	mu      sync.Mutex
	conn    net.Conn
	err     error
	next    uint32
	waiting map[uint32]chan frame
}

func newClientConn() *clientConn {
	return &clientConn{out: newOutbox(), ready: make(chan struct{}), ended: make(chan struct{}), waiting: map[uint32]chan frame{}}
}

var errBusy = errors.New("too many calls are under way")

func (c *clientConn) begin() (uint32, <-chan frame, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	if len(c.waiting) >= maxCalls {
		return 0, nil, errBusy
	}
	c.next++
	answer := make(chan frame, 1)
	c.waiting[c.next] = answer
	return c.next, answer, nil
}

func (c *clientConn) abandon(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

func (c *clientConn) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fail breaks the connection; the first cause counts.
func (c *clientConn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	if c.conn != nil {
		c.conn.Close()
	}
	c.out.fail(c.err)
}

// end tells every waiting call that no answer comes.
func (c *clientConn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, answer := range c.waiting {
		close(answer)
		delete(c.waiting, id)
	}
	close(c.ended)
}

func (c *clientConn) serve(config *tls.Config, address string) error {
	conn, err := dial(config, ProtocolPeer, address, dialTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	c.mu.Lock()
	c.conn = conn
	err = c.err
	c.mu.Unlock()
	if err != nil {
		return err
	}
	close(c.ready)
	go func() {
		if err := c.out.run(conn); err != nil {
			c.fail(err)
		}
	}()
	r := bufio.NewReaderSize(conn, 64<<10)
	for {
		f, err := readFrame(r, maxFrame)
		if err != nil {
			return fmt.Errorf("connection to %s: %w", address, err)
		}
		c.mu.Lock()
		answer := c.waiting[f.id]
		delete(c.waiting, f.id)
		c.mu.Unlock()
		if answer != nil { // else the caller has gone
			answer <- f
		}
	}
}

// dial connects to a server and shakes hands for a protocol.
func dial(config *tls.Config, protocol, address string, timeout time.Duration) (net.Conn, error) {
	config = config.Clone()
	config.NextProtos = []string{protocol}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	d := tls.Dialer{NetDialer: &net.Dialer{KeepAliveConfig: keepAlive}, Config: config}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	if got := conn.(*tls.Conn).ConnectionState().NegotiatedProtocol; got != protocol {
		conn.Close()
		return nil, fmt.Errorf("connect to %s: it does not speak %s", address, protocol)
	}
	return conn, nil
}
