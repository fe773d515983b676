package ingress

import (
	"errors"
	"io"
	"log"
	"net/http"
	"os"
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

// settle leaves the connection as it was found. What of the request's body nobody has read
// the server will read, to find the next request behind it: it shall not wait for long.
func (w *response) settle(r *http.Request) {
	if r.ProtoMajor == 1 && r.Body != nil && r.Body != http.NoBody {
		_ = http.NewResponseController(w.ResponseWriter).SetReadDeadline(time.Now().Add(restTimeout))
	}
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
}

func (t *timely) Read(p []byte) (int, error) {
	_ = t.control.SetReadDeadline(time.Now().Add(stallTimeout))
	n, err := t.ReadCloser.Read(p)
	// The server goes on reading by itself, to see whether the client leaves.
	_ = t.control.SetReadDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errStalled
	}
	return n, err
}
