package state

import (
	"iter"
	"maps"
	"slices"
)

// HistorySize is how many transaction keys are remembered, first in, first out.
// It is part of the state machine: replicas with different values diverge.
const HistorySize = 65536

// maxLevel is how many keys a level of a history holds at most. It shows in nothing
// but speed and memory.
const maxLevel = HistorySize / 4

// history remembers the keys of the newest transactions and the revision that each
// one led to. It is immutable between edits.
//
// Nearly every key is looked for once, and not found, and comes from one of many
// transactions in an entry. So an edit writes to a map of its own, and nobody writes to
// a map any more once its edit is over. Neighbours of like size become one, so that
// there are few; the oldest goes when all in it are forgotten.
type history struct {
	levels []map[string]remembered // oldest first
	owner  *edit                   // of the last level
	next   uint64                  // sequence number of the next key
	size   int                     // keys that are not forgotten
}

// remembered is what is known of one key.
type remembered struct{ sequence, revision uint64 }

func (h *history) find(key string) (revision uint64, ok bool) {
	if key == "" {
		return 0, false
	}
	var r remembered
	for i := len(h.levels) - 1; i >= 0 && !ok; i-- {
		r, ok = h.levels[i][key]
	}
	return r.revision, ok && h.age(r) <= h.size
}

// age is 1 for the newest key. Sequence numbers may wrap.
func (h *history) age(r remembered) int { return int(h.next - r.sequence) }

// add remembers a key that find does not know, and forgets the oldest one.
func (h *history) add(e *edit, key string, revision uint64) {
	if h.owner != e || len(h.levels) == 0 {
		h.begin(e)
	}
	h.levels[len(h.levels)-1][key] = remembered{h.next, revision}
	h.next++
	h.size = min(h.size+1, HistorySize)
}

// begin adds a level that e may write to.
func (h *history) begin(e *edit) {
	levels := slices.Clone(h.levels)
	for n := len(levels); n > 1; n-- {
		older, newer := levels[n-2], levels[n-1]
		if len(older) > 2*len(newer) || len(older)+len(newer) > maxLevel {
			break
		}
		both := make(map[string]remembered, len(older)+len(newer))
		maps.Copy(both, older)
		maps.Copy(both, newer)
		levels = append(levels[:n-2], both)
	}
	newer := 0
	for _, level := range levels[min(1, len(levels)):] {
		newer += len(level)
	}
	if newer >= HistorySize {
		levels = levels[1:]
	}
	h.levels, h.owner = append(levels, make(map[string]remembered, e.keys)), e
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
	for _, level := range h.levels {
		for key, r := range level {
			put(key, r)
		}
	}
	return func(yield func(string, uint64) bool) {
		for _, e := range sorted {
			if !yield(e.key, e.revision) {
				return
			}
		}
	}
}
