package delivery_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// polls follows one source in fake time; each poll gets its answer from fake. It
// returns the times of the polls of so many intervals.
func polls(t *testing.T, w *world, intervals int, fake func(n int) (*gitsource.Fetched, error)) (f *trail, times []time.Time) {
	t.Helper()
	f = w.follow()
	f.fetcher.answer(func(n int) (*gitsource.Fetched, error) {
		times = append(times, time.Now())
		return fake(n)
	})
	w.create(&api.Source{ObjectMeta: metav1.ObjectMeta{Name: "shop"}, Spec: api.SourceSpec{URL: "/srv/shop"}})
	time.Sleep(time.Duration(intervals) * gitsource.DefaultInterval)
	synctest.Wait()
	return f, times
}

// bubble is a world in fake time.
func bubble(t *testing.T, test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) { test(t, newWorld(t)) })
}

func TestPollInterval(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		good := commit("good", tree(configMap("a", "1")))
		before := w.store.proposals()
		f, times := polls(t, w, 100, func(int) (*gitsource.Fetched, error) { return &gitsource.Fetched{Commit: good}, nil })
		if len(times) < 90 || len(times) > 112 {
			t.Errorf("%d polls in 100 intervals", len(times))
		}
		same := true
		for i := 1; i < len(times); i++ {
			d := times[i].Sub(times[i-1])
			same = same && d == gitsource.DefaultInterval
			if d < 27*time.Second || d > 33*time.Second+time.Second {
				t.Errorf("poll %d after %s", i, d)
			}
		}
		if same {
			t.Error("no jitter")
		}
		// The commit and the status, and then nothing.
		if n := w.store.proposals() - before; n != 2 || w.compiler.runs() != 1 {
			t.Errorf("%d transactions, compiled %d times", n, w.compiler.runs())
		}
		// A poll that was asked for starts the interval anew, and costs one fetch.
		n := f.fetcher.fetches()
		if err := f.follower.Sync("shop"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := f.fetcher.fetches() - n; got != 1 {
			t.Errorf("%d fetches after sync", got)
		}
		time.Sleep(26 * time.Second)
		synctest.Wait()
		if got := f.fetcher.fetches() - n; got != 1 {
			t.Errorf("%d fetches before the interval was over", got)
		}
		// A tiny interval does not make a busy loop.
		w.respec("shop", func(s *api.SourceSpec) { s.Interval.Duration = time.Nanosecond })
		synctest.Wait()
		n = f.fetcher.fetches()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := f.fetcher.fetches() - n; got < 8 || got > 12 {
			t.Errorf("%d fetches in 10 s", got)
		}
		f.stop()
	})
}

// An error whose text is never the same is written down now and then only.
func TestFailingPollsDoNotGrowTheLog(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		before := w.store.proposals()
		begun := time.Now()
		f, times := polls(t, w, 100, func(n int) (*gitsource.Fetched, error) {
			return nil, fmt.Errorf("connection %d was reset", n)
		})
		if len(times) < 90 {
			t.Errorf("%d polls", len(times))
		}
		c := condition(w.store.View(), "shop")
		if c.Reason != delivery.ReasonFetchError || c.LastTransitionTime.Sub(begun) > time.Second {
			t.Errorf("%+v", c)
		}
		if n := w.store.proposals() - before; n > 6 {
			t.Errorf("%d transactions for %d failed polls", n, len(times))
		}
		f.stop()
	})
}

// A refused commit is neither recorded nor compiled at every poll.
func TestRefusedCommitRests(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		bad := commit("bad", tree("a: 1 & 2"))
		before := w.store.proposals()
		f, times := polls(t, w, 100, func(n int) (*gitsource.Fetched, error) {
			if n%10 == 0 { // now and then the network fails as well
				return nil, errors.New("connection reset")
			}
			return &gitsource.Fetched{Commit: bad}, nil
		})
		if n := len(w.revisions("shop")); n != 1 {
			t.Errorf("%d records", n)
		}
		if n := w.compiler.runs(); n < 2 || n > 10 {
			t.Errorf("compiled %d times in %d polls", n, len(times))
		}
		// One record, one status, and two for every time the network failed.
		if n := w.store.proposals() - before; n > 2+2*(len(times)/10) {
			t.Errorf("%d transactions for %d polls", n, len(times))
		}
		f.stop()
	})
}

// What fails in the cluster itself is tried again soon, and said if possible.
func TestDeliveryErrorIsRetriedSoon(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		good := commit("good", tree(configMap("a", "1")))
		failing := 3
		w.store.onPropose(func(txn command.Txn) error {
			if txn.Commit != nil && failing > 0 {
				failing--
				return errors.New("no quorum")
			}
			return nil
		})
		f := w.follow()
		f.fetcher.answer(func(int) (*gitsource.Fetched, error) { return &gitsource.Fetched{Commit: good}, nil })
		w.external("shop", "/srv/shop")
		synctest.Wait()
		if c := condition(w.store.View(), "shop"); c.Reason != delivery.ReasonDeliveryError {
			t.Errorf("%+v", c)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if c := condition(w.store.View(), "shop"); c.Reason != delivery.ReasonApplied {
			t.Errorf("%+v", c)
		}
		f.stop()
	})
}
