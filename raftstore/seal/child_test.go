package seal

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// childVariable makes the test binary a process that writes until it is killed, or
// until it reaches a failpoint: "MODE|DIR|NUMBER".
const childVariable = "SEAL_TEST_CHILD"

// child is the life of such a process. It prints a line for everything that is
// acknowledged, and one before it takes something away.
func child() bool {
	mode, rest, ok := strings.Cut(os.Getenv(childVariable), "|")
	if !ok {
		return false
	}
	dir, number, _ := strings.Cut(rest, "|")
	n, _ := strconv.Atoi(number)
	if mode == "scenario" {
		countdown := n
		failpoint = func(step string) {
			fmt.Println("step", step)
			if countdown--; countdown == 0 {
				os.Exit(3)
			}
		}
	}
	v, err := Open(Config{Dir: dir, Disk: DiskConfig{SlowAfter: 15 * time.Millisecond}})
	if err == nil {
		_, err = v.Verify(context.Background())
	}
	if err == nil {
		switch mode {
		case "append":
			err = appendForever(v, uint64(n))
		case "scenario":
			err = scenario(v)
		case "slow":
			err = slowly(v)
		case "trouble":
			err = failAndGoOn(v)
		}
	}
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	return true
}

// appendForever does what raft does, a bit of everything.
func appendForever(v *Vault, round uint64) error {
	r := rand.New(rand.NewPCG(round, 1))
	term := round * 1000
	for i := 0; ; i++ {
		last, err := v.Log.LastIndex()
		if err != nil {
			return err
		}
		if err := storeAcknowledged(v.Log, entries(last+1, last+1+r.Uint64N(5), term)); err != nil {
			return err
		}
		switch i % 20 {
		case 7: // an election
			term++
			if err := v.Stable.SetUint64([]byte("CurrentTerm"), term); err != nil {
				return err
			}
			fmt.Println("term", term)
		case 13: // a conflict
			fmt.Println("truncate", last+1)
			if err := v.Log.DeleteRange(last+1, last+100); err != nil {
				return err
			}
		case 19:
			if err := compact(v, last); err != nil {
				return err
			}
		}
	}
}

func storeAcknowledged(log *LogStore, list []*raft.Log) error {
	if err := log.StoreLogs(list); err != nil {
		return err
	}
	for _, l := range list {
		fmt.Println("entry", l.Index, l.Term)
	}
	return nil
}

func compact(v *Vault, last uint64) error {
	sink, err := v.Snapshots.Create(1, last, 1, raft.Configuration{}, 1, nil)
	if err != nil {
		return err
	}
	if _, err := sink.Write(snapshotContent(last, chunkSize+1000)); err != nil {
		return err
	}
	if err := sink.Close(); err != nil {
		return err
	}
	fmt.Println("snapshot", last)
	first, err := v.Log.FirstIndex()
	if err != nil || last < 20 {
		return err
	}
	fmt.Println("compact", last-10)
	return v.Log.DeleteRange(first, last-10)
}

// slowly stores on a disk whose syncs take longer than SlowAfter.
func slowly(v *Vault) error {
	for i := range uint64(20) {
		if err := storeAcknowledged(v.Log, entries(i+1, i+1, 1)); err != nil {
			return err
		}
	}
	if !v.Disk.Slow() {
		return errors.New("the disk is not slow")
	}
	return v.Disk.Healthy()
}

// scenario reaches every failpoint.
func scenario(v *Vault) error {
	for epoch := range uint64(3) {
		last, err := v.Log.LastIndex()
		if err != nil {
			return err
		}
		if err := storeAcknowledged(v.Log, entries(last+1, last+15, epoch+1)); err != nil {
			return err
		}
		fmt.Println("truncate", last+10)
		if err := v.Log.DeleteRange(last+10, last+15); err != nil {
			return err
		}
		if err := v.Rotate(v.Keys.Epoch() + 1); err != nil {
			return err
		}
		if err := v.Stable.SetUint64([]byte("CurrentTerm"), last); err != nil {
			return err
		}
		fmt.Println("term", last)
		if err := compact(v, last+9); err != nil {
			return err
		}
		if err := v.Keys.RotateMaster(); err != nil {
			return err
		}
		if _, err := v.Prune(); err != nil {
			return err
		}
	}
	return v.Close()
}

// promises are what a child has acknowledged.
type promises struct {
	entries        map[uint64]uint64 // index: term
	term, snapshot uint64
	compacted      uint64
	count          int
	steps          []string
	problem        string
}

// hear takes a line of a child's output.
func (p *promises) hear(line string) {
	word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	var a, b uint64
	fmt.Sscan(rest, &a, &b)
	switch word {
	case "entry":
		p.entries[a] = b
		p.count++
	case "truncate":
		for i := range p.entries {
			if i >= a {
				delete(p.entries, i)
			}
		}
	case "term":
		p.term = a
	case "snapshot":
		p.snapshot = a
	case "compact":
		p.compacted = a
	case "step":
		p.steps = append(p.steps, rest)
	case "error":
		p.problem = rest
	}
}

// run starts a child, and kills it when it has acknowledged limit more entries; zero:
// lets it end by itself.
func (p *promises) run(t testing.TB, mode, dir string, n, limit int) {
	t.Helper()
	if p.entries == nil {
		p.entries = map[uint64]uint64{}
	}
	p.steps, p.problem = nil, ""
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%s|%d", childVariable, mode, dir, n))
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err == nil {
		err = child.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	limit += p.count
	lines := bufio.NewReader(out)
	for killed := false; ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			break // a cut line is no promise
		}
		p.hear(line)
		if limit > 0 && p.count >= limit && !killed && mode == "append" {
			killed = true
			child.Process.Kill()
		}
	}
	child.Wait()
}

// wantKept checks that the folder holds what was promised, and nothing that was never
// written.
func (p *promises) wantKept(t testing.TB, dir string) {
	t.Helper()
	v, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	r := verify(t, v)
	for index, term := range p.entries {
		if index > p.compacted {
			wantEntries(t, v.Log, []*raft.Log{entryOf(index, term)})
		}
	}
	for i := r.First; i <= r.Last && i > 0; i++ {
		var got raft.Log
		if err := v.Log.GetLog(i, &got); err != nil {
			t.Fatal(err)
		}
		if err := sameEntry(&got, entryOf(i, got.Term)); err != nil {
			t.Fatal(err)
		}
	}
	if p.term > 0 {
		if term, err := v.Stable.GetUint64([]byte("CurrentTerm")); term < p.term || err != nil {
			t.Fatalf("term %d was stored, %d is there: %v", p.term, term, err)
		}
	}
	if p.snapshot == 0 {
		return
	}
	if r.Snapshot == nil || r.Snapshot.Index < p.snapshot {
		t.Fatalf("snapshot %d was finished, %v is the newest", p.snapshot, r.Snapshot)
	}
	_, content, err := readSnapshot(v.Snapshots, r.Snapshot.ID)
	if err != nil || string(content) != string(snapshotContent(r.Snapshot.Index, chunkSize+1000)) {
		t.Fatalf("the newest snapshot is not what was written: %v", err)
	}
}

// wantTrue reads what a folder holds, after damage that may have lost anything: it is
// what was once written, or the error matches ErrCorrupt.
func wantTrue(t testing.TB, dir string) (last uint64, err error) {
	t.Helper()
	v, err := Open(Config{Dir: dir})
	if err != nil {
		wantIs(t, err, ErrCorrupt)
		return 0, err
	}
	defer v.Close()
	r, err := v.Verify(context.Background())
	if err != nil {
		wantIs(t, err, ErrCorrupt)
		return 0, err
	}
	for i := r.First; i <= r.Last && i > 0; i++ {
		var got raft.Log
		if err := v.Log.GetLog(i, &got); err != nil {
			t.Fatal(err)
		}
		if err := sameEntry(&got, entryOf(i, got.Term)); err != nil {
			t.Fatal(err)
		}
	}
	return r.Last, nil
}

// failAndGoOn writes while the disk fails, and after that, and prints what happened. The
// disk fails as long as the file in SEAL_TEST_SWITCH exists.
func failAndGoOn(v *Vault) error {
	fault := os.Getenv("SEAL_TEST_SWITCH")
	list := entries(1, 20, 1)
	if err := v.Log.StoreLogs(list); err != nil {
		return err
	}
	changed := v.Disk.Changed()
	if err := os.WriteFile(fault, nil, 0o600); err != nil {
		return err
	}
	failed := v.Log.StoreLogs(entries(21, 40, 1))
	select {
	case <-changed:
	default:
		return fmt.Errorf("nobody was told of %v", failed)
	}
	if err := os.Remove(fault); err != nil {
		return err
	}
	said := kind(failed)
	if kind(v.Disk.Healthy()) != said {
		return fmt.Errorf("the write said %v, the disk says %v", failed, v.Disk.Healthy())
	}
	healthy := v.Disk.Probe() == nil
	goesOn := v.Log.StoreLogs(entries(21, 40, 1)) == nil
	if healthy != goesOn {
		return fmt.Errorf("healthy %v, goes on %v", healthy, goesOn)
	}
	if goesOn {
		list = entries(1, 40, 1)
	}
	for _, want := range list {
		var got raft.Log
		if err := v.Log.GetLog(want.Index, &got); err != nil {
			return err
		}
		if err := sameEntry(&got, want); err != nil {
			return err
		}
	}
	fmt.Printf("matches %v, goes on %v, kept true\n", said, goesOn)
	return nil
}
