package seal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

func TestLogRoundTrip(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	list := entries(1, 200, 1)
	list[9].Data = []byte("\x01 a secret that must not be readable on the disk")
	store(t, v.Log, list)
	wantEntries(t, v.Log, list)
	if err := v.Stable.Set([]byte("LastVoteCand"), []byte("the server we voted for")); err != nil {
		t.Fatal(err)
	}
	if err := v.Stable.SetUint64([]byte("CurrentTerm"), 7); err != nil {
		t.Fatal(err)
	}
	takeSnapshotOf(t, v.Snapshots, 100, []byte("a secret in a snapshot"))
	v.Close()
	for _, secret := range []string{"must not be readable", "server we voted for", "secret in a snapshot"} {
		if path := contains(t, dir, []byte(secret)); path != "" {
			t.Errorf("%q can be read in %s", secret, path)
		}
	}
	v = open(t, dir)
	wantEntries(t, v.Log, list)
	if term, err := v.Stable.GetUint64([]byte("CurrentTerm")); term != 7 || err != nil {
		t.Fatal(term, err)
	}
	if _, err := v.Stable.Get([]byte("nothing")); err == nil || err.Error() != "not found" {
		t.Fatal(err)
	}
	if r := verify(t, v); r.First != 1 || r.Last != 200 || r.Entries != 200 || r.Plain != 0 || r.Snapshot.Index != 100 || r.SnapshotBytes != 22 {
		t.Fatalf("%+v", r)
	}
}

// TestLogDeletes: what raft does to a log beside appending.
func TestLogDeletes(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	store(t, v.Log, entries(1, 100, 1))
	if err := v.Log.DeleteRange(51, 100); err != nil { // a conflict with a new leader
		t.Fatal(err)
	}
	v.Close()
	v = open(t, dir)
	store(t, v.Log, entries(51, 80, 3))
	takeSnapshot(t, v.Snapshots, 60, 10)
	if err := v.Log.DeleteRange(1, 40); err != nil { // compaction
		t.Fatal(err)
	}
	v.Close()
	v = open(t, dir)
	wantEntries(t, v.Log, append(entries(41, 50, 1), entries(51, 80, 3)...))
	if r := verify(t, v); r.First != 41 || r.Last != 80 || r.Entries != 40 {
		t.Fatalf("%+v", r)
	}
	takeSnapshot(t, v.Snapshots, 200, 10) // sent by a leader
	if err := v.Log.DeleteRange(41, 60); err != nil {
		t.Fatal(err)
	}
	store(t, v.Log, entries(201, 220, 4))
	v.Close()
	v = open(t, dir)
	if r := verify(t, v); r.First != 61 || r.Last != 220 || r.Entries != 40 { // 61-80, 201-220
		t.Fatalf("%+v", r)
	}
	if err := v.Log.DeleteRange(61, 220); err != nil {
		t.Fatal(err)
	}
	v.Close()
	v = open(t, dir)
	if r := verify(t, v); r.Entries != 0 {
		t.Fatalf("%+v", r)
	}
}

// TestSwapped moves whole entries around behind the store's back.
func TestSwapped(t *testing.T) {
	for name, change := range map[string]func(inner *raft.InmemStore, log *raft.Log){
		"term":      func(_ *raft.InmemStore, log *raft.Log) { log.Term++ },
		"type":      func(_ *raft.InmemStore, log *raft.Log) { log.Type = raft.LogNoop },
		"index":     func(_ *raft.InmemStore, log *raft.Log) { log.Index++ },
		"truncated": func(_ *raft.InmemStore, log *raft.Log) { log.Data = log.Data[:len(log.Data)-1] },
		"empty":     func(_ *raft.InmemStore, log *raft.Log) { log.Data = nil },
		"plain":     func(_ *raft.InmemStore, log *raft.Log) { log.Data = []byte{1, 0} },
		"other": func(inner *raft.InmemStore, log *raft.Log) {
			var other raft.Log
			inner.GetLog(log.Index+1, &other)
			log.Data = other.Data
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := open(t, t.TempDir())
			inner := raft.NewInmemStore()
			log, _, err := OpenLog(inner, v.Keys, filepath.Join(t.TempDir(), "mark"), v.Disk)
			if err != nil {
				t.Fatal(err)
			}
			defer log.close()
			store(t, log, entries(1, 5, 1))
			var stored raft.Log
			inner.GetLog(4, &stored)
			change(inner, &stored)
			index := stored.Index
			stored.Index = 4
			if err := inner.StoreLog(&stored); err != nil {
				t.Fatal(err)
			}
			stored.Index = index // InmemStore keeps the pointer
			var got raft.Log
			err = log.GetLog(4, &got)
			wantIs(t, err, ErrCorrupt)
			var c *CorruptError
			if !errors.As(err, &c) || c.Index != 4 {
				t.Fatalf("no index in %v", err)
			}
			_, err = Verify(context.Background(), log, v.Snapshots)
			wantIs(t, err, ErrCorrupt)
		})
	}
}

// TestUpgrade: a log that was written without seals goes on, sealed.
func TestUpgrade(t *testing.T) {
	dir := t.TempDir()
	bolt, err := raftboltdb.NewBoltStore(filepath.Join(dir, logFile))
	if err != nil {
		t.Fatal(err)
	}
	store(t, bolt, entries(1, 50, 1))
	if err := errors.Join(bolt.SetUint64([]byte("CurrentTerm"), 9), bolt.Close()); err != nil {
		t.Fatal(err)
	}
	v := open(t, dir)
	store(t, v.Log, entries(51, 80, 1))
	v.Close()
	v = open(t, dir)
	if term, err := v.Stable.GetUint64([]byte("CurrentTerm")); term != 9 || err != nil {
		t.Fatal(term, err)
	}
	wantEntries(t, v.Log, entries(1, 80, 1))
	if r := verify(t, v); r.Plain != 50 || r.Entries != 80 {
		t.Fatalf("%+v", r)
	}
	// What overwrites plain entries is sealed, and then nothing in the clear is accepted there.
	if err := v.Log.DeleteRange(31, 80); err != nil {
		t.Fatal(err)
	}
	store(t, v.Log, entries(31, 60, 2))
	v.Close()
	v = open(t, dir)
	if r := verify(t, v); r.Plain != 30 || r.Entries != 60 {
		t.Fatalf("%+v", r)
	}
	if err := v.bolt.StoreLog(entryOf(40, 2)); err != nil {
		t.Fatal(err)
	}
	wantIs(t, v.Log.GetLog(40, new(raft.Log)), ErrCorrupt)
}

// TestLostFiles: a folder in which one of the files is missing is not taken for a new one.
func TestLostFiles(t *testing.T) {
	for name, want := range map[string]error{
		logFile: ErrCorrupt, markFile: ErrCorrupt,
		"keys/keyring.json": ErrCorrupt, "keys/master.key": ErrMasterKey, "keys": ErrCorrupt,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			v := open(t, dir)
			store(t, v.Log, entries(1, 5, 1))
			v.Close()
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
			_, err := Open(Config{Dir: dir})
			wantIs(t, err, want)
		})
	}
}

// TestOldPages: data that were true once, and are not any more.
func TestOldPages(t *testing.T) {
	t.Run("vote", func(t *testing.T) {
		dir := t.TempDir()
		v := open(t, dir)
		old, err := v.bolt.Get(stableKey)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Stable.SetUint64([]byte("CurrentTerm"), 9); err != nil {
			t.Fatal(err)
		}
		if err := v.bolt.Set(stableKey, old); err != nil {
			t.Fatal(err)
		}
		v.Close()
		_, err = Open(Config{Dir: dir})
		wantIs(t, err, ErrCorrupt)
	})
	t.Run("entries", func(t *testing.T) {
		v := open(t, t.TempDir())
		store(t, v.Log, entries(1, 10, 1))
		var old raft.Log
		if err := v.bolt.GetLog(8, &old); err != nil {
			t.Fatal(err)
		}
		if err := v.Log.DeleteRange(7, 10); err != nil {
			t.Fatal(err)
		}
		store(t, v.Log, entries(7, 12, 2))
		verify(t, v)
		if err := v.bolt.StoreLog(&old); err != nil {
			t.Fatal(err)
		}
		_, err := v.Verify(context.Background())
		wantIs(t, err, ErrCorrupt)
	})
	t.Run("end", func(t *testing.T) {
		dir := t.TempDir()
		v := open(t, dir)
		store(t, v.Log, entries(1, 10, 1))
		if err := v.bolt.DeleteRange(10, 10); err != nil {
			t.Fatal(err)
		}
		v.Close()
		_, err := Open(Config{Dir: dir})
		wantIs(t, err, ErrCorrupt)
	})
	t.Run("gap", func(t *testing.T) {
		v := open(t, t.TempDir())
		store(t, v.Log, entries(1, 10, 1))
		if err := v.bolt.DeleteRange(5, 5); err != nil {
			t.Fatal(err)
		}
		_, err := v.Verify(context.Background())
		wantIs(t, err, ErrCorrupt)
	})
	t.Run("snapshot", func(t *testing.T) {
		v := open(t, t.TempDir())
		takeSnapshot(t, v.Snapshots, 5, 10)
		store(t, v.Log, entries(7, 10, 1))
		_, err := v.Verify(context.Background())
		wantIs(t, err, ErrCorrupt)
	})
}

func TestNonces(t *testing.T) {
	v := open(t, t.TempDir())
	seen := map[string]bool{}
	for range 3 {
		for range 100 {
			box, err := v.Keys.seal(newBox(0), nil)
			if err != nil {
				t.Fatal(err)
			}
			if nonce := string(box[:boxHeader]); seen[nonce] {
				t.Fatal("a nonce was used twice")
			} else {
				seen[nonce] = true
			}
		}
		v.Keys.writer.messages = maxMessages // it retires
	}
	if n := binary.BigEndian.Uint64(must(v.Keys.seal(newBox(0), nil))[boxHeader-8:]); n != 0 {
		t.Fatalf("the counter of a new subkey begins at %d", n)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// BenchmarkStoreLogs compares sealed and plain appends on the same bbolt, and on a
// store that does nothing, which shows the cost of sealing alone.
func BenchmarkStoreLogs(b *testing.B) {
	for _, size := range []int{200, 16 << 10, 1 << 20} {
		for _, kind := range []string{"bolt/plain", "bolt/sealed", "nothing/sealed"} {
			b.Run(fmt.Sprintf("%s/%d", kind, size), func(b *testing.B) {
				v := open(b, b.TempDir())
				var log raft.LogStore = v.Log
				switch kind {
				case "bolt/plain":
					log = v.bolt
				case "nothing/sealed":
					v.Log.inner = nothing{v.bolt}
				}
				data := make([]byte, size)
				b.SetBytes(int64(size) * 4)
				b.ReportAllocs()
				index := uint64(0)
				for b.Loop() {
					batch := make([]*raft.Log, 4)
					for i := range batch {
						index++
						batch[i] = &raft.Log{Index: index, Term: 1, Data: data}
					}
					if err := log.StoreLogs(batch); err != nil {
						b.Fatal(err)
					}
					if index%400 == 0 { // as compaction does
						b.StopTimer()
						v.bolt.DeleteRange(1, index-4)
						b.StartTimer()
					}
				}
			})
		}
	}
}

type nothing struct{ Inner }

func (nothing) StoreLogs([]*raft.Log) error { return nil }

func BenchmarkGetLog(b *testing.B) {
	for _, size := range []int{200, 16 << 10, 1 << 20} {
		for _, kind := range []string{"plain", "sealed"} {
			b.Run(fmt.Sprintf("%s/%d", kind, size), func(b *testing.B) {
				v := open(b, b.TempDir())
				var log raft.LogStore = v.Log
				if kind == "plain" {
					log = v.bolt
				}
				if err := log.StoreLog(&raft.Log{Index: 1, Term: 1, Data: make([]byte, size)}); err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if err := log.GetLog(1, new(raft.Log)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// TestSetAside: a damaged folder is set aside, and a new start begins with nothing.
func TestSetAside(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	store(t, v.Log, entries(1, 50, 1))
	takeSnapshot(t, v.Snapshots, 20, 100)
	v.Close()
	damage(t, filepath.Join(dir, logFile), 4096+20, 1) // a meta
	_, err := Open(Config{Dir: dir})
	wantIs(t, err, ErrCorrupt)
	aside, err := SetAside(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{logFile, markFile, snapshotsDir} {
		if _, err := os.Stat(filepath.Join(aside, name)); err != nil {
			t.Error(err)
		}
	}
	v = open(t, dir)
	if r := verify(t, v); r.Entries != 0 || r.Snapshot != nil {
		t.Fatalf("%+v", r)
	}
	store(t, v.Log, entries(1, 5, 7))
	// A crash in the middle of it: the mark stayed behind, or the log without its end.
	v.Close()
	if err := os.Rename(filepath.Join(dir, logFile), filepath.Join(aside, "moved")); err != nil {
		t.Fatal(err)
	}
	_, err = Open(Config{Dir: dir})
	wantIs(t, err, ErrCorrupt)
	if _, err := SetAside(dir); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
}
