package storebench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// errNotMeasured says that a store cannot be asked for something.
var errNotMeasured = errors.New("not measured")

const (
	// largeSize is how large the values of these objects are, in bytes.
	largeSize = 1024
	// rest is how long servers are left alone before their memory counts: garbage
	// goes, and what was written for the disk is written.
	rest = 15 * time.Second
	// sizeFor bounds the wall time of a snapshot, or of its restoration.
	sizeFor = 10 * time.Minute
)

// size measures what many objects cost: memory, and the time to save and to restore
// them. The servers are new ones: what other measurements left in memory or in a
// history is not in it.
func (b *bench) size(ctx context.Context) error {
	memory := fmt.Sprintf("memory of a server, %d objects", b.Objects)
	save, restore := fmt.Sprintf("snapshot saved, %d objects", b.Objects), fmt.Sprintf("snapshot restored, %d objects", b.Objects)
	if b.Objects <= keys || !b.wanted(memory) && !b.wanted(save) && !b.wanted(restore) {
		return nil
	}
	b.stop()
	cfg := b.Config
	cfg.Dir = filepath.Join(b.Dir, "size")
	if err := os.Mkdir(cfg.Dir, 0o700); err != nil {
		return err
	}
	var err error
	if b.targets, err = start(ctx, cfg); err != nil {
		return err
	}
	for _, t := range b.targets {
		if err := b.fillLarge(ctx, t); err != nil {
			return fmt.Errorf("fill %s with %d objects: %w", t.name(), b.Objects, err)
		}
	}
	select {
	case <-time.After(rest):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for _, t := range b.targets {
		b.say(Sample{Store: t.name(), What: memory, Value: t.resident(), Unit: "MB"})
	}
	for _, t := range b.targets {
		if err := b.snapshot(ctx, t, save, restore); err != nil {
			return fmt.Errorf("%s: %w", t.name(), err)
		}
	}
	return nil
}

func (b *bench) fillLarge(ctx context.Context, t target) error {
	ctx, cancel := context.WithTimeout(ctx, fillFor)
	defer cancel()
	return t.fill(ctx, keys, b.Objects, largeSize)
}

// snapshot measures one store.
func (b *bench) snapshot(ctx context.Context, t target, save, restore string) error {
	ctx, cancel := context.WithTimeout(ctx, sizeFor)
	defer cancel()
	file := filepath.Join(b.Dir, t.name()+".snapshot")
	took, err := timed(func() error { return t.save(ctx, file) })
	if err != nil {
		return err
	}
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	b.say(Sample{Store: t.name(), What: save, Took: took, Value: float64(info.Size()) / 1e6, Unit: "MB"})
	took, err = timed(func() error { return t.restore(ctx, file) })
	s := Sample{Store: t.name(), What: restore, Took: took}
	if errors.Is(err, errNotMeasured) {
		s.Took, s.LastErr, err = 0, "not measured: etcdctl is not installed", nil
	}
	if err == nil {
		b.say(s)
	}
	return err
}

// timed returns how long f took, in milliseconds.
func timed(f func() error) (ms float64, err error) {
	begun := time.Now()
	err = f()
	return float64(time.Since(begun).Microseconds()) / 1000, err
}
