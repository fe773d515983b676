package gitsource

import (
	"bufio"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
)

func newPackBuffer(w io.Writer) *bufio.Writer { return bufio.NewWriterSize(w, 32<<10) }

// selection works out which objects a client needs. Sending too many is only
// waste, so it stops looking at the client's history as soon as nothing wanted can
// be left; sending too few would break the client.
type selection struct {
	ctx     context.Context
	r       objectReader
	req     *fetchRequest
	starts  []plumbing.Hash         // commits to send from
	extra   []plumbing.Hash         // annotated tags, trees and blobs that are wanted
	edge    map[plumbing.Hash]bool  // commits at which a shallow history ends
	haves   []plumbing.Hash         // commits both sides have
	nodes   map[plumbing.Hash]*node // commits read so far
	include map[plumbing.Hash]bool  // objects already selected or known to the client
	list    []plumbing.Hash
}

func newSelection(ctx context.Context, r objectReader, req *fetchRequest) *selection {
	return &selection{ctx: ctx, r: r, req: req, edge: make(map[plumbing.Hash]bool),
		nodes: make(map[plumbing.Hash]*node), include: make(map[plumbing.Hash]bool)}
}

func (s *selection) node(h plumbing.Hash) (*node, error) {
	if n, ok := s.nodes[h]; ok {
		return n, nil
	}
	if s.ctx.Err() != nil {
		return nil, context.Cause(s.ctx)
	}
	n, err := readNode(s.r, h)
	if err == nil {
		s.nodes[h] = n
	}
	return n, err
}

// checkWants resolves what is wanted to commits. Whether it may be wanted is checked
// before.
func (s *selection) checkWants() error {
	for _, h := range s.req.wants {
		for range 10 { // tags of tags
			kind, data, err := s.r.read(h)
			if errors.Is(err, plumbing.ErrObjectNotFound) {
				return fmt.Errorf("not our ref %s", h)
			}
			if err != nil {
				return err
			}
			if kind == plumbing.CommitObject {
				s.starts = append(s.starts, h)
				break
			}
			s.extra = append(s.extra, h)
			if kind != plumbing.TagObject {
				break
			}
			if h, _, err = tagLinks(data); err != nil {
				return err
			}
		}
	}
	return nil
}

// addHave notes a commit that the client has and reports whether it is stored here.
func (s *selection) addHave(h plumbing.Hash) (bool, error) {
	ok, err := s.r.has(h)
	if err != nil || !ok {
		return false, err
	}
	if _, err := s.node(h); err != nil {
		return false, nil // a tag or the like: no help
	}
	s.haves = append(s.haves, h)
	return true, nil
}

// cut finds where a history of limited depth ends, tells the client, and makes the
// walk stop there.
func (s *selection) cut(out *pktline.Encoder) error {
	depth := make(map[plumbing.Hash]int)
	level := append([]plumbing.Hash(nil), s.starts...)
	for d := 1; len(level) > 0; d++ {
		var next []plumbing.Hash
		for _, h := range level {
			if depth[h] > 0 {
				continue
			}
			depth[h] = d
			n, err := s.node(h)
			if err != nil {
				return err
			}
			if d >= s.req.depth && len(n.parents) > 0 {
				s.edge[h] = true
				continue
			}
			next = append(next, n.parents...)
		}
		level = next
	}
	for h := range s.edge {
		if s.req.shallow[h] {
			continue
		}
		if err := out.Encodef("shallow %s", h); err != nil {
			return err
		}
	}
	for h := range s.req.shallow {
		if depth[h] == 0 || s.edge[h] {
			continue
		}
		if err := out.Encodef("unshallow %s", h); err != nil {
			return err
		}
		n, err := s.node(h)
		if err != nil {
			return err
		}
		s.starts = append(s.starts, n.parents...) // h itself is known to the client
	}
	return out.Flush()
}

// enough says whether every wanted commit descends from one the client has, so
// that asking on is of little use.
func (s *selection) enough() bool {
	common := make(map[plumbing.Hash]bool)
	for _, h := range s.haves {
		common[h] = true
	}
	for _, start := range s.starts {
		found := false
		err := walk(s.ctx, s.r, start, func(n *node) bool {
			found = common[n.hash]
			return !found
		})
		if err != nil || !found {
			return false
		}
	}
	return true
}

// objects lists what to send: commits, then their trees and files.
func (s *selection) objects() ([]plumbing.Hash, error) {
	commits, known, err := s.commits()
	if err != nil {
		return nil, err
	}
	for _, n := range known {
		if err := s.tree(n.tree, false); err != nil {
			return nil, err
		}
	}
	for _, n := range commits {
		s.list = append(s.list, n.hash)
	}
	for _, n := range commits {
		if err := s.tree(n.tree, true); err != nil {
			return nil, err
		}
	}
	if err := s.extras(); err != nil {
		return nil, err
	}
	return s.list, nil
}

// extras selects what is wanted beside commits.
func (s *selection) extras() error {
	for _, h := range s.extra {
		kind, _, err := s.r.read(h)
		if err != nil {
			return err
		}
		if kind == plumbing.TreeObject {
			err = s.tree(h, true)
		} else if !s.include[h] {
			s.include[h] = true
			s.list = append(s.list, h)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// commits walks from what is wanted and from what the client has, newest first. It
// returns the commits to send and, of those the client has, the ones next to them.
func (s *selection) commits() (send, known []*node, err error) {
	w := frontier{s: s, side: make(map[plumbing.Hash]side), queued: make(map[plumbing.Hash]bool)}
	for _, h := range s.starts {
		if err := w.mark(h, wanted); err != nil {
			return nil, nil, err
		}
	}
	for _, h := range s.haves {
		if err := w.mark(h, theirs); err != nil {
			return nil, nil, err
		}
	}
	var order []*node
	for w.open > 0 {
		n, err := w.next()
		if err != nil {
			return nil, nil, err
		}
		if w.side[n.hash] == wanted {
			order = append(order, n)
		}
	}
	for _, n := range order {
		if w.side[n.hash] != wanted {
			continue // turned out to be theirs
		}
		send = append(send, n)
		for _, p := range n.parents {
			if w.side[p] == theirs {
				known = append(known, s.nodes[p])
			}
		}
	}
	return send, known, nil
}

// side is whose a commit is: known to the client beats wanted by it.
type side int

const (
	wanted side = iota + 1
	theirs
)

// frontier is a walk over two histories at once.
type frontier struct {
	s      *selection
	side   map[plumbing.Hash]side
	queue  nodeQueue
	queued map[plumbing.Hash]bool
	open   int // wanted commits in the queue
}

func (w *frontier) mark(h plumbing.Hash, to side) error {
	from := w.side[h]
	if from >= to {
		return nil
	}
	n, err := w.s.node(h)
	if err != nil {
		return err
	}
	w.side[h] = to
	if w.queued[h] {
		w.open-- // from wanted to theirs
		return nil
	}
	w.queued[h] = true
	heap.Push(&w.queue, n)
	if to == wanted {
		w.open++
	}
	return nil
}

// next takes the newest commit and marks its parents like it.
func (w *frontier) next() (*node, error) {
	n := heap.Pop(&w.queue).(*node)
	w.queued[n.hash] = false
	mine := w.side[n.hash]
	if mine == wanted {
		w.open--
		if w.s.edge[n.hash] {
			return n, nil
		}
	} else if w.s.req.shallow[n.hash] {
		return n, nil
	}
	for _, p := range n.parents {
		if err := w.mark(p, mine); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// tree selects a tree and all below it that is not selected yet. With send false
// the client is known to have it.
func (s *selection) tree(h plumbing.Hash, send bool) error {
	if s.include[h] {
		return nil
	}
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	s.include[h] = true
	if send {
		s.list = append(s.list, h)
	}
	data, err := readKind(s.r, plumbing.TreeObject, h)
	if err != nil {
		return err
	}
	return parseTree(data, func(e treeEntry) error {
		switch {
		case e.mode == filemode.Submodule || s.include[e.hash]:
			return nil
		case e.mode == filemode.Dir:
			return s.tree(e.hash, send)
		}
		s.include[e.hash] = true
		if send {
			s.list = append(s.list, e.hash)
		}
		return nil
	})
}
