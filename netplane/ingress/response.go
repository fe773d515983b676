package ingress

import (
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// discard takes what the library would log: all of it is in the response, the metrics and
// the access log already.
var discard = log.New(io.Discard, "", 0)

// freely is how many bytes of a response may be sent before its client has to take them in
// time: the kernel's buffers take those.
const freely = 64 << 10

// restTimeout is how long the rest of a request may take to come after its response.
const restTimeout = 5 * time.Second

// response notes what a client gets.
type response struct {
	http.ResponseWriter
	code     int // zero: none yet
	bytes    int64
	deadline time.Time // for what is being sent; zero: none
}

// Unwrap is for [http.ResponseController].
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements [http.ResponseWriter].
func (w *response) WriteHeader(code int) {
	if w.code == 0 && (code >= 200 || code == http.StatusSwitchingProtocols) {
		w.code = code
	}
	w.ResponseWriter.WriteHeader(code)
}

// Write implements [http.ResponseWriter].
func (w *response) Write(p []byte) (int, error) {
	if w.code == 0 {
		w.code = http.StatusOK
	}
	if w.bytes > freely {
		w.hurry()
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

// hurry lets the client have stallTimeout for the next part.
func (w *response) hurry() {
	now := time.Now()
	if w.deadline.Sub(now) > stallTimeout/2 {
		return
	}
	if http.NewResponseController(w.ResponseWriter).SetWriteDeadline(now.Add(stallTimeout)) == nil {
		w.deadline = now.Add(stallTimeout)
	}
}

// settle leaves the connection as it was found.
func (w *response) settle() {
	if !w.deadline.IsZero() {
		_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Time{})
	}
	if w.code == 0 {
		w.code = http.StatusOK
	}
}

// errStalled: a client does not go on with its request.
var errStalled = errors.New("the request did not come in time")

// timely is a request's body that has to go on coming.
type timely struct {
	io.ReadCloser
	control *http.ResponseController
	mu      sync.Mutex // orders deadlines
	over    bool       // they are the server's again
	stalled atomic.Bool
	err     error // that the body ended with, also of nothing; only Read uses it
}

// Read may still be under way, by a transport, when the request has been answered.
func (t *timely) Read(p []byte) (int, error) {
	if t.err != nil {
		return 0, t.err
	}
	t.within(stallTimeout)
	n, err := t.ReadCloser.Read(p)
	t.within(0) // the server goes on reading by itself, to see whether the client leaves
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.stalled.Store(true)
		err = errStalled
	}
	t.err = err
	return n, err
}

// within lets the client have some time; zero: all of it.
func (t *timely) within(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var end time.Time
	if d > 0 {
		end = time.Now().Add(d)
	}
	if !t.over {
		_ = t.control.SetReadDeadline(end)
	}
}

// end gives the connection back.
func (t *timely) end() {
	t.within(restTimeout)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
}
