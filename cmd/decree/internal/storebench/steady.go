package storebench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// errNotMeasured says that a store cannot be asked for something.
var errNotMeasured = errors.New("not measured")

// elections counts elections while every core is busy with other work and callers put:
// there is no reason for any.
func (b *bench) elections(ctx context.Context) {
	const what = "elections without a reason, cores saturated"
	if !b.wanted(what) {
		return
	}
	for _, t := range b.targets {
		s, err := b.saturate(ctx, t)
		if err != nil {
			s.LastErr = err.Error()
		}
		s.Store, s.What, s.Unit = t.name(), what, "elections"
		b.say(s)
	}
}

// steady is how many durations of other measurements one of elections lasts.
const steady = 6

func (b *bench) saturate(ctx context.Context, t target) (s Sample, err error) {
	before, err := t.term(ctx)
	if err != nil {
		return s, err
	}
	for range runtime.NumCPU() {
		busy := exec.Command("sh", "-c", "while :; do :; done")
		busy.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := busy.Start(); err != nil {
			return s, err
		}
		defer func() {
			_ = busy.Process.Kill() // it has not ended by itself
			_ = busy.Wait()
		}()
	}
	timed, cancel := context.WithTimeout(ctx, steady*b.Duration)
	defer cancel()
	begun := time.Now()
	times, failed, last := drive(timed, 64, func(ctx context.Context, i int) error { return t.put(ctx, i) })
	s = summary(times)
	s.PerSec, s.Failed = float64(len(times))/time.Since(begun).Seconds(), failed
	if last != nil {
		s.LastErr = last.Error()
	}
	after, err := t.term(ctx)
	s.Value = float64(after - before)
	return s, err
}

// size measures what many objects cost: memory, and the time to save and to restore
// them.
func (b *bench) size(ctx context.Context) error {
	memory := fmt.Sprintf("memory of a server, %d objects", b.Objects)
	save, restore := fmt.Sprintf("snapshot saved, %d objects", b.Objects), fmt.Sprintf("snapshot restored, %d objects", b.Objects)
	if b.Objects <= keys || !b.wanted(memory) && !b.wanted(save) && !b.wanted(restore) {
		return nil
	}
	for _, t := range b.targets {
		if err := t.fill(ctx, keys, b.Objects); err != nil {
			return fmt.Errorf("fill %s with %d objects: %w", t.name(), b.Objects, err)
		}
		b.say(Sample{Store: t.name(), What: memory, Value: t.resident(), Unit: "MB"})
		file := filepath.Join(b.Dir, t.name()+".snapshot")
		took, err := timed(func() error { return t.save(ctx, file) })
		if err != nil {
			return fmt.Errorf("%s: %w", t.name(), err)
		}
		info, err := os.Stat(file)
		if err != nil {
			return err
		}
		b.say(Sample{Store: t.name(), What: save, Took: took, Value: float64(info.Size()) / 1e6, Unit: "MB"})
		took, err = timed(func() error { return t.restore(ctx, file) })
		if errors.Is(err, errNotMeasured) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", t.name(), err)
		}
		b.say(Sample{Store: t.name(), What: restore, Took: took})
	}
	return nil
}

// timed returns how long f took, in milliseconds.
func timed(f func() error) (ms float64, err error) {
	begun := time.Now()
	err = f()
	return float64(time.Since(begun).Microseconds()) / 1000, err
}
