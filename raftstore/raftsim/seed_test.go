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
	j := job{Options: raftsim.Options{Seed: *seedFlag}}
	var report *raftsim.Report
	var err error
	if *traceFlag {
		report, err = runChild(j, os.Stdout)
	} else {
		report, err = runChild(j, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", *report)
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
}

// each runs jobs with all processors, and hands over the reports as they come.
func each(jobs []job, take func(job, *raftsim.Report, error)) {
	queue := make(chan job)
	var mu sync.Mutex
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for j := range queue {
				report, err := runChild(j, nil)
				mu.Lock()
				take(j, report, err)
				mu.Unlock()
			}
		})
	}
	for _, j := range jobs {
		queue <- j
	}
	close(queue)
	workers.Wait()
}

func seeds(first uint64, n int, edit func(*job)) []job {
	var jobs []job
	for i := range n {
		j := job{Options: raftsim.Options{Seed: first + uint64(i)}}
		if edit != nil {
			edit(&j)
		}
		jobs = append(jobs, j)
	}
	return jobs
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
	each(seeds(*seedFlag, n, nil), func(j job, r *raftsim.Report, err error) {
		if err == nil {
			err = r.Err()
		}
		if err != nil {
			t.Errorf("%v\nrun it again: go test ./raftstore/raftsim -run '^TestSeed$' -seed %d -trace", err, j.Seed)
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
func TestReplay(t *testing.T) {
	n, times := 20, 5
	if testing.Short() {
		n, times = 4, 2
	}
	var jobs []job
	for range times {
		jobs = append(jobs, seeds(1000, n, nil)...)
	}
	runs := map[uint64]string{}
	each(jobs, func(j job, r *raftsim.Report, err error) {
		if err != nil {
			t.Error(err)
			return
		}
		result := fmt.Sprintf("%+v", *r)
		if before, ok := runs[j.Seed]; ok && before != result {
			t.Errorf("seed %d gave\n%s\nand then\n%s", j.Seed, before, result)
		}
		runs[j.Seed] = result
	})
}

// TestFaultsAreFound breaks what a cluster rests on: the checks must notice.
func TestFaultsAreFound(t *testing.T) {
	for name, edit := range map[string]func(*job){
		"disks that acknowledge too early": func(j *job) { j.LyingDisks = true },
		"reads of whatever is there":       func(j *job) { j.DirtyReads = true },
	} {
		t.Run(name, func(t *testing.T) {
			const n = 20
			found := 0
			each(seeds(1, n, edit), func(_ job, r *raftsim.Report, err error) {
				if err != nil { // hashicorp/raft panics when its log has lost entries
					found++
					return
				}
				if err := r.Err(); err != nil {
					found++
					t.Log(err)
				}
			})
			t.Logf("found with %d of %d seeds", found, n)
			if found < n/4 {
				t.Error("too seldom: the checks are blind")
			}
		})
	}
}
