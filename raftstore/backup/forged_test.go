package backup_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"decree.dev/decree/raftstore/backup"
)

// member is a file in an archive; name and content can be anything.
type member struct {
	name, content string
	kind          byte
}

// forge makes an archive with a good seal from any members.
func forge(t *testing.T, members []member) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Typeflag: m.kind, Size: int64(len(m.content))}
		if m.kind != tar.TypeReg {
			h.Size, h.Linkname, m.content = 0, "/etc/passwd", ""
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	return append(append(b.Bytes(), 0x5d, 0x2a, 0x4d, 0x18, 32, 0, 0, 0), sum[:]...)
}

// TestForged gives what decree never writes, with a seal that fits.
func TestForged(t *testing.T) {
	var raw bytes.Buffer
	s := small().State
	if _, err := s.WriteTo(&raw); err != nil {
		t.Fatal(err)
	}
	manifest := func(change func(*backup.Manifest)) string {
		m := backup.Manifest{Format: 1, ClusterID: "small", Revision: s.Revision(), Index: s.Index(), Created: now, Parts: []string{"state", "git/a"}}
		change(&m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	sums := func(git string) string {
		return fmt.Sprintf(`[{"part":"state","size":%d,"sha256":"%x"},{"part":"git/a","size":%d,"sha256":"%x"}]`,
			raw.Len(), sha256.Sum256(raw.Bytes()), len(git), sha256.Sum256([]byte(git)))
	}
	good := func() []member {
		return []member{
			{"manifest.json", manifest(func(*backup.Manifest) {}), tar.TypeReg}, {"state/000000", raw.String(), tar.TypeReg},
			{"git/a/000000", "one", tar.TypeReg}, {"git/a/000001", "two", tar.TypeReg}, {"sums.json", sums("onetwo"), tar.TypeReg},
		}
	}
	if _, err := backup.Verify(t.Context(), bytes.NewReader(forge(t, good())), backup.Keys{}, nil); err != nil {
		t.Fatalf("what is right is refused: %v", err)
	}
	replace := func(i int, m member) []member {
		list := good()
		list[i] = m
		return list
	}
	withManifest := func(change func(*backup.Manifest)) []member {
		return replace(0, member{"manifest.json", manifest(change), tar.TypeReg})
	}
	for name, list := range map[string][]member{
		"nothing":             nil,
		"no manifest":         good()[1:],
		"manifest is no JSON": replace(0, member{"manifest.json", "{", tar.TypeReg}),
		"manifest too large":  replace(0, member{"manifest.json", strings.Repeat(" ", 5<<20) + "{}", tar.TypeReg}),
		"manifest is empty":   replace(0, member{"manifest.json", `{"format":1}`, tar.TypeReg}),
		"no sums":             good()[:4],
		"no state":            append(good()[:1], good()[2:]...),
		"a piece is missing":  append(good()[:3], good()[4:]...),
		"pieces swapped":      {good()[0], good()[1], good()[3], good()[2], good()[4]},
		"other bytes":         replace(3, member{"git/a/000001", "twa", tar.TypeReg}),
		"other sums":          replace(4, member{"sums.json", sums("onetwa"), tar.TypeReg}),
		"one more member":     append(good(), member{"more", "", tar.TypeReg}),
		"a link":              {good()[0], good()[1], {"git/a/000000", "", tar.TypeSymlink}, good()[3], {"sums.json", sums("two"), tar.TypeReg}},
		"a folder":            {good()[0], good()[1], {"git/a/000000", "", tar.TypeDir}, good()[3], {"sums.json", sums("two"), tar.TypeReg}},
		"another name":        replace(2, member{"../git/a/000000", "one", tar.TypeReg}),
		"another cluster":     withManifest(func(m *backup.Manifest) { m.ClusterID = "other" }),
		"another revision":    withManifest(func(m *backup.Manifest) { m.Revision++ }),
		"another index":       withManifest(func(m *backup.Manifest) { m.Index++ }),
		"leads out":           withManifest(func(m *backup.Manifest) { m.Parts[1] = "git/../a" }),
		"unknown part":        withManifest(func(m *backup.Manifest) { m.Parts[1] = "extra" }),
		"part twice":          withManifest(func(m *backup.Manifest) { m.Parts = append(m.Parts, "git/a") }),
		"parts in disorder":   withManifest(func(m *backup.Manifest) { m.Parts = []string{"git/a", "state"} }),
		"state is damaged":    replace(1, member{"state/000000", raw.String()[:raw.Len()-1], tar.TypeReg}),
	} {
		t.Run(name, func(t *testing.T) {
			data := forge(t, list)
			if _, err := backup.Verify(t.Context(), bytes.NewReader(data), backup.Keys{}, nil); !errors.Is(err, backup.ErrCorrupt) {
				t.Errorf("verify: %v", err)
			}
			dir := filepath.Join(t.TempDir(), "data")
			if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(dir)); !errors.Is(err, backup.ErrCorrupt) {
				t.Errorf("restore: %v", err)
			}
			noLeftovers(t, dir)
		})
	}
	data := forge(t, withManifest(func(m *backup.Manifest) { m.Format = 2 }))
	if _, err := backup.Verify(t.Context(), bytes.NewReader(data), backup.Keys{}, nil); err == nil || errors.Is(err, backup.ErrCorrupt) || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("a newer format: %v", err)
	}
}

// FuzzInspect gives any bytes to what reads archives first.
func FuzzInspect(f *testing.F) {
	f.Add([]byte("age-encryption.org/v1\n-> X25519 abc\n--- def\n"))
	var b bytes.Buffer
	if _, err := backup.Save(f.Context(), &b, small(), plain); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := backup.Verify(t.Context(), bytes.NewReader(data), backup.Keys{}, nil); err == nil && !bytes.Equal(data, b.Bytes()) {
			t.Errorf("%d bytes that nobody wrote were taken for an archive", len(data))
		}
	})
}
