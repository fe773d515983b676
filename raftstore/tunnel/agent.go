package tunnel

//lint:file-ignore SA1019 net/http speaks HTTP/2 on connections that it made itself or whose ALPN says so; these are neither.

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/raftstore/apiserver"
)

// Agent keeps a tunnel open to every server. All fields but Log are required.
type Agent struct {
	Node    string
	Servers func() []string // host:port
	TLS     func() *tls.Config
	// Local reaches the containers and metrics of this node.
	Local apiserver.Nodes
	// Streams are conversations that servers may begin, by name. Each ends when the function
	// returns; ctx ends when the server is gone.
	Streams map[string]func(ctx context.Context, with io.ReadWriter) error
	Log     *slog.Logger // nil: slog.Default()
}

const (
	lookEvery = 5 * time.Second // at which servers there are
	firstWait = 200 * time.Millisecond
	lastWait  = 10 * time.Second
)

// Run keeps the tunnels until ctx is done, and returns nil then.
func (a *Agent) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	open := map[string]context.CancelFunc{}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		servers := a.Servers()
		for _, address := range servers {
			if open[address] == nil {
				one, cancel := context.WithCancel(ctx)
				open[address] = cancel
				wg.Go(func() { a.keep(one, address) })
			}
		}
		for address, cancel := range open {
			if !slices.Contains(servers, address) {
				cancel()
				delete(open, address)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			for _, cancel := range open {
				cancel()
			}
			return nil
		}
	}
}

// keep keeps the tunnel to one server.
func (a *Agent) keep(ctx context.Context, address string) {
	for wait := firstWait; ctx.Err() == nil; wait = min(2*wait, lastWait) {
		begun := time.Now()
		err := a.once(ctx, address)
		if time.Since(begun) > lastWait {
			wait = firstWait
		}
		if a.Log != nil && ctx.Err() == nil {
			a.Log.Debug("tunnel ended", "server", address, "reason", err, "retry", wait)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// once serves one connection to its end.
func (a *Agent) once(ctx context.Context, address string) error {
	config := a.TLS().Clone()
	config.NextProtos = []string{Protocol}
	dialing, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	d := tls.Dialer{NetDialer: &net.Dialer{KeepAlive: 15 * time.Second}, Config: config}
	conn, err := d.DialContext(dialing, "tcp", address)
	if err != nil {
		return fmt.Errorf("connect to %s: %w", address, err)
	}
	defer conn.Close()
	if conn.(*tls.Conn).ConnectionState().NegotiatedProtocol != Protocol {
		return fmt.Errorf("connect to %s: it does not speak %s", address, Protocol)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+logsPath, a.logs)
	mux.HandleFunc("POST "+execPath, a.exec)
	mux.HandleFunc("GET "+metricsPath, a.metrics)
	for name, converse := range a.Streams {
		mux.HandleFunc("POST "+streamsPath+name, a.stream(name, converse))
	}
	(&http2.Server{MaxConcurrentStreams: 500, ReadIdleTimeout: 15 * time.Second, PingTimeout: 10 * time.Second}).ServeConn(conn, &http2.ServeConnOpts{Context: ctx, Handler: mux})
	return nil
}

// pod is what Local needs to know of a pod.
func (r *request) pod() *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: r.Pod, UID: types.UID(r.UID)}}
}

// flushing sends every write at once.
type flushing struct{ w http.ResponseWriter }

// Write implements io.Writer.
func (f flushing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = http.NewResponseController(f.w).Flush()
	}
	return n, err
}

func (a *Agent) logs(w http.ResponseWriter, r *http.Request) {
	req, err := decode(r.Header.Get(requestHeader))
	if err != nil || req.Logs == nil {
		http.Error(w, "malformed request", http.StatusBadRequest)
		return
	}
	out := &begun{w: flushing{w}}
	err = a.Local.Logs(r.Context(), a.Node, req.pod(), req.Logs, out)
	switch {
	case err != nil && !out.any:
		writeRefusal(w, err)
	case err != nil:
		panic(http.ErrAbortHandler) // the reader must not take this for the end of the log
	}
}

// begun notes whether anything was written.
type begun struct {
	w   io.Writer
	any bool
}

// Write implements io.Writer.
func (b *begun) Write(p []byte) (int, error) {
	b.any = true
	return b.w.Write(p)
}

func (a *Agent) exec(w http.ResponseWriter, r *http.Request) {
	req, err := decode(r.Header.Get(requestHeader))
	if err != nil || req.Exec == nil {
		http.Error(w, "malformed request", http.StatusBadRequest)
		return
	}
	control := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if err := control.Flush(); err != nil {
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	down := &frameWriter{w: w, flush: func() { _ = control.Flush() }} // who has gone reads nothing
	e := apiserver.ExecStreams{Container: req.Exec.Container, Command: req.Exec.Command, TTY: req.Exec.TTY}
	if req.Exec.Stdout {
		e.Stdout = stream{down, frameStdout}
	}
	if req.Exec.Stderr {
		e.Stderr = stream{down, frameStderr}
	}
	stdin, feed := io.Pipe()
	if req.Exec.Stdin {
		e.Stdin = stdin
	}
	sizes := make(chan apiserver.TerminalSize, 1)
	if req.Exec.Resize {
		e.Resize = sizes
	}
	go func() {
		defer close(sizes)
		feed.CloseWithError(takeInput(ctx, bufio.NewReader(r.Body), feed, sizes))
	}()
	code, err := a.Local.Exec(ctx, a.Node, req.pod(), e)
	stdin.Close()
	if err != nil {
		_ = down.write(frameError, []byte(err.Error()))
		return
	}
	_ = down.write(frameExit, strconv.AppendInt(nil, int64(code), 10))
}

// metrics answers a scrape.
func (a *Agent) metrics(w http.ResponseWriter, r *http.Request) {
	e, err := a.Local.Metrics(r.Context(), a.Node, r.Header)
	if err != nil {
		writeRefusal(w, err)
		return
	}
	if e.Write(w) != nil {
		panic(http.ErrAbortHandler) // the server must not take this for all there is
	}
}

// stream serves one kind of conversation.
func (a *Agent) stream(name string, converse func(context.Context, io.ReadWriter) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if http.NewResponseController(w).Flush() != nil { // so that the server may begin
			return
		}
		both := struct {
			io.Reader
			io.Writer
		}{r.Body, flushing{w}}
		if err := converse(r.Context(), both); err != nil {
			if a.Log != nil {
				a.Log.Debug("stream ended", "stream", name, "reason", err)
			}
			panic(http.ErrAbortHandler) // the server must not take this for an orderly end
		}
	}
}

// takeInput passes on what the server sends until it ends.
func takeInput(ctx context.Context, r io.Reader, stdin io.Writer, sizes chan<- apiserver.TerminalSize) error {
	for {
		kind, payload, err := readFrame(r)
		if err != nil {
			return err
		}
		switch kind {
		case frameStdin:
			if len(payload) == 0 {
				// Sizes may still follow; they are of no use to a process without input.
				return io.EOF
			}
			if _, err := stdin.Write(payload); err != nil {
				return err
			}
		case frameResize:
			var size apiserver.TerminalSize
			if json.Unmarshal(payload, &size) != nil {
				continue
			}
			select {
			case sizes <- size:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}
