package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fullDisk has no room for a while: for the new key itself, and then for the snapshot
// that lets go of what the old one encrypts.
type fullDisk struct {
	noKey, noSnapshot int // how often it fails
	epoch             int64
	rotations, prunes int
	complete          bool
}

func (d *fullDisk) KeyEpoch() int64 { return d.epoch }

func (d *fullDisk) RotateKeys(epoch int64) error {
	d.rotations++
	if d.noKey > 0 {
		d.noKey--
		return errors.New("no space left on device")
	}
	d.epoch = epoch
	if d.noSnapshot > 0 {
		d.noSnapshot--
		return errors.New("snapshot: no space left on device")
	}
	d.complete = true
	return nil
}

func (d *fullDisk) PruneKeys() error {
	d.prunes++
	return nil
}

// TestKeysAreRotatedAgain: a rotation that fails half way is tried again soon, and again
// later, until all of it is done; nothing new has to happen for that.
func TestKeysAreRotatedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &fullDisk{epoch: 1, noKey: 3, noSnapshot: 2}
		var asked atomic.Int64
		asked.Store(1)
		told := 0
		k := &keyFollower{disk: disk, asked: asked.Load, rotated: func() { told++ }}
		changed := make(chan struct{}, 1)
		loop := k.loop(changed, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- loop.Run(ctx) }()
		synctest.Wait()
		if disk.rotations != 0 {
			t.Error("keys are rotated that nobody asked for")
		}
		asked.Store(2)
		changed <- struct{}{}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if !disk.complete || disk.epoch != 2 || disk.rotations != 6 {
			t.Errorf("after two minutes: %+v", disk)
		}
		if told != 1 {
			t.Errorf("the cluster was told %d times of one new key", told)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if disk.rotations != 6 || disk.prunes < 5 {
			t.Errorf("an hour later: %+v", disk)
		}
		cancel()
		<-ended
	})
}
