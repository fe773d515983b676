package apiserver

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
)

// TestPause: nobody waits for a turn as long as there are enough, then each for its own,
// and the end of a watch is not waited for.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{flushes: rate.NewLimiter(10, 3)}
		begun := time.Now()
		for i, want := range []time.Duration{0, 0, 0, 100 * time.Millisecond, 200 * time.Millisecond} {
			s.pause(t.Context())
			if took := time.Since(begun); took != want {
				t.Errorf("turn %d came after %s, want %s", i, took, want)
			}
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		before := time.Now()
		if s.pause(ended); time.Since(before) != 0 {
			t.Error("a watch that has ended waits")
		}
	})
}
