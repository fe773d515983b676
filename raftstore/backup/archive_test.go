package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"filippo.io/age"
	"github.com/google/go-cmp/cmp"

	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/state"
)

func TestSaveVerify(t *testing.T) {
	k := newKey(t)
	second := newKey(t)
	both := backup.Protection{Recipients: append(k.Recipients, second.Recipients...)}
	data := save(t, source(), both)
	if bytes.Contains(data, []byte(marker)) {
		t.Fatal("a secret can be read in the archive")
	}
	git := map[string][]byte{}
	check := func(_ context.Context, s *state.State, name string, r io.Reader) (err error) {
		if s.Revision() != cluster().Revision() {
			return errors.New("another state")
		}
		git[name], err = io.ReadAll(r)
		return err
	}
	for _, keys := range []backup.Keys{k.Keys, second.Keys} {
		report, err := backup.Verify(t.Context(), iotest.OneByteReader(bytes.NewReader(data)), keys, check)
		if err != nil {
			t.Fatal(err)
		}
		m := report.Manifest
		if m.ClusterID != cluster().Settings().ClusterID || m.Revision != cluster().Revision() || m.Index != cluster().Index() || !m.Created.Equal(now) || m.Version != "v1" {
			t.Errorf("manifest %+v", m)
		}
		if want := []string{"state", "git/cluster", "git/empty", "git/shop"}; !cmp.Equal(m.Parts, want) {
			t.Errorf("parts %q, want %q", m.Parts, want)
		}
		if !report.Encrypted || report.Recipients != 2 || report.Passphrase || report.Objects < objects || len(report.Unchecked) > 0 {
			t.Errorf("report %+v", report)
		}
		if len(report.Sums) != 4 || report.Sums[1].Size != int64(len(big())) {
			t.Errorf("sums %+v", report.Sums)
		}
		if !bytes.Equal(git["cluster"], big()) || len(git["empty"]) != 0 || string(git["shop"]) != "objects and refs" {
			t.Error("the repositories are not what was exported")
		}
	}
	if _, err := backup.Verify(t.Context(), bytes.NewReader(data), newKey(t).Keys, nil); !errors.As(err, new(*age.NoIdentityMatchError)) {
		t.Errorf("with another key: %v", err)
	}
	if _, err := backup.Verify(t.Context(), bytes.NewReader(data), backup.Keys{}, nil); !errors.Is(err, backup.ErrEncrypted) {
		t.Errorf("without a key: %v", err)
	}
	t.Logf("%d objects, %d bytes of Git: %d bytes", objects, len(big()), len(data))
}

func TestInspect(t *testing.T) {
	k := newKey(t)
	data := save(t, small(), k.Protection)
	info, err := backup.Inspect(bytes.NewReader(data), backup.Keys{})
	if err != nil || !info.Encrypted || info.Recipients != 1 || info.Passphrase || info.Manifest != nil {
		t.Errorf("without the key: %+v, %v", info, err)
	}
	info, err = backup.Inspect(bytes.NewReader(data), k.Keys)
	if err != nil || info.Manifest == nil || info.Manifest.ClusterID != "small" {
		t.Errorf("with the key: %+v, %v", info, err)
	}
	info, err = backup.Inspect(bytes.NewReader(save(t, small(), plain)), backup.Keys{})
	if err != nil || info.Encrypted || info.Manifest == nil {
		t.Errorf("plain: %+v, %v", info, err)
	}
	if _, err = backup.Inspect(bytes.NewReader(save(t, small(), plain)), k.Keys); !errors.Is(err, backup.ErrNotEncrypted) {
		t.Errorf("a plain archive in the place of an encrypted one: %v", err)
	}
	for _, text := range []string{"", "x", "age-encryption.org/v1\n", "age-encryption.org/v1\n-> X25519 ", strings.Repeat("0123456789", 10_000)} {
		if _, err := backup.Inspect(strings.NewReader(text), backup.Keys{}); !errors.Is(err, backup.ErrCorrupt) {
			t.Errorf("%.30q: %v", text, err)
		}
	}
}

func TestPassphrase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(path, []byte("correct horse\r\nmore\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	to, by, err := backup.Passphrase(path)
	if err != nil {
		t.Fatal(err)
	}
	to.(*age.ScryptRecipient).SetWorkFactor(10)
	data := save(t, small(), backup.Protection{Recipients: []age.Recipient{to}})
	report, err := backup.Verify(t.Context(), bytes.NewReader(data), backup.Keys{Identities: []age.Identity{by}}, nil)
	if err != nil || !report.Passphrase || report.Recipients != 0 {
		t.Errorf("report %+v, %v", report, err)
	}
	if _, err := backup.Save(t.Context(), io.Discard, small(), backup.Protection{Recipients: append(newKey(t).Recipients, to)}); err == nil {
		t.Error("a passphrase beside a recipient was accepted")
	}
}

func TestProtection(t *testing.T) {
	for _, p := range []backup.Protection{{}, {Plaintext: true, Recipients: newKey(t).Recipients}} {
		var b bytes.Buffer
		if _, err := backup.Save(t.Context(), &b, small(), p); err == nil || b.Len() > 0 {
			t.Errorf("%+v: %d bytes, %v", p, b.Len(), err)
		}
	}
	for _, key := range []string{"age1nonsense", "AGE-SECRET-KEY-1QQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQ", "", "ssh-ed25519 AAAA"} {
		_, err := backup.Recipients(key)
		if err == nil {
			t.Errorf("%q was taken for a recipient", key)
		} else if strings.Contains(err.Error(), "QQQQ") {
			t.Errorf("the error shows a private key: %v", err)
		}
	}
}

// TestDamage cuts archives off at every length and flips a bit of every byte: small
// ones completely, the big one at samples.
func TestDamage(t *testing.T) {
	k := newKey(t)
	for name, c := range map[string]struct {
		src  backup.Source
		p    backup.Protection
		keys backup.Keys
		step int
	}{
		"small, encrypted": {small(), k.Protection, k.Keys, 1},
		"small, plain":     {small(), plain, backup.Keys{}, 1},
		"big, encrypted":   {source(), k.Protection, k.Keys, 400_009},
		"big, plain":       {source(), plain, backup.Keys{}, 400_009},
	} {
		t.Run(name, func(t *testing.T) {
			data := save(t, c.src, c.p)
			if _, err := backup.Verify(t.Context(), bytes.NewReader(data), c.keys, nil); err != nil {
				t.Fatal(err)
			}
			bad := func(what string, data []byte) {
				t.Helper()
				if _, err := backup.Verify(t.Context(), bytes.NewReader(data), c.keys, nil); err == nil {
					t.Errorf("%s was not noticed", what)
				} else if !errors.Is(err, backup.ErrCorrupt) && !errors.As(err, new(*age.NoIdentityMatchError)) && !errors.Is(err, backup.ErrNotEncrypted) {
					t.Errorf("%s: %v", what, err)
				}
			}
			for i := 0; i < len(data); i += c.step {
				bad(fmt.Sprintf("cut off at %d of %d", i, len(data)), data[:i])
				flipped := bytes.Clone(data)
				flipped[i] ^= 1 << (i % 8)
				bad(fmt.Sprintf("bit %d of byte %d", i%8, i), flipped)
			}
			for _, i := range []int{1, 16, 39, 40, 41, 80, 160, 512} { // around the seal and the last sums
				bad(fmt.Sprintf("cut off %d before the end", i), data[:len(data)-i])
			}
			bad("a byte at the end", append(bytes.Clone(data), 0))
			bad("another archive at the end", append(bytes.Clone(data), data...))
		})
	}
}

// TestSourceFails tells a source that cannot be read from one that is damaged.
func TestSourceFails(t *testing.T) {
	k := newKey(t)
	broken := errors.New("the disk broke")
	for _, c := range []struct {
		p    backup.Protection
		keys backup.Keys
	}{{k.Protection, k.Keys}, {plain, backup.Keys{}}} {
		data := save(t, source(), c.p)
		for _, n := range []int{0, 10, 100, 1 << 20, len(data) - 1, len(data)} {
			r := io.MultiReader(bytes.NewReader(data[:n]), iotest.ErrReader(broken))
			_, err := backup.Verify(t.Context(), r, c.keys, nil)
			if !errors.Is(err, broken) || errors.Is(err, backup.ErrCorrupt) {
				t.Errorf("after %d of %d bytes: %v", n, len(data), err)
			}
		}
	}
}

// failing is a repository whose export breaks in the middle.
type failing struct{ repositories }

var errExport = errors.New("object missing")

func (f failing) Export(_ context.Context, _ string, w io.Writer) error {
	_, err := w.Write(big())
	return errors.Join(err, errExport)
}

func TestSaveFails(t *testing.T) {
	k := newKey(t)
	src := source()
	src.Repositories = failing{src.Repositories.(repositories)}
	for _, c := range []struct {
		p    backup.Protection
		keys backup.Keys
	}{{k.Protection, k.Keys}, {plain, backup.Keys{}}} {
		var b bytes.Buffer
		if _, err := backup.Save(t.Context(), &b, src, c.p); !errors.Is(err, errExport) {
			t.Fatalf("save: %v", err)
		}
		if _, err := backup.Verify(t.Context(), &b, c.keys, nil); !errors.Is(err, backup.ErrCorrupt) {
			t.Errorf("what a failed save wrote: %v", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := backup.Save(ctx, io.Discard, source(), plain); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	src.Repositories = repositories{"../evil": nil}
	if _, err := backup.Save(t.Context(), io.Discard, src, plain); err == nil {
		t.Error("a repository that leads out of its folder was saved")
	}
}

func TestReseal(t *testing.T) {
	k := newKey(t)
	data := save(t, source(), plain)
	var b bytes.Buffer
	report, err := backup.Reseal(t.Context(), &b, bytes.NewReader(data), k.Protection)
	if err != nil || !report.Encrypted || report.Manifest.Revision != cluster().Revision() {
		t.Fatalf("report %+v, %v", report, err)
	}
	if _, err := backup.Verify(t.Context(), &b, k.Keys, nil); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("connection lost")
	for _, c := range []struct {
		r    io.Reader
		want error
	}{
		{bytes.NewReader(data[:len(data)-1]), backup.ErrCorrupt},
		{bytes.NewReader(data[:len(data)/2]), backup.ErrCorrupt},
		{io.MultiReader(bytes.NewReader(data[:len(data)/2]), iotest.ErrReader(broken)), broken},
		{strings.NewReader("no archive at all"), backup.ErrCorrupt},
	} {
		var b bytes.Buffer
		if _, err := backup.Reseal(t.Context(), &b, c.r, k.Protection); !errors.Is(err, c.want) {
			t.Errorf("got %v, want %v", err, c.want)
		}
		if _, err := backup.Verify(t.Context(), &b, k.Keys, nil); err == nil {
			t.Error("an incomplete copy was taken for a complete one")
		}
	}
}

// TestSaveMemory holds that a snapshot is streamed: one of 64 MiB takes a few MiB.
func TestSaveMemory(t *testing.T) {
	src := source()
	src.Repositories = huge{}
	k := newKey(t)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	w := &peakWriter{}
	if _, err := backup.Save(t.Context(), w, src, k.Protection); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	allocated := after.TotalAlloc - before.TotalAlloc
	t.Logf("%d bytes written, %d allocated in total", w.n, allocated)
	if w.n < hugeSize || allocated > hugeSize {
		t.Errorf("a snapshot of %d bytes allocated %d bytes", w.n, allocated)
	}
}

const hugeSize = 64 << 20

type huge struct{}

func (huge) Names() ([]string, error) { return []string{"huge"}, nil }

func (huge) Export(_ context.Context, _ string, w io.Writer) error {
	for n := 0; n < hugeSize; n += len(big()) {
		if _, err := w.Write(big()); err != nil {
			return err
		}
	}
	return nil
}

type peakWriter struct{ n int }

func (p *peakWriter) Write(b []byte) (int, error) { p.n += len(b); return len(b), nil }
