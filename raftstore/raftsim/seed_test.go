package raftsim_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/raftstore/raftsim"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "the seed that TestSeed runs; the first one of TestSeeds")
	seedsFlag = flag.Int("seeds", 0, "how many seeds TestSeeds runs; 1000 when zero (300 or more on a machine that needs longer than two minutes for them), 50 with -short")
	traceFlag = flag.Bool("trace", false, "print every event of TestSeed")
)

// TestSeed runs one seed, as it always runs.
func TestSeed(t *testing.T) {
	report, trace, err := runChild(options(*seedFlag), always)
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

// bad decides that the trace of a run is kept, if it failed.
func bad(r *raftsim.Report, err error) bool { return err != nil || r.Err() != nil }

// always decides that the trace of a run is kept.
func always(*raftsim.Report, error) bool { return true }

// spread calls do with 0 to n-1, on all processors.
func spread(n int, do func(i int)) {
	queue := make(chan int)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := range queue {
				do(i)
			}
		})
	}
	for i := range n {
		queue <- i
	}
	close(queue)
	workers.Wait()
}

// each runs seeds, and hands over the results as they come, one at a time.
func each(runs []raftsim.Options, keep func(*raftsim.Report, error) bool, take func(o raftsim.Options, r *raftsim.Report, trace string, err error)) {
	var mu sync.Mutex
	spread(len(runs), func(i int) {
		r, trace, err := runChild(runs[i], keep)
		mu.Lock()
		defer mu.Unlock()
		take(runs[i], r, trace, err)
	})
}

// options are those of a seed: one in five upgrades its servers.
func options(seed uint64) raftsim.Options { return raftsim.Options{Seed: seed, Upgrade: seed%5 == 4} }

func seeds(first uint64, n int, edit func(*raftsim.Options)) []raftsim.Options {
	var runs []raftsim.Options
	for i := range n {
		o := options(first + uint64(i))
		if edit != nil {
			edit(&o)
		}
		runs = append(runs, o)
	}
	return runs
}

func TestSeeds(t *testing.T) {
	const part = 50 // at once
	n, least, enough := *seedsFlag, *seedsFlag, 2*time.Minute
	if n == 0 {
		n, least = 1000, 300
		if testing.Short() {
			n, least = part, part
		}
	}
	begun := time.Now()
	var ops, open, revisions int
	var fake time.Duration
	faults := map[string]int{}
	take := func(o raftsim.Options, r *raftsim.Report, trace string, err error) {
		if bad(r, err) {
			t.Error(again(o, r, trace, err))
			return
		}
		ops, open, revisions, fake = ops+r.Ops, open+r.Unknown, revisions+int(r.Revision), fake+r.Fake
		for name, n := range r.Faults {
			faults[name] += n
		}
	}
	done := 0
	for done < n && (done < least || time.Since(begun) < enough) {
		more := min(part, n-done)
		each(seeds(*seedFlag+uint64(done), more, nil), bad, take)
		done += more
	}
	t.Logf("%d seeds in %v: %v of fake time, %d operations, %d of them with unknown outcome, %d revisions, faults %v", done, time.Since(begun).Round(time.Second), fake.Round(time.Second), ops, open, revisions, faults)
}

// again says what is wrong with a run, and how to have it again.
func again(o raftsim.Options, r *raftsim.Report, trace string, err error) string {
	if err == nil {
		err = r.Err()
	}
	return fmt.Sprintf("%v\nevery event is in %s; again: go test ./raftstore/raftsim -run '^TestSeed$' -seed %d -trace", err, trace, o.Seed)
}

// TestReplay runs seeds several times: everything must happen again, at the same time.
func TestReplay(t *testing.T) {
	n, times := 20, 5
	if testing.Short() {
		n, times = 4, 3
	}
	if *seedsFlag > 0 {
		n = *seedsFlag
	}
	spread(n, func(i int) {
		o := options(*seedFlag + 1000 + uint64(i))
		first, trace, err := runChild(o, always)
		if err != nil {
			t.Error(err)
			return
		}
		defer os.Remove(trace)
		for range times - 1 {
			r, other, err := runChild(o, always)
			switch {
			case err != nil:
				t.Error(err)
			case !reflect.DeepEqual(r, first):
				t.Errorf("seed %d was two runs: %s", o.Seed, difference(trace, other))
			}
			os.Remove(other)
		}
	})
}

// difference shows where two traces part.
func difference(a, b string) string {
	one, err := os.ReadFile(a)
	two, err2 := os.ReadFile(b)
	if err = errors.Join(err, err2); err != nil {
		return err.Error()
	}
	lines, others := strings.SplitAfter(string(one), "\n"), strings.SplitAfter(string(two), "\n")
	for i := range min(len(lines), len(others)) {
		if lines[i] != others[i] {
			return fmt.Sprintf("from line %d on, after\n%s%s but\n%s", i+1, strings.Join(lines[max(0, i-5):i], ""), lines[i], others[i])
		}
	}
	return fmt.Sprintf("one of %d lines, one of %d", len(lines), len(others))
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
