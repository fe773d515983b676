package apiserver

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// Nodes reaches the nodes and the containers on them.
type Nodes interface {
	// Logs copies the log of a container (opts.Container, never empty) to w until it
	// ends or ctx is done; with opts.Follow the end is the container's. Every Write
	// reaches the client at once.
	Logs(ctx context.Context, node string, pod *corev1.Pod, opts *corev1.PodLogOptions, w io.Writer) error
	// Exec runs a process in a container and returns its exit code. It returns when
	// the process has ended and its output was copied, or ctx is done.
	Exec(ctx context.Context, node string, pod *corev1.Pod, e ExecStreams) (int, error)
	// Metrics returns the metrics of a node. accept says what the asker reads, in the
	// headers Accept and Accept-Encoding; without any it is text.
	Metrics(ctx context.Context, node string, accept http.Header) (*Exposition, error)
}

// ExecStreams is a process to run and what it is connected to. Streams that the
// client did not ask for are nil.
type ExecStreams struct {
	Container      string
	Command        []string
	TTY            bool
	Stdin          io.Reader
	Stdout, Stderr io.Writer // Stderr is nil with a TTY
	Resize         <-chan TerminalSize
}

// TerminalSize is the size of a terminal in characters.
type TerminalSize struct{ Width, Height uint16 }

// Sources carries out operators' wishes about sources. user is who asks.
type Sources interface {
	// Sync fetches now instead of at the next poll.
	Sync(ctx context.Context, source, user string) error
	// Suspend stops following a source, Resume goes on.
	Suspend(ctx context.Context, source, user, reason string) error
	Resume(ctx context.Context, source, user string) error
	// Plan says what a push of tree would change; it changes nothing.
	Plan(ctx context.Context, source string, tree fs.FS) (*Plan, error)
}

// Plan is the effect a tree would have if it were pushed.
type Plan struct {
	Changes   []api.Change `json:"changes"`
	Unchanged int          `json:"unchanged"`
	// Refusals say why the push would be refused; Changes is empty then.
	Refusals []api.Diagnostic `json:"refusals,omitempty"`
}

// ErrNotFound is matched by errors of [Nodes] and [Sources] about something that
// does not exist (any more).
var ErrNotFound = errors.New("not found")

// propose applies txn and turns a rejection into an error.
func propose(ctx context.Context, s Store, txn command.Txn) error {
	res, err := s.Propose(ctx, txn)
	if err != nil {
		return err
	}
	return res.Err()
}

// Store is what the server needs of the replicated state; *raftstore.Store is one.
type Store interface {
	View() *state.State
	Read(ctx context.Context) (*state.State, error)
	Propose(ctx context.Context, txn command.Txn) (command.Result, error)
	Watch(ctx context.Context, after uint64, filter raftstore.Filter) (*raftstore.Watch, error)
}
