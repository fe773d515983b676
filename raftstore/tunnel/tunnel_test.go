package tunnel_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/raftstore/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo is a node whose processes echo.
type echo struct{}

func (echo) Logs(ctx context.Context, node string, pod *corev1.Pod, opts *corev1.PodLogOptions, w io.Writer) error {
	switch opts.Container {
	case "none":
		return fmt.Errorf("%w: no such container", apiserver.ErrNotFound)
	case "fresh":
		return apierrors.NewBadRequest("it was never restarted")
	case "broken":
		io.WriteString(w, "half")
		return errors.New("the disk is gone")
	case "follow":
		io.WriteString(w, "first\n")
		<-ctx.Done()
		return context.Cause(ctx)
	}
	_, err := fmt.Fprintf(w, "%s %s/%s %s\n", node, pod.Namespace, pod.Name, opts.Container)
	return err
}

func (echo) Exec(ctx context.Context, _ string, _ *corev1.Pod, e apiserver.ExecStreams) (int, error) {
	switch e.Command[0] {
	case "fail":
		return 0, errors.New("no such program")
	case "size":
		size := <-e.Resize
		fmt.Fprintf(e.Stdout, "%dx%d", size.Width, size.Height)
		return 0, nil
	case "cat":
		_, err := io.Copy(e.Stdout, e.Stdin)
		return 7, err
	case "hang":
		<-ctx.Done()
		return 0, context.Cause(ctx)
	}
	io.WriteString(e.Stderr, "err")
	return 3, nil
}

// Metrics is as long as the asker wants it to be.
func (echo) Metrics(_ context.Context, node string, accept http.Header) (*apiserver.Exposition, error) {
	e := &apiserver.Exposition{Type: "text/plain; version=0.0.4", Encoding: accept.Get("Accept-Encoding")}
	switch accept.Get("Accept") {
	case "stuck":
		return nil, apierrors.NewServiceUnavailable("it is stuck")
	case "all":
		e.Body = make([]byte, apiserver.MaxExposition)
	case "too much":
		e.Body = make([]byte, apiserver.MaxExposition+1)
	default:
		e.Body = []byte("up 1\n")
	}
	return e, nil
}

func setUp(t *testing.T) (*tunnel.Server, context.Context) {
	ca, err := pki.Open(t.TempDir(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	config := func(r pki.Request) *tls.Config {
		pair, err := ca.Issue(r, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pair.TLS()
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(ca.CertPEM())
		return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: pool, ClientCAs: pool, ClientAuth: tls.VerifyClientCertIfGiven, ServerName: pki.ServerName}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := peer.NewMux(l, peer.MuxConfig{TLS: config(pki.ServerIdentity("s1"))})
	agents := mux.Listen(tunnel.Protocol)
	server := &tunnel.Server{Node: func(c net.Conn) (string, bool) {
		who, ok := peer.IdentityOf(c.(*tls.Conn).ConnectionState())
		node, isNode := strings.CutPrefix(who.Name, pki.NodePrefix)
		return node, ok && isNode
	}}
	node := config(pki.Node("n1"))
	agent := &tunnel.Agent{Node: "n1", Servers: func() []string { return []string{l.Addr().String()} }, TLS: func() *tls.Config { return node }, Local: echo{}, Streams: map[string]func(context.Context, io.ReadWriter) error{"double": double}}
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { mux.Serve(ctx) })
	parts.Go(func() { server.Serve(ctx, agents) })
	parts.Go(func() { agent.Run(ctx) })
	t.Cleanup(func() { cancel(); parts.Wait() })
	deadline, stop := context.WithTimeout(ctx, 20*time.Second)
	t.Cleanup(stop)
	return server, deadline
}

var pod = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}}

func TestLogs(t *testing.T) {
	s, ctx := setUp(t)
	var out bytes.Buffer
	if err := s.Logs(ctx, "n1", pod, &corev1.PodLogOptions{Container: "c"}, &out); err != nil || out.String() != "n1 default/web c\n" {
		t.Fatalf("%q, %v", out.String(), err)
	}
	if err := s.Logs(ctx, "n1", pod, &corev1.PodLogOptions{Container: "none"}, &out); !errors.Is(err, apiserver.ErrNotFound) {
		t.Fatalf("a container that is not there: %v", err)
	}
	var refused *tunnel.Refused
	if err := s.Logs(ctx, "n1", pod, &corev1.PodLogOptions{Container: "fresh"}, &out); !errors.As(err, &refused) || refused.Code != http.StatusBadRequest {
		t.Fatalf("a mistake of the request: %v", err)
	}
	if err := s.Logs(ctx, "n1", pod, &corev1.PodLogOptions{Container: "broken"}, io.Discard); err == nil {
		t.Fatal("half a log was taken for a whole one")
	}
	if err := s.Logs(ctx, "n2", pod, &corev1.PodLogOptions{Container: "c"}, io.Discard); !errors.Is(err, tunnel.ErrNoAgent) {
		t.Fatalf("a node without an agent: %v", err)
	}
	following, stop := context.WithCancel(ctx)
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- s.Logs(following, "n1", pod, &corev1.PodLogOptions{Container: "follow"}, w) }()
	if line, err := io.ReadAll(io.LimitReader(r, 6)); err != nil || string(line) != "first\n" {
		t.Fatalf("%q, %v: a log is followed as it is written", line, err)
	}
	stop()
	if err := <-ended; err == nil {
		t.Fatal("a log that was given up has no end")
	}
}

func TestExec(t *testing.T) {
	s, ctx := setUp(t)
	var out, errs bytes.Buffer
	big := strings.Repeat("0123456789", 50_000)
	code, err := s.Exec(ctx, "n1", pod, apiserver.ExecStreams{Command: []string{"cat"}, Stdin: strings.NewReader(big), Stdout: &out})
	if err != nil || code != 7 || out.String() != big {
		t.Fatalf("code %d, %d bytes, %v", code, out.Len(), err)
	}
	code, err = s.Exec(ctx, "n1", pod, apiserver.ExecStreams{Command: []string{"true"}, Stdout: &out, Stderr: &errs})
	if err != nil || code != 3 || errs.String() != "err" {
		t.Fatalf("code %d, %q, %v", code, errs.String(), err)
	}
	if _, err = s.Exec(ctx, "n1", pod, apiserver.ExecStreams{Command: []string{"fail"}, Stdout: &out}); err == nil || !strings.Contains(err.Error(), "no such program") {
		t.Fatal(err)
	}
	out.Reset()
	sizes := make(chan apiserver.TerminalSize, 1)
	sizes <- apiserver.TerminalSize{Width: 80, Height: 25}
	if _, err = s.Exec(ctx, "n1", pod, apiserver.ExecStreams{Command: []string{"size"}, TTY: true, Stdout: &out, Resize: sizes}); err != nil || out.String() != "80x25" {
		t.Fatalf("%q, %v", out.String(), err)
	}
	gone, stop := context.WithTimeout(ctx, 200*time.Millisecond)
	defer stop()
	if _, err := s.Exec(gone, "n1", pod, apiserver.ExecStreams{Command: []string{"hang"}, Stdout: io.Discard}); err == nil {
		t.Fatal("a process that was given up has no exit code")
	}
}

func TestMetrics(t *testing.T) {
	s, ctx := setUp(t)
	for name, c := range map[string]struct {
		accept   http.Header
		encoding string
		size     int
	}{
		"text":                 {nil, "identity", len("up 1\n")},
		"packed, as it is":     {http.Header{"Accept-Encoding": {"gzip"}}, "gzip", len("up 1\n")},
		"as much as there may": {http.Header{"Accept": {"all"}}, "identity", apiserver.MaxExposition},
	} {
		e, err := s.Metrics(ctx, "n1", c.accept)
		if err != nil || e.Type != "text/plain; version=0.0.4" || e.Encoding != c.encoding || len(e.Body) != c.size {
			t.Errorf("%s: %+.200v, %v", name, e, err)
		}
	}
	if _, err := s.Metrics(ctx, "n1", http.Header{"Accept": {"too much"}}); !errors.Is(err, apiserver.ErrTooLarge) {
		t.Errorf("too much: %v", err)
	}
	var refused *tunnel.Refused
	if _, err := s.Metrics(ctx, "n1", http.Header{"Accept": {"stuck"}}); !errors.As(err, &refused) || refused.Code != http.StatusServiceUnavailable || !strings.Contains(refused.Text, "it is stuck") {
		t.Errorf("what the node's API would answer is lost: %v", err)
	}
	if _, err := s.Metrics(ctx, "n2", nil); !errors.Is(err, tunnel.ErrNoAgent) {
		t.Errorf("a node without an agent: %v", err)
	}
}

// double says every line twice, until the other side ends; "break" breaks.
func double(_ context.Context, with io.ReadWriter) error {
	lines := bufio.NewScanner(with)
	for lines.Scan() {
		if lines.Text() == "break" {
			return errors.New("broken")
		}
		fmt.Fprintf(with, "%[1]s %[1]s\n", lines.Text())
	}
	_, err := io.WriteString(with, "end\n")
	return err
}

func TestStream(t *testing.T) {
	s, ctx := setUp(t)
	with, err := s.Stream(ctx, "n1", "double")
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(with)
	for _, word := range []string{"one", "two"} { // either side waits for the other
		fmt.Fprintln(with, word)
		if got, err := lines.ReadString('\n'); err != nil || got != word+" "+word+"\n" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if err := with.Close(); err != nil {
		t.Errorf("an orderly end: %v", err)
	}
	var refused *tunnel.Refused
	if _, err := s.Stream(ctx, "n1", "unheard-of"); !errors.As(err, &refused) || refused.Code != http.StatusNotFound {
		t.Errorf("a stream that the node does not have: %v", err)
	}
	for name, end := range map[string]func(io.Writer, func()){
		"the node breaks it":  func(w io.Writer, _ func()) { fmt.Fprintln(w, "break") },
		"the asking one ends": func(_ io.Writer, stop func()) { stop() },
	} {
		asking, stop := context.WithCancel(ctx)
		with, err := s.Stream(asking, "n1", "double")
		if err != nil {
			t.Fatal(err)
		}
		end(with, stop)
		if got, err := io.ReadAll(with); err == nil {
			t.Errorf("%s: it looks like an orderly end after %q", name, got)
		}
		with.Close()
		stop()
	}
}
