package backup_test

import (
	"bytes"
	"io"
	"path/filepath"
	"testing"

	"decree.dev/decree/raftstore/backup"
)

// The figures are for 10,000 objects and 3 MiB of Git.

func BenchmarkSave(b *testing.B) {
	src, k := source(), newKey(b)
	b.SetBytes(stateSize(b))
	for b.Loop() {
		if _, err := backup.Save(b.Context(), io.Discard, src, k.Protection); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	k := newKey(b)
	data := save(b, source(), k.Protection)
	b.SetBytes(stateSize(b))
	for b.Loop() {
		if _, err := backup.Verify(b.Context(), bytes.NewReader(data), k.Keys, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRestore(b *testing.B) {
	k := newKey(b)
	data := save(b, source(), k.Protection)
	b.SetBytes(stateSize(b))
	for b.Loop() {
		if _, err := backup.Restore(b.Context(), bytes.NewReader(data), k.Keys, restoring(filepath.Join(b.TempDir(), "data"))); err != nil {
			b.Fatal(err)
		}
	}
}

// stateSize is how many bytes state and repositories have.
func stateSize(b *testing.B) int64 {
	n, err := cluster().WriteTo(io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	return n + int64(len(big()))
}
