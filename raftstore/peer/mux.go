package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Limits bound what strangers may use before they have said who they are. Zero values
// take the defaults.
type Limits struct {
	Handshakes int           // TLS handshakes under way; 1,024
	PerSource  int           // of these, from one address; 128
	Handshake  time.Duration // wall time of one; 10 s
	Conns      int           // connections in all; 20,000
}

func (l *Limits) setDefaults() {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	set(&l.Handshakes, 1024)
	set(&l.PerSource, 128)
	set(&l.Conns, 20_000)
	if l.Handshake == 0 {
		l.Handshake = 10 * time.Second
	}
}

// MuxConfig says how a Mux treats connections.
type MuxConfig struct {
	// TLS holds the server's certificate. It offers the protocols that [Mux.Listen]
	// was asked for.
	TLS *tls.Config
	// Admit decides about a connection after its handshake; nil: all are welcome.
	Admit func(protocol string, state tls.ConnectionState) error
	Log   *slog.Logger // nil: slog.Default()
	Limits
}

// Mux lets several servers share one TCP port: the TLS handshake says by ALPN (RFC
// 7301) which of them a connection is for. All of its methods are safe for concurrent
// use.
type Mux struct {
	cfg   MuxConfig
	inner net.Listener
	log   *slog.Logger

	mu      sync.Mutex
	outlets map[string]*outlet // by protocol
	conns   map[net.Conn]*trackedConn
	shaking map[string]int // handshakes under way, by source address
	pending int
	closed  chan struct{}
}

// NewMux returns a Mux that accepts nothing until [Mux.Serve].
func NewMux(l net.Listener, cfg MuxConfig) *Mux {
	cfg.setDefaults()
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Mux{cfg: cfg, inner: l, log: cfg.Log, outlets: map[string]*outlet{}, conns: map[net.Conn]*trackedConn{}, shaking: map[string]int{}, closed: make(chan struct{})}
}

// outlet is the listener of some protocols.
type outlet struct {
	mux   *Mux
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

// Listen returns a listener of the connections that ask for one of the protocols. Its
// connections are *tls.Conn whose handshake is complete. Call it before Serve.
func (m *Mux) Listen(protocols ...string) net.Listener {
	o := &outlet{mux: m, conns: make(chan net.Conn), done: make(chan struct{})}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range protocols {
		m.outlets[p] = o
	}
	return o
}

// Accept implements net.Listener.
func (o *outlet) Accept() (net.Conn, error) {
	select {
	case c := <-o.conns:
		return c, nil
	case <-o.done:
	case <-o.mux.closed:
	}
	return nil, net.ErrClosed
}

// Close implements net.Listener: it ends this listener, not the port.
func (o *outlet) Close() error {
	o.once.Do(func() { close(o.done) })
	return nil
}

// Addr implements net.Listener.
func (o *outlet) Addr() net.Addr { return o.mux.inner.Addr() }

// Serve accepts connections until ctx is done, then closes all of them and the port.
// It returns nil after an orderly end.
func (m *Mux) Serve(ctx context.Context) error {
	var handshakes sync.WaitGroup
	defer handshakes.Wait()
	defer m.close()
	stop := context.AfterFunc(ctx, func() { m.inner.Close() })
	defer stop()
	config := m.cfg.TLS.Clone()
	config.NextProtos = nil
	m.mu.Lock()
	for p := range m.outlets {
		config.NextProtos = append(config.NextProtos, p)
	}
	m.mu.Unlock()
	config = m.withProtocols(config)
	for pause := time.Duration(0); ; {
		c, err := m.inner.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept on %s: %w", m.inner.Addr(), err)
		case err != nil: // no file descriptors left, for example
			pause = min(max(5*time.Millisecond, 2*pause), time.Second)
			m.log.Warn("accept", "error", err, "retry", pause)
			if !sleep(ctx, pause) {
				return nil
			}
			continue
		}
		pause = 0
		tracked := &trackedConn{Conn: c, mux: m}
		if !m.enter(tracked) {
			c.Close()
			continue
		}
		handshakes.Go(func() { m.admit(ctx, tracked, config) })
	}
}

// withProtocols makes sure that a config which is made anew for every client offers
// the protocols too.
func (m *Mux) withProtocols(config *tls.Config) *tls.Config {
	perClient := config.GetConfigForClient
	if perClient == nil {
		return config
	}
	protocols := config.NextProtos
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := perClient(hello)
		if err != nil || c == nil {
			return c, err
		}
		c = c.Clone()
		c.NextProtos = protocols
		return c, nil
	}
	return config
}

// enter reports whether there is room for another stranger.
func (m *Mux) enter(c *trackedConn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	source := sourceOf(c)
	full := m.pending >= m.cfg.Handshakes || m.shaking[source] >= m.cfg.PerSource || len(m.conns) >= m.cfg.Conns
	if full {
		m.log.Debug("connection refused: too many", "from", source, "handshakes", m.pending, "connections", len(m.conns))
		return false
	}
	m.pending++
	m.shaking[source]++
	m.conns[c.Conn] = c
	return true
}

func (m *Mux) shaken(c net.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pending--
	source := sourceOf(c)
	if m.shaking[source]--; m.shaking[source] == 0 {
		delete(m.shaking, source)
	}
}

func (m *Mux) forget(c net.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.conns, c)
}

func sourceOf(c net.Conn) string {
	host, _, err := net.SplitHostPort(c.RemoteAddr().String())
	if err != nil {
		return c.RemoteAddr().String()
	}
	return host
}

// admit shakes hands and passes the connection on.
func (m *Mux) admit(ctx context.Context, tracked *trackedConn, config *tls.Config) {
	conn := tls.Server(tracked, config)
	err := m.handshake(ctx, conn)
	m.shaken(tracked)
	if err != nil {
		m.log.Debug("connection refused", "from", tracked.RemoteAddr(), "error", err)
		conn.Close()
		return
	}
	state := conn.ConnectionState()
	m.mu.Lock()
	tracked.state = &state // before Admit looks: what changes after that look, Recheck sees
	o := m.outlets[state.NegotiatedProtocol]
	if o == nil {
		o = m.outlets["http/1.1"] // who does not speak ALPN speaks HTTP
	}
	m.mu.Unlock()
	if m.cfg.Admit != nil {
		if err := m.cfg.Admit(state.NegotiatedProtocol, state); err != nil {
			m.log.Warn("connection refused", "from", tracked.RemoteAddr(), "protocol", state.NegotiatedProtocol, "error", err)
			conn.Close()
			return
		}
	}
	if o == nil {
		conn.Close()
		return
	}
	select {
	case o.conns <- conn:
	case <-o.done:
		conn.Close()
	case <-ctx.Done():
		conn.Close()
	}
}

func (m *Mux) handshake(ctx context.Context, conn *tls.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Handshake)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	return nil
}

// Recheck closes the connections that still says an error about: their TLS state is
// that of their handshake, and what it was judged by may have changed since. Handshakes
// under way are not its matter, Admit decides about them later. It returns how many
// connections it has closed. still must not wait.
func (m *Mux) Recheck(still func(protocol string, state tls.ConnectionState) error) (closed int) {
	m.mu.Lock()
	var conns []*trackedConn
	for _, c := range m.conns {
		if c.state != nil {
			conns = append(conns, c)
		}
	}
	m.mu.Unlock()
	for _, c := range conns {
		err := still(c.state.NegotiatedProtocol, *c.state)
		if err == nil {
			continue
		}
		m.log.Warn("connection closed", "from", c.RemoteAddr(), "protocol", c.state.NegotiatedProtocol, "error", err)
		c.Close() // not TLS's, which would wait for whoever is slow to read
		closed++
	}
	return closed
}

// close ends the port and every connection that came through it.
func (m *Mux) close() {
	m.inner.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.closed)
	for c := range m.conns {
		c.Close()
	}
}

// trackedConn tells the mux when it is closed.
type trackedConn struct {
	net.Conn
	mux   *Mux
	state *tls.ConnectionState // nil until the handshake is complete; written once, under the mux's lock
	once  sync.Once
}

func (t *trackedConn) Close() error {
	t.once.Do(func() { t.mux.forget(t.Conn) })
	return t.Conn.Close()
}

// sleep waits and reports whether the time has passed before ctx was done.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
