package raftstore

import (
	"testing"
	"time"
)

// TestHandover: after an attempt that failed the next one waits, in the same term only.
func TestHandover(t *testing.T) {
	var h handover
	now := time.Now()
	for _, c := range []struct {
		after time.Duration
		term  uint64
		ok    bool
	}{{0, 3, true}, {time.Second, 3, true}} {
		if err := h.allowed(now.Add(c.after), c.term); (err == nil) != c.ok {
			t.Errorf("before any failed, after %s in term %d: %v", c.after, c.term, err)
		}
	}
	h.failed(now, 3)
	for _, c := range []struct {
		after time.Duration
		term  uint64
		ok    bool
	}{{time.Second, 3, false}, {handoverRest - time.Second, 3, false}, {time.Second, 4, true}, {handoverRest, 3, true}} {
		if err := h.allowed(now.Add(c.after), c.term); (err == nil) != c.ok {
			t.Errorf("after %s in term %d: %v", c.after, c.term, err)
		}
	}
}
