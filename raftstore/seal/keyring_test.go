package seal

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// TestRotation: entries, snapshots and votes of several keys are read, and a key goes
// when the last of them has gone.
func TestRotation(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	rotate := func(epoch uint64) {
		t.Helper()
		if err := v.Rotate(epoch); err != nil {
			t.Fatal(err)
		}
	}
	prune := func(want, left int) {
		t.Helper()
		if n, err := v.Prune(); n != want || err != nil || len(v.Keys.Keys()) != left {
			t.Fatalf("%d keys were pruned, want %d, %d are left, want %d: %v", n, want, len(v.Keys.Keys()), left, err)
		}
	}
	store(t, v.Log, entries(1, 20, 1))
	rotate(1)
	rotate(1)
	store(t, v.Log, entries(21, 40, 1))
	takeSnapshot(t, v.Snapshots, 30, 10) // with the key of epoch 1
	rotate(2)
	rotate(1) // late
	if v.Keys.Epoch() != 2 || len(v.Keys.Keys()) != 3 {
		t.Fatal(v.Keys.Epoch(), v.Keys.Keys())
	}
	store(t, v.Log, entries(41, 60, 1))
	v.Close()
	v = open(t, dir)
	wantEntries(t, v.Log, entries(1, 60, 1))
	verify(t, v)
	prune(0, 3)
	if err := v.Log.DeleteRange(1, 20); err != nil {
		t.Fatal(err)
	}
	prune(1, 2)
	if err := v.Log.DeleteRange(21, 40); err != nil {
		t.Fatal(err)
	}
	prune(0, 2) // the snapshot
	sink, err := v.Snapshots.Create(1, 50, 1, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	rotate(3)
	takeSnapshot(t, v.Snapshots, 55, 10)
	takeSnapshot(t, v.Snapshots, 56, 10)
	if err := v.Log.DeleteRange(41, 60); err != nil {
		t.Fatal(err)
	}
	prune(1, 2) // epoch 1; the snapshot that is being written needs epoch 2
	if err := sink.Cancel(); err != nil {
		t.Fatal(err)
	}
	prune(1, 1)
	v.Close()
	v = open(t, dir)
	verify(t, v)
	if v.Keys.Epoch() != 3 {
		t.Fatal(v.Keys.Epoch())
	}
}

func TestRotateMaster(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(t.TempDir(), "elsewhere", "master")
	v, err := Open(Config{Dir: dir, MasterKey: path})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	store(t, v.Log, entries(1, 20, 1))
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Keys.RotateMaster(); err != nil {
		t.Fatal(err)
	}
	if err := v.Keys.Rotate(1); err != nil { // wrapped with the new one
		t.Fatal(err)
	}
	store(t, v.Log, entries(21, 40, 1))
	v.Close()
	if v, err = Open(Config{Dir: dir, MasterKey: path}); err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	wantEntries(t, v.Log, entries(1, 40, 1))
	v.Close()
	if now, _ := os.ReadFile(path); bytes.Equal(now, old) {
		t.Fatal("the master key is the same")
	}
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(Config{Dir: dir, MasterKey: path})
	wantIs(t, err, ErrMasterKey)
}

func TestMasterKeyRefused(t *testing.T) {
	for _, c := range []struct {
		name, says string
		change     func(path string) error
	}{
		{"readable by the group", "chmod 600", func(p string) error { return os.Chmod(p, 0o640) }},
		{"readable by all", "chmod 600", func(p string) error { return os.Chmod(p, 0o604) }},
		{"missing", "put back the file", os.Remove},
		{"short", "31 bytes", func(p string) error { return os.Truncate(p, 31) }},
		{"another", "put back the file that belongs", func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte{7}, 32), 0o600) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if _, err := OpenKeyring(dir, ""); err != nil {
				t.Fatal(err)
			}
			if err := c.change(filepath.Join(dir, "master.key")); err != nil {
				t.Fatal(err)
			}
			_, err := OpenKeyring(dir, "")
			wantIs(t, err, ErrMasterKey)
			if !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%q does not say %q", err, c.says)
			}
		})
	}
}

// TestKeyringFlips flips every byte of keyring.json: it is refused, or says the same.
func TestKeyringFlips(t *testing.T) {
	dir := t.TempDir()
	k, err := OpenKeyring(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Rotate(3); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(k.path)
	if err != nil {
		t.Fatal(err)
	}
	accepted := 0
	for at := range whole {
		data := bytes.Clone(whole)
		data[at] ^= 1 << (at % 7)
		if err := os.WriteFile(k.path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := OpenKeyring(dir, "")
		if err != nil {
			continue
		}
		accepted++
		same := func(a, b *dataKey) bool { return a.id == b.id && a.epoch == b.epoch && bytes.Equal(a.key, b.key) }
		if !slices.EqualFunc(k.keys, got.keys, same) {
			t.Fatalf("with byte %d flipped the keys are others", at)
		}
	}
	if accepted > len(whole)/5 {
		t.Fatalf("%d of %d flips were accepted", accepted, len(whole))
	}
}
