package backup

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/schemas/api"
)

// Path is where a [Handler] is to be mounted.
const Path = "/decree/v1/snapshot"

// The header that names the snapshot, and the trailer that says why it is incomplete.
const (
	HeaderName   = "Decree-Snapshot"
	TrailerError = "Decree-Error"
)

// Handler answers GET with a plain archive of the cluster, for administrators only: what
// it sends holds all secrets. It is for who encrypts it on the other side of mutual TLS.
//
// An error after the first byte is told in the trailer [TrailerError], and leaves the
// archive without its seal: no client can take it for a complete one.
type Handler struct {
	// Source reads what is to be saved, with its time.
	Source func(context.Context) (Source, error)
	Log    *slog.Logger // may be nil
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	who, _ := apiserver.IdentityFrom(r.Context())
	switch {
	case !who.Admin():
		apiserver.WriteError(w, apierrors.NewForbidden(api.GroupVersion.WithResource("snapshot").GroupResource(), "", fmt.Errorf("user %s is no administrator", who.Name)))
		return
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		apiserver.WriteError(w, apierrors.NewMethodNotSupported(api.GroupVersion.WithResource("snapshot").GroupResource(), r.Method))
		return
	}
	log := h.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	src, err := h.Source(r.Context())
	var m Manifest
	if err == nil {
		m, err = src.manifest()
	}
	if err != nil {
		apiserver.WriteError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/zstd")
	w.Header().Set(HeaderName, NameOf(m).String())
	w.Header().Set("Trailer", TrailerError)
	start := time.Now()
	sent := &countWriter{w: &steadyWriter{w, http.NewResponseController(w)}}
	if _, err := Save(r.Context(), sent, src, Protection{Plaintext: true}); err != nil {
		w.Header().Set(TrailerError, oneLine(err.Error()))
		log.Warn("snapshot not sent", "user", who.Name, "revision", m.Revision, "bytes", sent.n, "error", err)
		return
	}
	log.Info("snapshot sent", "user", who.Name, "revision", m.Revision, "bytes", sent.n, "took", time.Since(start))
}

// stallTimeout is how long a client may take for one write, 128 KiB at most.
const stallTimeout = time.Minute

// steadyWriter gives up on clients that have stopped reading: an answer has no limit of
// time as a whole.
type steadyWriter struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (s *steadyWriter) Write(p []byte) (int, error) {
	_ = s.control.SetWriteDeadline(time.Now().Add(stallTimeout)) // not supported by test recorders
	return s.ResponseWriter.Write(p)
}

// oneLine makes text fit for a header.
func oneLine(s string) string {
	b := []byte(s[:min(len(s), 1024)])
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = ' '
		}
	}
	return string(b)
}
