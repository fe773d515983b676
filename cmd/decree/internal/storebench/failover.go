package storebench

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// killFor bounds the wall time of one kill with all that belongs to it. There is no
// bound of all kills: a slow store is measured to the end.
const killFor = 2 * time.Minute

// failover kills leaders and measures until the next write is acknowledged. What was
// measured before an error counts.
func (b *bench) failover(ctx context.Context) (errs error) {
	const what = "leader killed to next acknowledged write"
	if !b.wanted(what) || b.Kills == 0 {
		return nil
	}
	for _, t := range b.targets {
		var times []time.Duration
		var err error
		for i := range b.Kills {
			var took time.Duration
			if took, err = kill(ctx, t, i); err != nil {
				err = fmt.Errorf("kill %d: %w", i+1, err)
				break
			}
			times = append(times, took)
		}
		s := summary(times)
		s.Store, s.What, s.Value, s.Unit = t.name(), what, float64(len(times)), "kills"
		if err != nil {
			s.LastErr = err.Error()
			errs = errors.Join(errs, fmt.Errorf("%s: %w", t.name(), err))
		}
		b.say(s)
	}
	return errs
}

// kill ends the leader once, and starts it again.
func kill(ctx context.Context, t target, i int) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, killFor)
	defer cancel()
	if err := t.write(ctx, i); err != nil {
		return 0, fmt.Errorf("the write before: %w", err)
	}
	restart, err := t.killLeader(ctx)
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	if err := t.write(ctx, i); err != nil {
		return 0, fmt.Errorf("the write after: %w", err)
	}
	took = time.Since(begun)
	if err := restart(); err != nil {
		return 0, fmt.Errorf("start it again: %w", err)
	}
	return took, nil
}
