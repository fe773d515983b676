package gitsource

import (
	"iter"

	"github.com/go-git/go-git/v5/plumbing"
)

// partBytes is how many bytes of objects, inflated, make one part of a history.
const partBytes = 128 << 20

// parts lists the selected objects in parts that can be taken in one after the other:
// oldest commits first, and each part stands on itself and the ones before. A part is
// larger than partBytes only when a single commit is. There is at least one part.
func (s *selection) parts(lim Limits) iter.Seq2[[]plumbing.Hash, error] {
	return func(yield func([]plumbing.Hash, error) bool) {
		more, err := s.eachPart(lim.Objects/2, func(part []plumbing.Hash) bool { return yield(part, nil) })
		if err != nil && more {
			yield(nil, err)
		}
	}
}

// eachPart calls visit with parts of about max objects, until it returns false.
func (s *selection) eachPart(max int, visit func([]plumbing.Hash) bool) (more bool, err error) {
	send, known, err := s.commits()
	if err != nil {
		return true, err
	}
	for _, n := range known {
		if err := s.tree(n.tree, false); err != nil {
			return true, err
		}
	}
	var bytes int64
	for _, n := range parentsFirst(send) {
		before := len(s.list)
		s.list = append(s.list, n.hash)
		if err := s.tree(n.tree, true); err != nil {
			return true, err
		}
		size, err := s.sizes(s.list[before:])
		if err != nil {
			return true, err
		}
		if before > 0 && (len(s.list) > max || bytes+size > partBytes) {
			part := s.list[:before:before]
			s.list, bytes = append([]plumbing.Hash(nil), s.list[before:]...), 0
			if !visit(part) {
				return false, nil
			}
		}
		bytes += size
	}
	if err := s.extras(); err != nil {
		return true, err
	}
	return visit(s.list), nil
}

func (s *selection) sizes(list []plumbing.Hash) (sum int64, err error) {
	for _, h := range list {
		n, err := s.r.size(h)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// parentsFirst orders commits so that every one comes after its parents. Their times
// are what clients say and no help in that.
func parentsFirst(list []*node) []*node {
	waits := make(map[plumbing.Hash]int, len(list)) // for so many parents of the list
	for _, n := range list {
		waits[n.hash] = 0
	}
	children := make(map[plumbing.Hash][]*node)
	var out []*node
	for _, n := range list {
		for _, p := range n.parents {
			if _, ok := waits[p]; ok {
				waits[n.hash]++
				children[p] = append(children[p], n)
			}
		}
	}
	for _, n := range list {
		if waits[n.hash] == 0 {
			out = append(out, n)
		}
	}
	for i := 0; i < len(out); i++ {
		for _, c := range children[out[i].hash] {
			if waits[c.hash]--; waits[c.hash] == 0 {
				out = append(out, c)
			}
		}
	}
	return out
}
