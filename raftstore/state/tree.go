package state

import (
	"cmp"
	"iter"
	"slices"
)

// tree is an ordered map that is immutable between edits: a B+ tree whose nodes are
// shared by all versions that have them in common. A tree is a value; a copy of it
// is a version of its own.
//
// A change is made under an [edit]. Nodes that the same edit has made are changed in
// place, all others are copied first. So one edit that makes many changes copies a
// node once, and versions from before it stay what they are.
type tree[K cmp.Ordered, V any] struct {
	root *branch[K, V] // nil when empty
	size int
}

// edit owns the nodes that were made under it. It must not be empty: two pointers to
// empty structs may be equal.
type edit struct {
	keys int // how many transaction keys are likely to be remembered under it
}

// branch is a node: a leaf has values, one for each key, an inner node has kids. The
// first key of an inner node is a lower bound of what its first kid holds, the others
// are exact until something is deleted, and lower bounds then.
type branch[K cmp.Ordered, V any] struct {
	owner    *edit // may change values and kids in place
	ownsKeys *edit // may change keys in place: updates leave them shared
	keys     []K
	values   []V
	kids     []*branch[K, V]
}

// full is how many entries a node has at most; below low it looks for a neighbour to
// join.
const (
	full = 24
	low  = full / 4
)

func (t tree[K, V]) Len() int { return t.size }

func (t tree[K, V]) get(key K) (v V, ok bool) {
	n := t.root
	if n == nil {
		return v, false
	}
	for n.kids != nil {
		n = n.kids[n.kidFor(key)]
	}
	if i, ok := slices.BinarySearch(n.keys, key); ok {
		return n.values[i], true
	}
	return v, false
}

// kidFor is the number of the kid that has key, if any has.
func (n *branch[K, V]) kidFor(key K) int {
	i, ok := slices.BinarySearch(n.keys, key)
	if !ok && i > 0 {
		i--
	}
	return i
}

// from yields the entries whose key is not less than low, in order.
func (t tree[K, V]) from(low K) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if t.root != nil {
			t.root.walk(&low, yield)
		}
	}
}

// all yields all entries in order.
func (t tree[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if t.root != nil {
			t.root.walk(nil, yield)
		}
	}
}

func (n *branch[K, V]) walk(low *K, yield func(K, V) bool) bool {
	start := 0
	if n.kids == nil {
		if low != nil {
			start, _ = slices.BinarySearch(n.keys, *low)
		}
		for i := start; i < len(n.keys); i++ {
			if !yield(n.keys[i], n.values[i]) {
				return false
			}
		}
		return true
	}
	if low != nil {
		start = n.kidFor(*low)
	}
	for i := start; i < len(n.kids); i++ {
		if !n.kids[i].walk(low, yield) {
			return false
		}
		low = nil // all that follows is greater
	}
	return true
}

// set stores v under key.
func (t *tree[K, V]) set(e *edit, key K, v V) {
	if t.root == nil {
		t.root = &branch[K, V]{owner: e, ownsKeys: e}
	}
	t.root = t.root.writable(e)
	if t.root.set(e, key, v) {
		t.size++
	}
	if len(t.root.keys) > full {
		left, right := t.root, t.root.split(e)
		t.root = &branch[K, V]{owner: e, ownsKeys: e, keys: []K{left.keys[0], right.keys[0]}, kids: []*branch[K, V]{left, right}}
	}
}

// set stores v in n, which is writable, and reports whether key is new. Afterwards n
// may have one entry too many.
func (n *branch[K, V]) set(e *edit, key K, v V) bool {
	if n.kids == nil {
		i, ok := slices.BinarySearch(n.keys, key)
		if ok {
			n.values[i] = v
			return false
		}
		n.keys = insertAt(n.writableKeys(e), i, key)
		n.values = insertAt(n.values, i, v)
		return true
	}
	i := n.kidFor(key)
	kid := n.kids[i].writable(e)
	n.kids[i] = kid
	added := kid.set(e, key, v)
	if key < n.keys[i] {
		n.writableKeys(e)[i] = key
	}
	if len(kid.keys) > full {
		right := kid.split(e)
		n.keys = insertAt(n.writableKeys(e), i+1, right.keys[0])
		n.kids = insertAt(n.kids, i+1, right)
	}
	return added
}

// insertAt makes room for what a split needs at once, and no more: most of the memory
// of a tree is in these slices.
func insertAt[T any](s []T, i int, v T) []T {
	if len(s) == cap(s) {
		s = slices.Grow(s, min(max(4, len(s)/2), max(1, full+1-len(s))))
	}
	return slices.Insert(s, i, v)
}

// delete removes key, if it is there.
func (t *tree[K, V]) delete(e *edit, key K) {
	if _, ok := t.get(key); !ok {
		return
	}
	t.size--
	t.root = t.root.writable(e)
	t.root.delete(e, key)
	for len(t.root.kids) == 1 {
		t.root = t.root.kids[0]
	}
	if len(t.root.keys) == 0 {
		t.root = nil
	}
}

// delete removes key, which is there, from n, which is writable.
func (n *branch[K, V]) delete(e *edit, key K) {
	if n.kids == nil {
		i, _ := slices.BinarySearch(n.keys, key)
		n.keys = slices.Delete(n.writableKeys(e), i, i+1)
		n.values = slices.Delete(n.values, i, i+1)
		return
	}
	i := n.kidFor(key)
	kid := n.kids[i].writable(e)
	n.kids[i] = kid
	kid.delete(e, key)
	switch {
	case len(kid.keys) == 0:
		n.keys = slices.Delete(n.writableKeys(e), i, i+1)
		n.kids = slices.Delete(n.kids, i, i+1)
	case len(kid.keys) < low && len(n.kids) > 1:
		n.join(e, min(i, len(n.kids)-2))
	}
}

// join makes one of the kids i and i+1, if they leave room to grow.
func (n *branch[K, V]) join(e *edit, i int) {
	right := n.kids[i+1]
	if len(n.kids[i].keys)+len(right.keys) > full-low {
		return
	}
	left := n.kids[i].writable(e)
	left.keys = append(left.writableKeys(e), right.keys...)
	left.values = append(left.values, right.values...)
	if left.kids != nil {
		left.kids = append(left.kids, right.kids...)
	}
	n.kids[i] = left
	n.keys = slices.Delete(n.writableKeys(e), i+1, i+2)
	n.kids = slices.Delete(n.kids, i+1, i+2)
}

// writable returns n if e owns it, or a copy that e owns.
func (n *branch[K, V]) writable(e *edit) *branch[K, V] {
	if n.owner == e {
		return n
	}
	return &branch[K, V]{owner: e, ownsKeys: n.ownsKeys, keys: n.keys, values: slices.Clone(n.values), kids: slices.Clone(n.kids)}
}

// writableKeys returns the keys of n, which e owns, to be changed in place.
func (n *branch[K, V]) writableKeys(e *edit) []K {
	if n.ownsKeys != e {
		n.keys, n.ownsKeys = slices.Clone(n.keys), e
	}
	return n.keys
}

// split moves the upper half of n, which is writable, into a new node. Where keys
// come in order, and most do, the lower half stays as it is.
func (n *branch[K, V]) split(e *edit) *branch[K, V] {
	half := len(n.keys) / 2
	keys := n.writableKeys(e)
	right := &branch[K, V]{owner: e, ownsKeys: e, keys: slices.Clone(keys[half:])}
	n.keys = slices.Clone(keys[:half])
	if n.kids != nil {
		right.kids, n.kids = slices.Clone(n.kids[half:]), slices.Clone(n.kids[:half])
		return right
	}
	right.values, n.values = slices.Clone(n.values[half:]), slices.Clone(n.values[:half])
	return right
}
