package state

// HistorySize is how many transaction keys are remembered, first in, first out.
// It is part of the state machine: replicas with different values diverge.
const HistorySize = 65536

// history remembers the keys of the newest transactions and the revision that each
// one led to. It is immutable between edits.
type history struct {
	byKey tree[string, uint64] // key -> revision
	order tree[uint64, string] // sequence number -> key
	next  uint64               // sequence number of the next key
}

func (h *history) find(key string) (revision uint64, ok bool) {
	if key == "" {
		return 0, false
	}
	return h.byKey.get(key)
}

// add remembers a key that find does not know, and forgets the oldest one.
func (h *history) add(e *edit, key string, revision uint64) {
	h.byKey.set(e, key, revision)
	h.order.set(e, h.next, key)
	h.next++
	if h.order.Len() > HistorySize {
		oldest := h.next - uint64(h.order.Len())
		key, _ := h.order.get(oldest)
		h.order.delete(e, oldest)
		h.byKey.delete(e, key)
	}
}
