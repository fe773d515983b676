package raftsim_test

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/raftstore/raftsim"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "the seed that TestSeed runs; the first one of TestSeeds")
	seedsFlag = flag.Int("seeds", 0, "how many seeds TestSeeds runs; 1000 when zero, 50 with -short")
	traceFlag = flag.Bool("trace", false, "print every event of TestSeed")
)

// TestSeed runs one seed, as it always runs.
func TestSeed(t *testing.T) {
	report, trace, err := runChild(raftsim.Options{Seed: *seedFlag}, func(*raftsim.Report, error) bool { return true })
	if trace != "" && *traceFlag {
		data, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.Write(data)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", *report)
	if err := report.Err(); err != nil {
		t.Fatalf("%v\nevery event is in %s", err, trace)
	}
}

// bad decides that the trace of a run is kept.
func bad(r *raftsim.Report, err error) bool { return err != nil || r.Err() != nil }

// each runs seeds with all processors, and hands over the reports as they come.
func each(runs []raftsim.Options, keep func(*raftsim.Report, error) bool, take func(o raftsim.Options, r *raftsim.Report, trace string, err error)) {
	queue := make(chan raftsim.Options)
	var mu sync.Mutex
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for o := range queue {
				report, trace, err := runChild(o, keep)
				mu.Lock()
				take(o, report, trace, err)
				mu.Unlock()
			}
		})
	}
	for _, o := range runs {
		queue <- o
	}
	close(queue)
	workers.Wait()
}

func seeds(first uint64, n int, edit func(*raftsim.Options)) []raftsim.Options {
	var runs []raftsim.Options
	for i := range n {
		o := raftsim.Options{Seed: first + uint64(i)}
		if edit != nil {
			edit(&o)
		}
		runs = append(runs, o)
	}
	return runs
}

func TestSeeds(t *testing.T) {
	n := *seedsFlag
	if n == 0 {
		n = 1000
		if testing.Short() {
			n = 50
		}
	}
	begun := time.Now()
	var ops, open, revisions int
	var fake time.Duration
	faults := map[string]int{}
	each(seeds(*seedFlag, n, nil), bad, func(o raftsim.Options, r *raftsim.Report, trace string, err error) {
		if err == nil {
			err = r.Err()
		}
		if err != nil {
			t.Errorf("%v\nevery event is in %s; again: go test ./raftstore/raftsim -run '^TestSeed$' -seed %d -trace", err, trace, o.Seed)
			return
		}
		ops, open, revisions, fake = ops+r.Ops, open+r.Unknown, revisions+int(r.Revision), fake+r.Fake
		for name, n := range r.Faults {
			faults[name] += n
		}
	})
	t.Logf("%d seeds in %v: %v of fake time, %d operations, %d of them with unknown outcome, %d revisions, faults %v", n, time.Since(begun).Round(time.Second), fake.Round(time.Second), ops, open, revisions, faults)
}

// TestReplay runs seeds several times: everything must happen again, at the same time.
// About one run in some hundreds is another one, why is not known: that is no reason to
// fail, as long as it is so seldom.
func TestReplay(t *testing.T) {
	n, times := 20, 5
	if testing.Short() {
		n, times = 4, 3
	}
	var all []raftsim.Options
	for range times {
		all = append(all, seeds(1000, n, nil)...)
	}
	runs := map[uint64]map[string]int{}
	each(all, nil, func(o raftsim.Options, r *raftsim.Report, _ string, err error) {
		if err != nil {
			t.Error(err)
			return
		}
		if runs[o.Seed] == nil {
			runs[o.Seed] = map[string]int{}
		}
		runs[o.Seed][fmt.Sprintf("%+v", *r)]++
	})
	other := 0
	for seed, results := range runs {
		most := 0
		for _, n := range results {
			most = max(most, n)
		}
		if most < times {
			t.Logf("seed %d: %d of %d runs were alike", seed, most, times)
		}
		other += times - most
	}
	t.Logf("%d of %d runs were other ones", other, len(all))
	if other > 1+len(all)/25 {
		t.Error("seeds do not replay")
	}
}

// TestFaultsAreFound breaks what a cluster rests on: the checks must notice.
func TestFaultsAreFound(t *testing.T) {
	for name, edit := range map[string]func(*raftsim.Options){
		"disks that acknowledge too early": func(o *raftsim.Options) { o.LyingDisks = true },
		"reads of whatever is there":       func(o *raftsim.Options) { o.DirtyReads = true },
	} {
		t.Run(name, func(t *testing.T) {
			const n = 20
			found, panics := 0, 0
			each(seeds(1, n, edit), nil, func(_ raftsim.Options, r *raftsim.Report, _ string, err error) {
				switch {
				case err != nil:
					panics++ // hashicorp/raft does, when its log has lost entries
				case r.Err() != nil:
					found++
				}
			})
			t.Logf("found with %d of %d seeds, and %d panics", found, n, panics)
			if found < n/4 {
				t.Error("too seldom: the checks are blind")
			}
		})
	}
}
