// Package tunnel is how servers reach the containers and metrics of nodes elsewhere. The agent of
// a node dials every server and keeps the connection; over it the server asks, and the
// agent answers. So nodes listen on no port, and need not be reachable.
//
// The connection is mutual TLS with the protocol [Protocol]; within it runs HTTP/2 (RFC
// 9113) with the roles turned round: the agent, which dialled, is the HTTP server. Who
// may ask for what was decided by the API before a request gets here.
package tunnel

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/raftstore/apiserver"
)

// Protocol is the tunnel's name in ALPN (RFC 7301).
const Protocol = "decree-agent"

// The paths that an agent serves.
const (
	logsPath = "/logs"
	execPath = "/exec"
	// metricsPath is asked by GET: what the asker reads is in the headers.
	metricsPath = "/metrics"
	// streamsPath is followed by the name of a stream.
	streamsPath = "/streams/"
)

// request says what a server wants of a container.
type request struct {
	Namespace string                `json:"namespace"`
	Pod       string                `json:"pod"`
	UID       string                `json:"uid"`
	Logs      *corev1.PodLogOptions `json:"logs,omitempty"`
	Exec      *execRequest          `json:"exec,omitempty"`
}

type execRequest struct {
	Container string   `json:"container"`
	Command   []string `json:"command"`
	TTY       bool     `json:"tty,omitempty"`
	Stdin     bool     `json:"stdin,omitempty"`
	Stdout    bool     `json:"stdout,omitempty"`
	Stderr    bool     `json:"stderr,omitempty"`
	Resize    bool     `json:"resize,omitempty"`
}

// The frames of an exec: kind (1 byte), length (4 bytes, big endian), payload.
const (
	frameStdin    = 0 // an empty one ends it
	frameStdout   = 1
	frameStderr   = 2
	frameResize   = 3 // apiserver.TerminalSize as JSON
	frameExit     = 4 // the exit code as JSON, the last frame
	frameError    = 5 // why there is no exit code, the last frame
	maxFrame      = 64 << 10
	frameHeadSize = 5
)

// frameWriter writes frames of several goroutines to one stream.
type frameWriter struct {
	mu    sync.Mutex
	w     io.Writer
	flush func() // nil: nothing to flush
}

func (f *frameWriter) write(kind byte, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for first := true; first || len(p) > 0; first = false {
		n := min(len(p), maxFrame)
		buf := make([]byte, frameHeadSize, frameHeadSize+n)
		buf[0] = kind
		binary.BigEndian.PutUint32(buf[1:], uint32(n))
		if _, err := f.w.Write(append(buf, p[:n]...)); err != nil {
			return err
		}
		p = p[n:]
	}
	if f.flush != nil {
		f.flush()
	}
	return nil
}

// stream is the io.Writer of one kind of frame.
type stream struct {
	frames *frameWriter
	kind   byte
}

// Write implements io.Writer.
func (s stream) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil // an empty frame has a meaning of its own
	}
	if err := s.frames.write(s.kind, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// readFrame reads one frame.
func readFrame(r io.Reader) (kind byte, payload []byte, err error) {
	var head [frameHeadSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("frame of %d bytes, at most %d are possible", n, maxFrame)
	}
	payload = make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, fmt.Errorf("frame: %w", err)
	}
	return head[0], payload, nil
}

// The header that tells an error of the request from one of the machinery.
const notFoundHeader = "Decree-Not-Found"

// refusal makes an error of an answer that is none.
func refusal(resp *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	if resp.Header.Get(notFoundHeader) != "" {
		return fmt.Errorf("%w: %s", apiserver.ErrNotFound, text)
	}
	return &Refused{Code: resp.StatusCode, Text: string(text)}
}

// Refused is what an agent answers with when it cannot do what was asked.
type Refused struct {
	Code int // as in HTTP
	Text string
}

// Error implements error.
func (r *Refused) Error() string { return r.Text }

func writeRefusal(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	if errors.Is(err, apiserver.ErrNotFound) {
		w.Header().Set(notFoundHeader, "1")
		code = http.StatusNotFound
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		code = int(status.Status().Code)
	}
	if coded, ok := errors.AsType[*Refused](err); ok {
		code = coded.Code
	}
	http.Error(w, err.Error(), code)
}

func decode(header string) (*request, error) {
	var r request
	if err := json.Unmarshal([]byte(header), &r); err != nil {
		return nil, fmt.Errorf("malformed request: %w", err)
	}
	return &r, nil
}

// requestHeader carries the request: the body is for the streams.
const requestHeader = "Decree-Request"
