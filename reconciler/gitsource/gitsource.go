// Package gitsource receives and fetches Git repositories: the built-in ones over
// smart HTTP, external ones by polling. It hands over pinned commits and changes
// nothing by itself.
package gitsource

import (
	"context"
	"io"
	"io/fs"
	"time"
)

// Commit is a pinned commit with its tree.
type Commit struct {
	Hash      string
	Parents   []string
	Author    string // "Name <mail>"
	Committer string
	Time      time.Time
	Subject   string // first line of the message
	Message   string
	Signer    string // key id of a verified signature, if any
	Tree      fs.FS  // read-only; symlinks are reported as such, never followed
}

// Push is one update of the followed branch of a built-in repository that a
// client asks for. The objects are in quarantine until Receive accepts it.
type Push struct {
	Repository string
	Ref        string // "refs/heads/main"
	Old, New   string // hashes; all zeros for none
	Pusher     string // authenticated identity
	Force      bool   // New does not descend from Old
	Commit     *Commit
}

// Receiver decides about pushes to built-in repositories.
//
// The branch that a built-in source follows is not stored in the repository: it is
// what Head says (the replicated state is the only truth), so a crash at any moment
// leaves no branch that disagrees with what is in force. Other branches and tags
// are ordinary refs.
type Receiver interface {
	// Head returns the commit in force of a repository, "" before the first one.
	Head(ctx context.Context, repository string) (string, error)
	// Receive validates a push to the followed branch and, if it is good, brings it
	// into force; what it writes to progress reaches the pusher line by line as
	// "remote:" lines while Receive runs. An error refuses the push and its text is
	// the reason. Before it brings the commit into force, Receive calls durable,
	// which moves the objects out of quarantine and syncs them to disk.
	Receive(ctx context.Context, p *Push, durable func() error, progress io.Writer) error
}
