package storebench

import (
	"context"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

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
