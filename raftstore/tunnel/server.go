package tunnel

//lint:file-ignore SA1019 net/http speaks HTTP/2 on connections that it made itself or whose ALPN says so; these are neither.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/apiserver"
)

// ErrNoAgent says that the agent of a node is not connected to this server.
var ErrNoAgent = errors.New("the agent of this node is not connected")

// Server reaches nodes through their tunnels: it implements [apiserver.Nodes]. It is
// safe for concurrent use.
type Server struct {
	// Node returns whose agent a connection is, and false if it is nobody's.
	Node func(net.Conn) (string, bool)
	Log  *slog.Logger // nil: slog.Default()

	mu      sync.Mutex
	tunnels map[string]*http2.ClientConn
}

var _ apiserver.Nodes = (*Server)(nil)

// patience is how long a request waits for an agent that is just connecting.
const patience = 3 * time.Second

// Serve takes the tunnels that agents open on l until ctx is done.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	// Pings find agents that vanished; unused tunnels stay.
	transport := &http2.Transport{ReadIdleTimeout: 15 * time.Second, PingTimeout: 10 * time.Second}
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept agents: %w", err)
		}
		node, ok := s.Node(conn)
		if !ok {
			conn.Close()
			continue
		}
		tunnel, err := transport.NewClientConn(conn)
		if err != nil {
			conn.Close()
			continue
		}
		s.mu.Lock()
		if s.tunnels == nil {
			s.tunnels = map[string]*http2.ClientConn{}
		}
		old := s.tunnels[node]
		s.tunnels[node] = tunnel // the newest counts: the agent has restarted
		s.mu.Unlock()
		if old != nil {
			go old.Shutdown(ctx) // what is under way may end
		}
	}
}

// tunnel returns the connection of a node.
func (s *Server) tunnel(ctx context.Context, node string) (*http2.ClientConn, error) {
	deadline := time.Now().Add(patience)
	for {
		s.mu.Lock()
		t := s.tunnels[node]
		s.mu.Unlock()
		if t != nil && t.CanTakeNewRequest() {
			return t, nil
		}
		timer := time.NewTimer(50 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("node %s: %w", node, ErrNoAgent)
		}
	}
}

// ask sends a request through a node's tunnel; body may be nil.
func (s *Server) ask(ctx context.Context, node, path string, r request, body io.Reader) (*http.Response, error) {
	t, err := s.tunnel(ctx, node)
	if err != nil {
		return nil, err
	}
	header, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("ask node %s: %w", node, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+node+path, body)
	if err != nil {
		return nil, fmt.Errorf("ask node %s: %w", node, err)
	}
	req.Header.Set(requestHeader, string(header))
	return roundTrip(t, node, req)
}

// roundTrip returns an answer that is none of refusal.
func roundTrip(t *http2.ClientConn, node string, req *http.Request) (*http.Response, error) {
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask node %s: %w", node, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, refusal(resp)
	}
	return resp, nil
}

// Logs implements [apiserver.Nodes].
func (s *Server) Logs(ctx context.Context, node string, pod *corev1.Pod, opts *corev1.PodLogOptions, w io.Writer) error {
	resp, err := s.ask(ctx, node, logsPath, request{Namespace: pod.Namespace, Pod: pod.Name, UID: string(pod.UID), Logs: opts}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("log from node %s: %w", node, err)
	}
	return nil
}

// Exec implements [apiserver.Nodes].
func (s *Server) Exec(ctx context.Context, node string, pod *corev1.Pod, e apiserver.ExecStreams) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	input, feed := io.Pipe()
	// HTTP/2 does not look at ctx while it waits for more of a body.
	defer context.AfterFunc(ctx, func() { feed.CloseWithError(context.Cause(ctx)) })()
	defer feed.Close()
	up := &frameWriter{w: feed}
	resp, err := s.ask(ctx, node, execPath, request{Namespace: pod.Namespace, Pod: pod.Name, UID: string(pod.UID), Exec: &execRequest{
		Container: e.Container, Command: e.Command, TTY: e.TTY,
		Stdin: e.Stdin != nil, Stdout: e.Stdout != nil, Stderr: e.Stderr != nil, Resize: e.Resize != nil,
	}}, input)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if e.Stdin != nil {
		go func() {
			// What cannot be sent any more has nobody to read it.
			if _, err := io.Copy(stream{up, frameStdin}, e.Stdin); err == nil {
				_ = up.write(frameStdin, nil)
			}
		}()
	}
	if e.Resize != nil {
		go passSizes(ctx, e.Resize, up)
	}
	return receive(resp.Body, e)
}

// Metrics implements [apiserver.Nodes]. An agent that is too old to be asked is a [Refused] with
// code 404.
func (s *Server) Metrics(ctx context.Context, node string, accept http.Header) (*apiserver.Exposition, error) {
	t, err := s.tunnel(ctx, node)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+node+metricsPath, nil)
	if err != nil {
		return nil, fmt.Errorf("ask node %s: %w", node, err)
	}
	maps.Copy(req.Header, accept)
	if req.Header.Get("Accept-Encoding") == "" {
		req.Header.Set("Accept-Encoding", "identity") // the transport would unpack what it asks for by itself
	}
	resp, err := roundTrip(t, node, req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, apiserver.MaxExposition+1))
	if err != nil {
		return nil, fmt.Errorf("metrics from node %s: %w", node, err)
	}
	if len(body) > apiserver.MaxExposition {
		return nil, apiserver.ErrTooLarge
	}
	return &apiserver.Exposition{Type: resp.Header.Get("Content-Type"), Encoding: resp.Header.Get("Content-Encoding"), Body: body}, nil
}

// Stream begins a conversation with a node, which it has under that name; a node that does not
// is too old for it, which is a [Refused] with code 404. It lasts until ctx ends or it is
// closed; Close waits until the node has ended its side.
func (s *Server) Stream(ctx context.Context, node, name string) (io.ReadWriteCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	input, feed := io.Pipe()
	// HTTP/2 does not look at ctx while it waits for more of a body.
	context.AfterFunc(ctx, func() { feed.CloseWithError(context.Cause(ctx)) })
	resp, err := s.ask(ctx, node, streamsPath+name, request{}, input)
	if err != nil {
		cancel()
		return nil, err
	}
	return &conversation{Reader: resp.Body, Writer: feed, close: func() error {
		defer cancel()
		defer resp.Body.Close()
		feed.Close()
		_, err := io.Copy(io.Discard, resp.Body)
		return err
	}}, nil
}

// conversation is both directions of a stream.
type conversation struct {
	io.Reader
	io.Writer
	close func() error
}

// Close implements io.Closer.
func (c *conversation) Close() error { return c.close() }

func passSizes(ctx context.Context, sizes <-chan apiserver.TerminalSize, up *frameWriter) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			data, _ := json.Marshal(size) // two numbers
			if up.write(frameResize, data) != nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// receive passes on what a process writes, until it tells how it ended.
func receive(r io.Reader, e apiserver.ExecStreams) (int, error) {
	for {
		kind, payload, err := readFrame(r)
		if err != nil {
			return 0, fmt.Errorf("the connection to the node broke: %w", err)
		}
		switch kind {
		case frameStdout:
			if _, err := e.Stdout.Write(payload); err != nil {
				return 0, err
			}
		case frameStderr:
			if _, err := e.Stderr.Write(payload); err != nil {
				return 0, err
			}
		case frameExit:
			var code int
			if err := json.Unmarshal(payload, &code); err != nil {
				return 0, fmt.Errorf("exit code: %w", err)
			}
			return code, nil
		case frameError:
			return 0, &Refused{Code: http.StatusInternalServerError, Text: string(payload)}
		}
	}
}
