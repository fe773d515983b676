// Package raftsim runs whole clusters of raftstore servers in fake time, with a
// network, disks, clients and faults that follow from a seed, and checks everything
// that was seen. It is for tests: [Run] must be called inside a testing/synctest bubble.
//
// It is not a model: the servers are raftstore.Store, membership.Keeper and
// hashicorp/raft as they are; only what is around them is imitated. It does no I/O but the small identity file of
// every server, in a folder of the caller's. DESIGN.md beside this file tells what is
// imitated, what is checked, and why a seed gives the same run again.
package raftsim

import (
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"time"
)

// Options say what to run. Seed and Dir are required.
type Options struct {
	Seed uint64
	// Dir is an empty folder for the servers' identities.
	Dir string
	// Faults is how long clients work and faults happen, in fake time; 8 s when zero.
	Faults time.Duration
	// Upgrade lets all servers begin as the version before this one, and upgrades them one
	// by one. It needs the tag decree_next_format: a cluster of several servers has had
	// log format 2 from its beginning.
	Upgrade bool
	// LyingDisks acknowledge writes before they are durable, and lose them in a crash.
	// The checks must find that.
	LyingDisks bool
	// DirtyReads answer reads from whatever state a server has. The checks must find that.
	DirtyReads bool
	// Trace, when not nil, is told of every event, and what servers log. It must not keep
	// the line. A run is another one with it than without.
	Trace func(line []byte) `json:"-"`
}

// Report is what came of a run. It follows from the seed, if goroutines were scheduled
// alike.
type Report struct {
	Seed    uint64
	Servers int
	// Trace is a hash of every delivery, disk write, answer and state with its fake
	// time; Events is how many there were.
	Trace  string
	Events int
	// Ops counts the clients' operations, Unknown those whose outcome they never learnt.
	Ops, Unknown int
	Revision     uint64
	Faults       map[string]int
	Fake         time.Duration
	// Failures are the checks that did not hold. None: the run was good.
	Failures []string
}

// Err returns the failures as an error, nil if there are none.
func (r *Report) Err() error {
	var errs []error
	for _, f := range r.Failures {
		errs = append(errs, errors.New(f))
	}
	if errs == nil {
		return nil
	}
	return fmt.Errorf("seed %d: %w", r.Seed, errors.Join(errs...))
}

// stream returns random numbers that follow from the seed and a name, so that each part
// of a run has its own: what one part draws does not change the others.
func stream(seed uint64, name string) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(name))
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// between draws a duration.
func between(r *rand.Rand, low, high time.Duration) time.Duration {
	return low + time.Duration(r.Int64N(int64(high-low)+1))
}

// chance is true with probability p.
func chance(r *rand.Rand, p float64) bool { return r.Float64() < p }

// Run runs one seed.
func Run(o Options) *Report {
	if o.Faults == 0 {
		o.Faults = 8 * time.Second
	}
	begun := time.Now()
	c := newCluster(o)
	c.run()
	r := &Report{
		Seed: o.Seed, Servers: c.size, Faults: c.nemesis.counts, Fake: time.Since(begun), Failures: c.failures,
		Revision: c.final.revision,
	}
	r.Ops, r.Unknown = c.history.count()
	r.Trace, r.Events = c.trace.sum()
	return r
}
