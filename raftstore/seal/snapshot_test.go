package seal

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
)

func TestSnapshotSizes(t *testing.T) {
	v := open(t, t.TempDir())
	for i, size := range []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 3 * chunkSize, 3*chunkSize + 7} {
		id := takeSnapshot(t, v.Snapshots, uint64(i+1), size)
		meta, content, err := readSnapshot(v.Snapshots, id)
		if err != nil || !bytes.Equal(content, snapshotContent(uint64(i+1), size)) {
			t.Fatalf("size %d: read %d bytes, %v", size, len(content), err)
		}
		if meta.Size != int64(size) || meta.Index != uint64(i+1) || meta.Configuration.Servers[0].Address != "a:1" {
			t.Fatalf("%+v", meta)
		}
	}
	list, err := v.Snapshots.List()
	if err != nil || len(list) != 2 || list[0].Index != 7 || list[1].Index != 6 {
		t.Fatalf("listed %v, %v", list, err)
	}
	if files, _ := os.ReadDir(v.Snapshots.dir); len(files) != 2 {
		t.Fatalf("%d files are left", len(files))
	}
	if _, _, err := v.Snapshots.Open("1-1-1"); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

func TestSnapshotCancel(t *testing.T) {
	v := open(t, t.TempDir())
	sink, err := v.Snapshots.Create(1, 5, 1, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	sink.Write(make([]byte, 2*chunkSize))
	if err := sink.Cancel(); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err == nil {
		t.Fatal("a cancelled snapshot was finished")
	}
	if _, err := sink.Write([]byte("x")); err == nil {
		t.Fatal("a cancelled snapshot can be written")
	}
	if files, _ := os.ReadDir(v.Snapshots.dir); len(files) != 0 {
		t.Fatalf("%d files are left", len(files))
	}
}

// TestSnapshotUpgrade: snapshots of raft's own store are read and retire in turn.
func TestSnapshotUpgrade(t *testing.T) {
	dir := t.TempDir()
	old, err := raft.NewFileSnapshotStore(dir, 2, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	_, transport := raft.NewInmemTransport("")
	for i := range uint64(2) {
		sink, err := old.Create(1, 10+i, 1, raft.Configuration{}, 1, transport)
		if err != nil {
			t.Fatal(err)
		}
		sink.Write(snapshotContent(10+i, 100))
		if err := sink.Close(); err != nil {
			t.Fatal(err)
		}
	}
	v := open(t, dir)
	list, err := v.Snapshots.List()
	if err != nil || len(list) != 2 || list[0].Index != 11 || list[0].Size != 100 {
		t.Fatal(list, err)
	}
	meta, content, err := readSnapshot(v.Snapshots, list[0].ID)
	if err != nil || !bytes.Equal(content, snapshotContent(11, 100)) || meta.Index != 11 {
		t.Fatal(err)
	}
	verify(t, v)
	damage(t, filepath.Join(dir, snapshotsDir, list[0].ID, "state.bin"), 50, 1)
	_, err = v.Verify(context.Background())
	wantIs(t, err, ErrCorrupt)
	takeSnapshot(t, v.Snapshots, 12, 100)
	takeSnapshot(t, v.Snapshots, 13, 100)
	if list, err = v.Snapshots.List(); err != nil || len(list) != 2 || list[1].Index != 12 {
		t.Fatal(list, err)
	}
	verify(t, v)
}

// damage flips bits of a byte.
func damage(t testing.TB, path string, at int64, bits byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= bits
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotFlips flips each byte of the header and many others, cuts the file at
// many lengths, makes it longer and swaps chunks. What is handed out is always a
// beginning of what was written, and the end of it comes only if all is right.
func TestSnapshotFlips(t *testing.T) {
	v := open(t, t.TempDir())
	const size = 3*chunkSize + 100
	id := takeSnapshot(t, v.Snapshots, 5, size)
	path := filepath.Join(v.Snapshots.dir, id+snapshotSuffix)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	content := snapshotContent(5, size)
	try := func(what string, at int, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, got, err := readSnapshot(v.Snapshots, id)
		if !errors.Is(err, ErrCorrupt) {
			t.Fatalf("%s at %d: got error %v", what, at, err)
		}
		if len(got) == size || !bytes.HasPrefix(content, got) {
			t.Fatalf("%s at %d: %d wrong bytes were handed out", what, at, len(got))
		}
		_, err = v.Verify(context.Background())
		wantIs(t, err, ErrCorrupt)
	}
	header := len(whole) - size - 4*boxTag
	for at := 0; at < len(whole); at++ {
		data := bytes.Clone(whole)
		data[at] ^= 1 << (at % 8)
		try("flip", at, data)
		if at > header+20 {
			at += 1999
		}
	}
	for at := 0; at < len(whole); at += 997 {
		try("cut", at, whole[:at])
	}
	for n := range 3 {
		try("cut", n, whole[:header+n*sealedChunk])
		try("longer", n, append(bytes.Clone(whole), make([]byte, 1+n*sealedChunk)...))
	}
	swapped := bytes.Clone(whole)
	copy(swapped[header:], whole[header+sealedChunk:header+2*sealedChunk])
	copy(swapped[header+sealedChunk:], whole[header:header+sealedChunk])
	try("swap", 0, swapped)
	// The same file under the name of another snapshot.
	if err := errors.Join(os.WriteFile(path, whole, 0o600), os.Rename(path, filepath.Join(v.Snapshots.dir, "1-9-1"+snapshotSuffix))); err != nil {
		t.Fatal(err)
	}
	_, err = v.Snapshots.List()
	wantIs(t, err, ErrCorrupt)
}

// TestSnapshotMemory: a snapshot of 64 MiB is written and read with little memory.
func TestSnapshotMemory(t *testing.T) {
	v := open(t, t.TempDir())
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	sink, err := v.Snapshots.Create(1, 5, 1, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<20)
	for range 64 {
		if _, err := sink.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	r := verify(t, v)
	runtime.ReadMemStats(&after)
	if r.SnapshotBytes != 64<<20 {
		t.Fatal(r.SnapshotBytes)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 4<<20 {
		t.Fatalf("%d bytes were allocated", used)
	}
}

func BenchmarkSnapshot(b *testing.B) {
	v := open(b, b.TempDir())
	block := make([]byte, 256<<10)
	old, err := raft.NewFileSnapshotStore(b.TempDir(), 2, io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	_, transport := raft.NewInmemTransport("")
	for _, kind := range []struct {
		name  string
		store raft.SnapshotStore
	}{{"sealed", v.Snapshots}, {"plain", old}} {
		b.Run(kind.name, func(b *testing.B) {
			b.SetBytes(32 << 20)
			for b.Loop() {
				sink, err := kind.store.Create(1, 5, 1, raft.Configuration{}, 1, transport)
				if err != nil {
					b.Fatal(err)
				}
				for range 128 {
					sink.Write(block)
				}
				if err := sink.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestSnapshotLeftovers(t *testing.T) {
	dir := t.TempDir()
	v := open(t, dir)
	id := takeSnapshot(t, v.Snapshots, 5, 10)
	v.Close()
	at := filepath.Join(dir, snapshotsDir)
	if err := errors.Join(os.Mkdir(filepath.Join(at, "1-7-5.tmp"), 0o700), os.WriteFile(filepath.Join(at, "1-8-5.sealed.tmp"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	files, err := os.ReadDir(at)
	if err != nil || len(files) != 1 || !slices.ContainsFunc(files, func(e os.DirEntry) bool { return e.Name() == id+snapshotSuffix }) {
		t.Fatal(files, err)
	}
}
