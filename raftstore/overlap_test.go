package raftstore

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/seal"
)

// slowLog is a log whose writes wait for a permission, which may be an error.
type slowLog struct {
	*raft.InmemStore
	permits chan error
}

func (l *slowLog) StoreLogs(logs []*raft.Log) error {
	if err := <-l.permits; err != nil {
		return err
	}
	return l.InmemStore.StoreLogs(logs)
}

func commands(first, last uint64) (logs []*raft.Log) {
	for i := first; i <= last; i++ {
		logs = append(logs, &raft.Log{Index: i, Term: 1, Type: raft.LogCommand, Data: []byte{byte(i)}})
	}
	return logs
}

// overlapped is a log that takes every entry for a leader's, with other voters.
func overlapped() (*overlapLog, *slowLog) {
	inner := &slowLog{raft.NewInmemStore(), make(chan error, 16)}
	return newOverlapLog(inner, func() bool { return true }), inner
}

// TestOverlap: entries are there at once for those who read them, and an answer about
// them is kept back until they are on disk.
func TestOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, inner := overlapped()
		if err := o.StoreLogs(commands(1, 3)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // those are on their way
		if err := o.StoreLogs(commands(4, 5)); err != nil {
			t.Fatal(err)
		}
		var got raft.Log
		first, _ := o.FirstIndex()
		last, _ := o.LastIndex()
		if err := o.GetLog(5, &got); err != nil || got.Data[0] != 5 || first != 1 || last != 5 {
			t.Fatalf("%v %v, from %d to %d", got, err, first, last)
		}
		if err := o.GetLog(6, &got); !errors.Is(err, raft.ErrLogNotFound) {
			t.Fatal(err)
		}
		var mu sync.Mutex
		answered := map[uint64]bool{}
		for _, index := range []uint64{3, 5} {
			go func() {
				if err := o.await(index); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				answered[index] = true
			}()
		}
		know := func(want int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if len(answered) != want || want == 1 && !answered[3] {
				t.Fatalf("answered: %v", answered)
			}
		}
		know(0)
		inner.permits <- nil
		know(1)
		inner.permits <- nil
		know(2)
		if last, _ := inner.LastIndex(); last != 5 {
			t.Fatalf("%d entries are on disk", last)
		}
		o.close()
	})
}

// TestOverlapGivesWay: what decides who counts, what a follower stores, and what takes
// entries back, is on disk when it returns, and all before it.
func TestOverlapGivesWay(t *testing.T) {
	configuration := &raft.Log{Index: 2, Term: 1, Type: raft.LogConfiguration}
	for name, do := range map[string]func(*overlapLog) error{
		"configuration": func(o *overlapLog) error { return o.StoreLog(configuration) },
		"follower": func(o *overlapLog) error {
			o.leads = func() bool { return false }
			return o.StoreLogs(commands(2, 2))
		},
		"delete": func(o *overlapLog) error { return o.DeleteRange(1, 1) },
	} {
		synctest.Test(t, func(t *testing.T) {
			o, inner := overlapped()
			if err := o.StoreLogs(commands(1, 1)); err != nil {
				t.Fatal(err)
			}
			returned := make(chan error, 1)
			go func() { returned <- do(o) }()
			synctest.Wait()
			if len(returned) > 0 {
				t.Fatalf("%s: it did not wait", name)
			}
			inner.permits <- nil
			inner.permits <- nil
			if err := <-returned; err != nil {
				t.Fatal(err)
			}
			want := uint64(2)
			if name == "delete" {
				want = 0
			}
			if last, _ := inner.LastIndex(); last != want {
				t.Errorf("%s: the disk ends at %d", name, last)
			}
			o.close()
		})
	}
}

// TestOverlapWithoutRoom: nothing is lost while there is no room, who waits is told, and
// it goes on by itself.
func TestOverlapWithoutRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, inner := overlapped()
		inner.permits <- seal.ErrNoSpace
		if err := o.StoreLogs(commands(1, 2)); err != nil {
			t.Fatal(err)
		}
		if err := o.await(2); !errors.Is(err, seal.ErrNoSpace) {
			t.Fatalf("waited for a full disk: %v", err)
		}
		for _, err := range []error{o.StoreLogs(commands(3, 3)), o.DeleteRange(1, 2)} {
			if !errors.Is(err, seal.ErrNoSpace) {
				t.Fatalf("a full disk took more: %v", err)
			}
		}
		inner.permits <- nil
		time.Sleep(retryWrite)
		synctest.Wait()
		if err := o.await(2); err != nil {
			t.Fatal(err)
		}
		inner.permits <- nil
		if err := o.StoreLogs(commands(3, 3)); err != nil {
			t.Fatal(err)
		}
		o.close()
		if last, _ := inner.LastIndex(); last != 3 {
			t.Errorf("the disk ends at %d", last)
		}
	})
}

// TestOverlapCloses: a log that cannot be written does not keep anybody waiting.
func TestOverlapCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, inner := overlapped()
		inner.permits <- seal.ErrNoSpace
		if err := o.StoreLogs(commands(1, 1)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		o.close()
		o.close()
		if err := o.await(1); err == nil {
			t.Error("an entry that was not written counts")
		}
	})
}
