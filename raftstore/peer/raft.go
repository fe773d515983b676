package peer

import (
	"crypto/tls"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

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

// NewRaftTransport returns the transport that carries raft's messages. The store
// closes it.
func NewRaftTransport(cfg RaftConfig) *raft.NetworkTransport {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:          &streams{RaftConfig: cfg},
		MaxPool:         3,
		MaxRPCsInFlight: 64,
		Timeout:         10 * time.Second,
		Logger:          raftstore.RaftLogger(cfg.Log),
	})
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
