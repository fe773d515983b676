package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// session is one exec connection, whatever protocol carries it. Streams the client
// did not ask for are nil.
type session struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	resize         io.Reader // one JSON TerminalSize after the other
	// finish tells the client how the process ended, and closes the connection.
	finish func(*metav1.Status)
	// closed is closed when the client has gone.
	closed <-chan struct{}
}

// serveExec runs a process in a container and connects it with the client, over
// SPDY or WebSocket.
func (s *Server) serveExec(w http.ResponseWriter, r *http.Request, t target) error {
	if r.Method != http.MethodPost && r.Method != http.MethodGet {
		return apierrors.NewMethodNotSupported(groupResource(t.kind.Resource), r.Method)
	}
	pod, err := s.runningPod(t)
	if err != nil {
		return err
	}
	opts, err := parseExecOptions(r.URL.Query())
	if err != nil {
		return err
	}
	if opts.Container, err = pickContainer(pod, opts.Container); err != nil {
		return err
	}
	if !httpstream.IsUpgradeRequest(r) {
		return apierrors.NewBadRequest("exec needs a connection that is upgraded to SPDY/3.1 or WebSocket")
	}
	if !s.streams.enter() {
		return apierrors.NewTooManyRequests("too many logs, execs and scrapes of nodes are open", 10)
	}
	defer s.streams.leave()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	var open func(context.Context, http.ResponseWriter, *http.Request, *corev1.PodExecOptions) (*session, error)
	if wsstream.IsWebSocketRequest(r) {
		open = s.openWebSocket
	} else {
		open = s.openSPDY
	}
	conn, err := open(ctx, w, r, opts)
	if err != nil {
		s.log.Debug("open exec", "pod", t.key(), "error", err) // the client was told
		return nil
	}
	s.runExec(ctx, cancel, conn, pod, opts)
	return nil
}

func parseExecOptions(q url.Values) (*corev1.PodExecOptions, error) {
	o := &corev1.PodExecOptions{Container: q.Get("container"), Command: q["command"]}
	for name, to := range map[string]*bool{"stdin": &o.Stdin, "stdout": &o.Stdout, "stderr": &o.Stderr, "tty": &o.TTY} {
		if v := q.Get(name); v != "" {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return nil, apierrors.NewBadRequest(name + " must be true or false")
			}
			*to = b
		}
	}
	if len(o.Command) == 0 {
		return nil, apierrors.NewBadRequest("exec needs a command")
	}
	if !o.Stdin && !o.Stdout && !o.Stderr {
		return nil, apierrors.NewBadRequest("exec needs at least one of stdin, stdout, stderr")
	}
	if o.TTY {
		o.Stderr = false // a terminal has one output
	}
	return o, nil
}

// runExec connects the process with the session and reports how it ended.
func (s *Server) runExec(ctx context.Context, cancel context.CancelFunc, conn *session, pod *corev1.Pod, opts *corev1.PodExecOptions) {
	done := make(chan struct{})
	go func() { // a client that left ends its process
		defer cancel()
		select {
		case <-conn.closed:
		case <-done:
		}
	}()
	e := ExecStreams{Container: opts.Container, Command: opts.Command, TTY: opts.TTY, Stdin: conn.stdin, Stdout: conn.stdout, Stderr: conn.stderr}
	resized := make(chan struct{})
	if conn.resize != nil {
		sizes := make(chan TerminalSize)
		e.Resize = sizes
		go func() {
			defer close(resized)
			readSizes(ctx, conn.resize, sizes)
		}()
	} else {
		close(resized)
	}
	code, err := s.cfg.Nodes.Exec(ctx, pod.Spec.NodeName, pod, e)
	if err != nil && ctx.Err() == nil {
		s.log.Warn("exec", "pod", pod.Namespace+"/"+pod.Name, "container", opts.Container, "error", err)
	}
	conn.finish(execStatus(code, err))
	close(done)
	<-resized
}

// readSizes forwards terminal sizes; when the process is slow to take them, only
// the order is kept.
func readSizes(ctx context.Context, r io.Reader, sizes chan<- TerminalSize) {
	defer close(sizes)
	d := json.NewDecoder(r)
	for {
		var size TerminalSize
		if d.Decode(&size) != nil {
			return
		}
		select {
		case sizes <- size:
		case <-ctx.Done():
			return
		}
	}
}

// execStatus is the last message of protocol v4 and later.
func execStatus(code int, err error) *metav1.Status {
	switch {
	case errors.Is(err, context.Canceled):
		return newStatus(http.StatusInternalServerError, metav1.StatusReasonInternalError, "the connection ended before the process")
	case err != nil:
		status := statusOf(err)
		status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
		return status
	case code == 0:
		return &metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusSuccess}
	}
	status := newStatus(http.StatusInternalServerError, remotecommand.NonZeroExitCodeReason, fmt.Sprintf("command terminated with non-zero exit code: %d", code))
	status.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: remotecommand.ExitCodeCauseType, Message: strconv.Itoa(code)}}}
	return status
}
