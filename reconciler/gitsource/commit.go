package gitsource

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"
)

// openCommit reads a commit; its tree is read from r when asked for.
func openCommit(r objectReader, h plumbing.Hash) (*Commit, error) {
	raw, err := readKind(r, plumbing.CommitObject, h)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", h, notFound(err))
	}
	tree, parents, err := commitLinks(raw)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", h, err)
	}
	mem := &plumbing.MemoryObject{}
	mem.SetType(plumbing.CommitObject)
	if _, err := mem.Write(raw); err != nil {
		return nil, fmt.Errorf("commit %s: %w", h, err)
	}
	c, err := object.DecodeCommit(nil, mem)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w: %w", h, ErrGarbage, err)
	}
	out := &Commit{
		Hash:      h.String(),
		Author:    person(c.Author),
		Committer: person(c.Committer),
		Time:      c.Committer.When,
		Message:   c.Message,
		Tree:      newTreeFS(r, tree, c.Committer.When),
	}
	out.Subject, _, _ = strings.Cut(strings.TrimLeft(c.Message, "\n"), "\n")
	for _, p := range parents {
		out.Parents = append(out.Parents, p.String())
	}
	return out, nil
}

func person(s object.Signature) string {
	return strings.TrimSpace(fmt.Sprintf("%s <%s>", s.Name, s.Email))
}

// notFound makes a missing object match ErrNotFound as well.
func notFound(err error) error {
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// parseHash reads a full commit hash.
func parseHash(s string) (plumbing.Hash, error) {
	if !plumbing.IsHash(s) || len(s) != 40 {
		return plumbing.ZeroHash, fmt.Errorf("%q is not a full commit hash of 40 hexadecimal digits", s)
	}
	return plumbing.NewHash(s), nil
}

// node is what walks over the history need of a commit.
type node struct {
	hash    plumbing.Hash
	tree    plumbing.Hash
	parents []plumbing.Hash
	time    int64 // committer time, seconds
}

func readNode(r objectReader, h plumbing.Hash) (*node, error) {
	raw, err := readKind(r, plumbing.CommitObject, h)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", h, err)
	}
	tree, parents, err := commitLinks(raw)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", h, err)
	}
	return &node{hash: h, tree: tree, parents: parents, time: committerTime(raw)}, nil
}

// committerTime is the time in the committer line, 0 if there is none to read. It
// only orders walks, so a wrong one costs time and nothing else.
func committerTime(raw []byte) int64 {
	for line := range strings.Lines(string(raw)) {
		if line == "\n" {
			break
		}
		rest, ok := strings.CutPrefix(line, "committer ")
		if !ok {
			continue
		}
		var sig object.Signature
		sig.Decode([]byte(strings.TrimSuffix(rest, "\n")))
		if sig.When.Equal(time.Time{}) {
			return 0
		}
		return sig.When.Unix()
	}
	return 0
}

// nodeQueue gives the newest commit first.
type nodeQueue []*node

func (q nodeQueue) Len() int           { return len(q) }
func (q nodeQueue) Less(i, j int) bool { return q[i].time > q[j].time }
func (q nodeQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *nodeQueue) Push(x any)        { *q = append(*q, x.(*node)) }
func (q *nodeQueue) Pop() any {
	old := *q
	n := old[len(old)-1]
	*q = old[:len(old)-1]
	return n
}

// walk visits the commits reachable from start, newest first, each once, until
// visit returns false.
func walk(ctx context.Context, r objectReader, start plumbing.Hash, visit func(*node) bool) error {
	return walkAll(ctx, r, []plumbing.Hash{start}, visit)
}

// walkAll is walk from several commits.
func walkAll(ctx context.Context, r objectReader, starts []plumbing.Hash, visit func(*node) bool) error {
	seen := make(map[plumbing.Hash]bool)
	var queue nodeQueue
	for _, h := range starts {
		if seen[h] {
			continue
		}
		seen[h] = true
		first, err := readNode(r, h)
		if err != nil {
			return err
		}
		heap.Push(&queue, first)
	}
	for len(queue) > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := heap.Pop(&queue).(*node)
		if !visit(n) {
			return nil
		}
		for _, p := range n.parents {
			if seen[p] {
				continue
			}
			seen[p] = true
			next, err := readNode(r, p)
			if err != nil {
				return err
			}
			heap.Push(&queue, next)
		}
	}
	return nil
}

// descends says whether old is reachable from new.
func descends(ctx context.Context, r objectReader, new, old plumbing.Hash) (bool, error) {
	found := false
	err := walk(ctx, r, new, func(n *node) bool {
		found = n.hash == old
		return !found
	})
	return found, err
}

// history lists up to max commits reachable from start, newest first.
func history(ctx context.Context, r objectReader, start plumbing.Hash, max int) ([]*Commit, error) {
	var list []*Commit
	var bad error
	err := walk(ctx, r, start, func(n *node) bool {
		if len(list) >= max {
			return false
		}
		c, err := openCommit(r, n.hash)
		if err != nil {
			bad = err
			return false
		}
		list = append(list, c)
		return true
	})
	return list, errors.Join(err, bad)
}
