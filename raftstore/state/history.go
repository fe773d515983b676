package state

import (
	"iter"
	"slices"
)

// HistorySize is how many transaction keys are remembered, first in, first out.
// It is part of the state machine: replicas with different values diverge.
const HistorySize = 65536

// sealAt is how many keys the young part of a history holds before it is sealed. It
// shows in nothing but speed.
const sealAt = HistorySize / 4

// history remembers the keys of the newest transactions and the revision that each
// one led to. It is immutable between edits.
//
// Nearly every key is looked for once, and not found. So the young ones are in a tree,
// which has versions but is slow to keep at this size, and the older ones in maps that
// nobody writes to any more, of which the oldest goes when all in it are forgotten.
type history struct {
	young tree[string, remembered]
	old   []map[string]remembered // oldest first
	next  uint64                  // sequence number of the next key
	size  int                     // keys that are not forgotten
}

// remembered is what is known of one key.
type remembered struct{ sequence, revision uint64 }

func (h *history) find(key string) (revision uint64, ok bool) {
	if key == "" {
		return 0, false
	}
	r, ok := h.young.get(key)
	for i := len(h.old) - 1; i >= 0 && !ok; i-- {
		r, ok = h.old[i][key]
	}
	return r.revision, ok && h.age(r) <= h.size
}

// age is 1 for the newest key. Sequence numbers may wrap.
func (h *history) age(r remembered) int { return int(h.next - r.sequence) }

// add remembers a key that find does not know, and forgets the oldest one.
func (h *history) add(e *edit, key string, revision uint64) {
	h.young.set(e, key, remembered{h.next, revision})
	h.next++
	h.size = min(h.size+1, HistorySize)
	if h.young.Len() < sealAt {
		return
	}
	sealed := make(map[string]remembered, sealAt)
	for key, r := range h.young.all() {
		sealed[key] = r
	}
	h.old = append(slices.Clone(h.old), sealed)
	if len(h.old) > HistorySize/sealAt {
		h.old = h.old[1:]
	}
	h.young = tree[string, remembered]{}
}

// all yields the keys with their revisions, oldest first.
func (h *history) all() iter.Seq2[string, uint64] {
	type entry struct {
		key      string
		revision uint64
	}
	sorted := make([]entry, h.size)
	put := func(key string, r remembered) {
		if age := h.age(r); age <= h.size {
			sorted[h.size-age] = entry{key, r.revision}
		}
	}
	for _, sealed := range h.old {
		for key, r := range sealed {
			put(key, r)
		}
	}
	for key, r := range h.young.all() {
		put(key, r)
	}
	return func(yield func(string, uint64) bool) {
		for _, e := range sorted {
			if !yield(e.key, e.revision) {
				return
			}
		}
	}
}
