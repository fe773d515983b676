package state

import (
	"encoding/binary"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
)

// HistorySize is how many transaction keys are remembered, first in, first out.
// It is part of the state machine: replicas with different values diverge.
const HistorySize = 65536

// history remembers the keys of the newest transactions and the revision that each
// one led to. It is immutable.
type history struct {
	byKey *iradix.Tree[uint64] // key -> revision
	order *iradix.Tree[string] // sequence number, big endian -> key
	next  uint64               // sequence number of the next key
}

func newHistory() history {
	return history{byKey: iradix.New[uint64](), order: iradix.New[string]()}
}

func (h history) find(key string) (revision uint64, ok bool) {
	if key == "" {
		return 0, false
	}
	return h.byKey.Get([]byte(key))
}

// add remembers a key that find does not know, and forgets the oldest one.
func (h history) add(key string, revision uint64) history {
	h.byKey, _, _ = h.byKey.Insert([]byte(key), revision)
	h.order, _, _ = h.order.Insert(sequenceKey(h.next), key)
	h.next++
	if h.order.Len() > HistorySize {
		oldest := sequenceKey(h.next - uint64(h.order.Len()))
		key, _ := h.order.Get(oldest)
		h.order, _, _ = h.order.Delete(oldest)
		h.byKey, _, _ = h.byKey.Delete([]byte(key))
	}
	return h
}

func sequenceKey(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
