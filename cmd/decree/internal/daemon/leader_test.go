package daemon

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// onlyServer always leads.
type onlyServer chan struct{}

func (onlyServer) Leads() bool                     { return true }
func (s onlyServer) LeaderChange() <-chan struct{} { return s }

// TestLeadsAgain: a leader that could not begin begins again, although the lead does
// not change; not at once, and soon after it had begun.
func TestLeadsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		begin := time.Now()
		var at []time.Duration
		told := 0
		whileLeading(ctx, make(onlyServer), func(ctx context.Context, begun func()) error {
			at = append(at, time.Since(begin))
			switch len(at) {
			case 9:
				begun()
			case 11:
				cancel()
			}
			return errors.New("no")
		}, func(error) { told++ })
		if len(at) != 11 || told != 10 {
			t.Fatalf("%d tenures and %d told, want 11 and 10", len(at), told)
		}
		if wait := at[8] - at[7]; wait < time.Second || wait > leadAgain.Max {
			t.Errorf("waited %v after eight failures", wait)
		}
		if wait := at[9] - at[8]; wait <= 0 || wait > 4*leadAgain.Min {
			t.Errorf("waited %v after a tenure that had begun", wait)
		}
	})
}
