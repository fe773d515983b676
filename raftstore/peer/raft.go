package peer

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore"
)

// RaftConfig says how raft's transport is made.
type RaftConfig struct {
	Listener net.Listener // from [Mux.Listen] with ProtocolRaft
	// Address is how the other servers find this one, host:port.
	Address string
	TLS     func() *tls.Config // asked before every connection
	// Ended is called when another server has closed its connection to this one, or
	// its process has ended; nil: nobody wants to know. It must not wait.
	Ended func(Identity)
	Log   *slog.Logger // nil: slog.Default()
}

// RaftTransport carries raft's messages. It implements raft.Transport.
type RaftTransport struct {
	*raft.NetworkTransport
	rpcs   chan raft.RPC
	closed chan struct{}
	once   sync.Once
}

// rpcTimeout is how long raft waits for another server.
const rpcTimeout = 10 * time.Second

// maxPool is how many connections to one server wait for the next message.
const maxPool = 3

// NewRaftTransport returns a transport. The store closes it.
func NewRaftTransport(cfg RaftConfig) *RaftTransport {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	t := &RaftTransport{rpcs: make(chan raft.RPC), closed: make(chan struct{})}
	t.NetworkTransport = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:          &streams{RaftConfig: cfg},
		MaxPool:         maxPool,
		MaxRPCsInFlight: 64,
		Timeout:         rpcTimeout,
		Logger:          raftstore.RaftLogger(cfg.Log),
	})
	go t.pass()
	return t
}

// pass hands on what comes from the network.
func (t *RaftTransport) pass() {
	for {
		select {
		case rpc := <-t.NetworkTransport.Consumer():
			select {
			case t.rpcs <- rpc:
			case <-t.closed:
				return
			}
		case <-t.closed:
			return
		}
	}
}

// Consumer implements raft.Transport.
func (t *RaftTransport) Consumer() <-chan raft.RPC { return t.rpcs }

// TimeoutNow implements raft.Transport. A server that tells itself to stand for
// election needs no network for it.
func (t *RaftTransport) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	if target != t.LocalAddr() {
		return t.NetworkTransport.TimeoutNow(id, target, args, resp)
	}
	answer := make(chan raft.RPCResponse, 1)
	select {
	case t.rpcs <- raft.RPC{Command: args, RespChan: answer}:
	case <-t.closed:
		return raft.ErrTransportShutdown
	}
	select {
	case a := <-answer:
		return a.Error
	case <-t.closed:
		return raft.ErrTransportShutdown
	}
}

// RequestVote implements raft.Transport.
func (t *RaftTransport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return overLive(func() error { return t.NetworkTransport.RequestVote(id, target, args, resp) })
}

// RequestPreVote implements raft.WithPreVote.
func (t *RaftTransport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return overLive(func() error { return t.NetworkTransport.RequestPreVote(id, target, args, resp) })
}

// overLive sends a message until it went over a connection that had not ended before. The
// pool holds those from before the other server's last start, and raft asks for a vote
// once an election: without this, the first election after a start could be lost. To be
// asked twice is nothing new to raft.
func overLive(send func() error) error {
	for range maxPool {
		if err := send(); !brokenOff(err) {
			return err
		}
	}
	return send()
}

// brokenOff reports whether the other end has closed a connection.
func brokenOff(err error) bool {
	for _, is := range []error{io.EOF, io.ErrUnexpectedEOF, unix.ECONNRESET, unix.EPIPE} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

// AppendEntriesPipeline implements raft.Transport.
func (t *RaftTransport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	return pipeline{p}, nil
}

// pipeline breaks off when it takes nothing more for a while. In hashicorp/raft 1.7.3 the
// goroutine that takes the answers can end while another one waits for room: a follower
// would get no entries ever again, and raft could not be stopped.
type pipeline struct{ raft.AppendPipeline }

// AppendEntries implements raft.AppendPipeline.
func (p pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	defer time.AfterFunc(rpcTimeout, func() { p.Close() }).Stop()
	return p.AppendPipeline.AppendEntries(args, resp)
}

// Close implements raft.WithClose.
func (t *RaftTransport) Close() error {
	t.once.Do(func() { close(t.closed) })
	return t.NetworkTransport.Close()
}

// streams is raft's view of the network: it implements raft.StreamLayer.
type streams struct{ RaftConfig }

// Accept implements net.Listener.
func (s *streams) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	if err != nil || s.Ended == nil {
		return c, err
	}
	t, ok := c.(*tls.Conn)
	if !ok {
		return c, nil
	}
	from, _ := IdentityOf(t.ConnectionState())
	return &watchedConn{Conn: c, ended: func() { s.Ended(from) }}, nil
}

// Close implements net.Listener.
func (s *streams) Close() error { return s.Listener.Close() }

// Addr implements net.Listener; raft takes it for this server's own address.
func (s *streams) Addr() net.Addr { return address(s.Address) }

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

// Dial implements raft.StreamLayer.
func (s *streams) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return dial(s.TLS(), ProtocolRaft, string(to), min(timeout, dialTimeout))
}

// watchedConn tells when the other end has closed it.
type watchedConn struct {
	net.Conn
	ended  func()
	once   sync.Once
	closed atomic.Bool
}

func (w *watchedConn) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err != nil && !w.closed.Load() {
		w.once.Do(w.ended)
	}
	return n, err
}

func (w *watchedConn) Close() error {
	w.closed.Store(true)
	return w.Conn.Close()
}
