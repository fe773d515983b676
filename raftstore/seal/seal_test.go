package seal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if child() {
		return
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, dir string) *Vault {
	t.Helper()
	v, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

// entryOf is the entry that tests store at an index: its content follows from it.
func entryOf(index, term uint64) *raft.Log {
	r := rand.New(rand.NewPCG(index, term))
	data := make([]byte, 1+r.IntN(3000))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	data[0] = 1
	log := &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: data, AppendedAt: time.Unix(0, int64(index)*1e9)}
	switch index % 7 {
	case 3:
		log.Type, log.Data = raft.LogNoop, nil
	case 5:
		log.Extensions = []byte("extension")
	}
	return log
}

func entries(first, last, term uint64) (list []*raft.Log) {
	for i := first; i <= last; i++ {
		list = append(list, entryOf(i, term))
	}
	return list
}

// store appends in batches of ten, as a busy server does.
func store(t testing.TB, log raft.LogStore, list []*raft.Log) {
	t.Helper()
	for len(list) > 0 {
		n := min(10, len(list))
		if err := log.StoreLogs(list[:n]); err != nil {
			t.Fatal(err)
		}
		list = list[n:]
	}
}

func sameEntry(got, want *raft.Log) error {
	if got.Index != want.Index || got.Term != want.Term || got.Type != want.Type || !bytes.Equal(got.Data, want.Data) ||
		!bytes.Equal(got.Extensions, want.Extensions) || !got.AppendedAt.Equal(want.AppendedAt) {
		return fmt.Errorf("entry %d is not what was stored: %v of %d bytes, term %d", want.Index, got.Type, len(got.Data), got.Term)
	}
	return nil
}

func wantEntries(t testing.TB, log raft.LogStore, list []*raft.Log) {
	t.Helper()
	for _, want := range list {
		var got raft.Log
		if err := log.GetLog(want.Index, &got); err != nil {
			t.Fatal(err)
		}
		if err := sameEntry(&got, want); err != nil {
			t.Fatal(err)
		}
	}
}

func snapshotContent(index uint64, size int) []byte {
	r := rand.NewChaCha8([32]byte{byte(index)})
	b := make([]byte, size)
	r.Read(b)
	return b
}

func takeSnapshot(t testing.TB, s raft.SnapshotStore, index uint64, size int) string {
	t.Helper()
	sink, err := s.Create(1, index, 1, raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a:1"}}}, 1, nil)
	if err == nil {
		_, err = io.Copy(sink, bytes.NewReader(snapshotContent(index, size)))
	}
	if err == nil {
		err = sink.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return sink.ID()
}

func readSnapshot(s raft.SnapshotStore, id string) (*raft.SnapshotMeta, []byte, error) {
	meta, r, err := s.Open(id)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return meta, b, err
}

func wantIs(t testing.TB, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("got error %v, want one that matches %q", err, target)
	}
}

func verify(t testing.TB, v *Vault) Report {
	t.Helper()
	r, err := v.Verify(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// contains reports whether any file below dir holds the text.
func contains(t *testing.T, dir string, text []byte) string {
	t.Helper()
	found := ""
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, text) {
			found = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func takeSnapshotOf(t testing.TB, s raft.SnapshotStore, index uint64, content []byte) {
	t.Helper()
	sink, err := s.Create(1, index, 1, raft.Configuration{}, 1, nil)
	if err == nil {
		_, err = sink.Write(content)
	}
	if err == nil {
		err = sink.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

var configuration = raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a:1"}}}
