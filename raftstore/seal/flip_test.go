package seal

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// TestBoltFlips flips bits all over the log's file, and overwrites pages: either
// everything that was stored is read back, or the damage is noticed. Nothing makes the
// process crash.
func TestBoltFlips(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	v := open(t, dir)
	list := entries(1, 45, 2)
	store(t, v.Log, list)
	if err := errors.Join(v.Stable.SetUint64([]byte("CurrentTerm"), 2), v.Stable.Set([]byte("LastVoteCand"), []byte("me"))); err != nil {
		t.Fatal(err)
	}
	v.Close()
	path := filepath.Join(dir, logFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	mark, err := os.ReadFile(filepath.Join(dir, markFile))
	if err != nil {
		t.Fatal(err)
	}
	noticed, tries := 0, 0
	try := func(what string, at int, data []byte) {
		t.Helper()
		// The mark as it was: an append below would move it.
		if err := errors.Join(os.WriteFile(path, data, 0o600), os.WriteFile(filepath.Join(dir, markFile), mark, 0o600)); err != nil {
			t.Fatal(err)
		}
		tries++
		if err := readBack(dir, list); errors.Is(err, ErrCorrupt) {
			noticed++
			if strings.Contains(err.Error(), "freepages") {
				t.Errorf("%s at byte %d of page %d came through to bbolt: %v", what, at%4096, at/4096, err)
			}
		} else if err != nil {
			t.Fatalf("%s at byte %d of page %d: %v", what, at%4096, at/4096, err)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	const page = 4096
	samples := 20
	if testing.Short() {
		samples = 3
	}
	for p := 0; p < len(whole); p += page {
		for i := range 40 + samples {
			at := p + i
			if i >= 40 {
				at = p + r.IntN(page)
			}
			data := bytes.Clone(whole)
			data[at] ^= 1 << r.IntN(8)
			try("flip", at, data)
		}
		zero := bytes.Clone(whole)
		clear(zero[p : p+page])
		try("zero page", p, zero)
		garbage := bytes.Clone(whole)
		for i := range page {
			garbage[p+i] = byte(r.Uint32())
		}
		try("garbage page", p, garbage)
		other := bytes.Clone(whole)
		copy(other[p:p+page], whole[r.IntN(len(whole)/page)*page:])
		try("other page", p, other)
		try("cut", p, whole[:p+r.IntN(page)])
	}
	t.Logf("%d of %d kinds of damage in %d pages were noticed, the rest was harmless", noticed, tries, len(whole)/page)
	if noticed < tries/10 {
		t.Error("too few to be true")
	}
}

// readBack opens a vault, and compares all of it with what was stored.
func readBack(dir string, list []*raft.Log) error {
	v, err := Open(Config{Dir: dir})
	if err != nil {
		return err
	}
	defer v.Close()
	if _, err := v.Verify(context.Background()); err != nil {
		return err
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
	if term, err := v.Stable.GetUint64([]byte("CurrentTerm")); term != 2 || err != nil {
		return errors.Join(errors.New("the term is another"), err)
	}
	if vote, err := v.Stable.Get([]byte("LastVoteCand")); string(vote) != "me" || err != nil {
		return errors.Join(errors.New("the vote is another"), err)
	}
	if last, err := v.Log.LastIndex(); last != uint64(len(list)) || err != nil {
		return errors.Join(errors.New("the end is another"), err)
	}
	if err := v.Log.StoreLogs(entries(uint64(len(list))+1, uint64(len(list))+10, 2)); err != nil {
		return err
	}
	_, err = v.Verify(context.Background())
	return err
}

// TestMarkFlips: one damaged slot of the mark is made up for by the other.
func TestMarkFlips(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	store(t, v.Log, entries(1, 45, 2))
	v.Close()
	path := filepath.Join(dir, markFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(whole); at += 3 {
		data := bytes.Clone(whole)
		data[at] ^= 1 << (at % 8)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		open(t, dir).Close()
	}
	for _, size := range []int{0, 1, slotSize, markSize} {
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Config{Dir: dir})
		wantIs(t, err, ErrCorrupt)
	}
}

// TestFault: memory that cannot be read, as under a mapped file with a bad sector, is
// an error and no crash.
func TestFault(t *testing.T) {
	v := open(t, t.TempDir())
	store(t, v.Log, entries(1, 300, 1))
	if err := os.Truncate(filepath.Join(filepath.Dir(v.Keys.path), "..", logFile), 8192); err != nil { // under the mapping
		t.Fatal(err)
	}
	_, err := v.Verify(context.Background())
	wantIs(t, err, ErrCorrupt)
}
