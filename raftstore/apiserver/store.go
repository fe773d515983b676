package apiserver

import (
	"context"
	"errors"
	"io"
	"io/fs"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// Nodes reaches the containers on the nodes.
type Nodes interface {
	// Logs copies the log of a container (opts.Container, never empty) to w until it
	// ends or ctx is done; with opts.Follow the end is the container's. Every Write
	// reaches the client at once.
	Logs(ctx context.Context, node string, pod *corev1.Pod, opts *corev1.PodLogOptions, w io.Writer) error
	// Exec runs a process in a container and returns its exit code. It returns when
	// the process has ended and its output was copied, or ctx is done.
	Exec(ctx context.Context, node string, pod *corev1.Pod, e ExecStreams) (int, error)
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
func propose(ctx context.Context, s Store, txn *command.Txn) (command.Result, error) {
	res, err := s.Propose(ctx, txn)
	if err == nil && res.Rejected != nil {
		err = res.Rejected
	}
	return res, err
}

// Store is what the server needs of the replicated state.
type Store interface {
	// View is the newest state this server has applied.
	View() api.Reader
	// Read returns a state that contains everything acknowledged before the call,
	// anywhere in the cluster.
	Read(ctx context.Context) (api.Reader, error)
	// Propose replicates txn and returns its result.
	Propose(ctx context.Context, txn *command.Txn) (command.Result, error)
	// Watch returns the changes after a revision, as the store applies them. It
	// returns an error matching ErrCompacted if they are not kept any more.
	Watch(ctx context.Context, after uint64, resources ...api.Resource) (Watch, error)
}

// Watch is a stream of changes.
type Watch interface {
	// Next waits for changes and returns them in order. Every change up to and
	// including revision has been returned by then; events may be empty.
	Next(ctx context.Context) (events []Event, revision uint64, err error)
}

// Event is the change of one object. Old is nil for a creation, New for a removal.
type Event struct {
	Revision uint64
	Key      api.Key
	Old, New api.Object
}

// ErrCompacted is matched by errors of [Store.Watch] about a revision that is too
// old, or from the future.
var ErrCompacted = errors.New("revision is not available")
