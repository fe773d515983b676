// Package gitsource receives and fetches Git repositories: the built-in ones over
// smart HTTP (Server), external ones by polling (Mirror). It hands over pinned
// commits, checked and bounded, and changes nothing by itself: what a commit means
// and whether it comes into force is for others to say.
//
// It may touch its data folders and the network. It knows nothing of CUE, plans or
// the replicated state.
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
	Time      time.Time // of the committer
	Subject   string    // first line of the message
	Message   string
	Signer    string // key id of a verified signature, if any
	// Tree is read-only and safe for concurrent use. Symbolic links are reported as
	// such and never followed; submodules are fs.ModeIrregular. It implements
	// fs.ReadFileFS, ReadDirFS, StatFS and ReadLinkFS. The tree of a refused push is
	// gone when Receive has returned.
	Tree fs.FS
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

	inForce func()
}

// InForce tells the server that the commit is in force while Receive goes on, for
// example to show the rollout. From then on the push has succeeded whatever Receive
// returns (an error becomes a remote: line), other pushes to the repository may
// start, and ctx ends when the pusher goes away. Without a call the commit is in
// force when Receive returns nil.
func (p *Push) InForce() {
	if p.inForce != nil {
		p.inForce()
	}
}

// Receiver decides about pushes to built-in repositories.
//
// The branch that a built-in source follows is not stored in the repository: it is
// what Head says (the replicated state is the only truth), so a crash at any moment
// leaves no branch that disagrees with what is in force. Other branches and tags
// are held by References in the same way.
type Receiver interface {
	// Head returns the commit in force of a repository, "" before the first one.
	Head(ctx context.Context, repository string) (string, error)
	// Receive validates a push to the followed branch and, if it is good, brings it
	// into force; what it writes to progress reaches the pusher line by line as
	// "remote:" lines while Receive runs. An error refuses the push and its text is
	// the reason: all of it in remote: lines, the first line again in Git's own
	// verdict. Before it brings the commit into force, Receive calls durable,
	// which moves the objects out of quarantine, syncs them to disk, and waits until
	// enough Replicas have them. Calls for one
	// repository do not overlap until InForce.
	//
	// ctx ends when the pusher goes away, except between durable and InForce: there
	// it lasts Limits.Time, so that what was begun is finished. Writes to progress
	// never fail.
	Receive(ctx context.Context, p *Push, durable func() error, progress io.Writer) error
}
