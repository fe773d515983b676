package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"decree.dev/decree/raftstore/command"
)

// Store is what the server needs of the replicated state; *raftstore.Store is one.
type Store interface {
	ProposeEncoded(ctx context.Context, txn []byte, done func(command.Result, error)) error
	ReadIndex(ctx context.Context) (uint64, error)
}

// Handler answers a call. It runs on a goroutine of its own; ctx ends with the
// connection, or after callTimeout. What it returns travels as JSON.
type Handler func(ctx context.Context, from Identity, in json.RawMessage) (out any, err error)

// On makes a Handler of a function with an argument of its own type.
func On[In any](f func(ctx context.Context, from Identity, in In) (any, error)) Handler {
	return func(ctx context.Context, from Identity, raw json.RawMessage) (any, error) {
		var in In
		if err := json.Unmarshal(raw, &in); err != nil {
			return nil, fmt.Errorf("malformed argument: %w", err)
		}
		return f(ctx, from, in)
	}
}

// callTimeout bounds the wall time of a call by name.
const callTimeout = 5 * time.Minute

// Server answers the calls of other servers. Store and Handlers are required.
type Server struct {
	Store    Store
	Handlers map[string]Handler
	// Refuse says why nothing that comes from a server is done; nil, or a nil error:
	// there is no reason. It is asked when a connection begins, and every call of that
	// connection is answered with the error: a server that was removed learns it so.
	Refuse func(Identity) error
	Log    *slog.Logger // nil: slog.Default()
}

// Serve answers the connections of l, which must come from [Mux.Listen], until ctx is
// done.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept from servers: %w", err)
		}
		conns.Go(func() { s.serve(ctx, c) })
	}
}

// serverConn is one connection with the calls that are being answered.
type serverConn struct {
	*Server
	from  Identity
	out   *outbox
	no    error         // why nothing is done; nil: no reason
	slots chan struct{} // one for every call under way
	calls sync.WaitGroup
}

func (s *Server) serve(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	c := &serverConn{Server: s, out: newOutbox(), slots: make(chan struct{}, maxCalls)}
	if t, ok := conn.(*tls.Conn); ok {
		c.from, _ = IdentityOf(t.ConnectionState())
	}
	if s.Refuse != nil {
		c.no = s.Refuse(c.from)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var writing sync.WaitGroup
	writing.Go(func() {
		if err := c.out.run(conn); err != nil {
			conn.Close()
		}
	})
	err := c.read(ctx, bufio.NewReaderSize(conn, 64<<10))
	cancel()
	conn.Close()
	c.calls.Wait()
	c.out.fail(net.ErrClosed)
	writing.Wait()
	if s.Log != nil {
		s.Log.Debug("server disconnected", "server", c.from.Name, "reason", err)
	}
}

// read takes calls off the connection. While maxCalls are under way it takes no more:
// the other end waits.
func (c *serverConn) read(ctx context.Context, r *bufio.Reader) error {
	for {
		f, err := readFrame(r, maxFrame)
		if err != nil {
			return err
		}
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if c.no != nil {
			c.fail(f.id, c.no)
			continue
		}
		switch f.kind {
		case methodPropose:
			c.propose(ctx, f)
		case methodReadIndex:
			c.calls.Go(func() { c.readIndex(ctx, f.id) })
		case methodCall:
			c.calls.Go(func() { c.call(ctx, f) })
		default:
			c.fail(f.id, fmt.Errorf("method %d is not known: this server is older than the one that calls", f.kind))
		}
	}
}

func (c *serverConn) answer(id uint32, status byte, payload []byte) {
	<-c.slots
	_ = c.out.add(id, status, payload) // a broken connection has nobody to tell
}

func (c *serverConn) fail(id uint32, err error) {
	status, payload := appendError(nil, err)
	c.answer(id, status, payload)
}

func (c *serverConn) propose(ctx context.Context, f frame) {
	err := c.Store.ProposeEncoded(ctx, f.payload, func(r command.Result, err error) {
		var buf [64]byte
		status, payload := appendResult(buf[:0], r, err)
		c.answer(f.id, status, payload)
	})
	if err != nil {
		c.fail(f.id, err)
	}
}

func (c *serverConn) readIndex(ctx context.Context, id uint32) {
	revision, err := c.Store.ReadIndex(ctx)
	if err != nil {
		c.fail(id, err)
		return
	}
	c.answer(id, statusOK, binary.AppendUvarint(nil, revision))
}

func (c *serverConn) call(ctx context.Context, f frame) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	out, err := c.dispatch(ctx, f.payload)
	if err != nil {
		c.fail(f.id, err)
		return
	}
	data, err := json.Marshal(out)
	if err != nil {
		c.fail(f.id, err)
		return
	}
	c.answer(f.id, statusOK, data)
}

func (c *serverConn) dispatch(ctx context.Context, payload []byte) (any, error) {
	if len(payload) == 0 || len(payload) < 1+int(payload[0]) {
		return nil, errMalformed
	}
	name := string(payload[1 : 1+payload[0]])
	h := c.Handlers[name]
	if h == nil {
		return nil, fmt.Errorf("call %q is not known: this server is older than the one that calls", name)
	}
	return h(ctx, c.from, payload[1+payload[0]:])
}
