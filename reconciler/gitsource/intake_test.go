package gitsource

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
)

// packBuilder writes packs by hand, also wrong ones.
type packBuilder struct {
	body  bytes.Buffer
	count uint32
}

func (p *packBuilder) offset() int64 { return 12 + int64(p.body.Len()) }

// entry writes one entry whose header declares size bytes.
func (p *packBuilder) entry(kind byte, size int, extra, data []byte) int64 {
	at := p.offset()
	n := uint64(size)
	head := []byte{kind<<4 | byte(n&0x0f)}
	for n >>= 4; n > 0; n >>= 7 {
		head[len(head)-1] |= 0x80
		head = append(head, byte(n&0x7f))
	}
	p.body.Write(head)
	p.body.Write(extra)
	w := zlib.NewWriter(&p.body)
	w.Write(data)
	w.Close()
	p.count++
	return at
}

func (p *packBuilder) object(kind plumbing.ObjectType, data []byte) plumbing.Hash {
	p.entry(byte(kind), len(data), nil, data)
	return plumbing.ComputeHash(kind, data)
}

func (p *packBuilder) bytes() []byte {
	out := append([]byte("PACK\x00\x00\x00\x02"), binary.BigEndian.AppendUint32(nil, p.count)...)
	out = append(out, p.body.Bytes()...)
	sum := sha1.Sum(out)
	return append(out, sum[:]...)
}

// offsetBack encodes how far back the base of an offset delta is.
func offsetBack(n int64) []byte {
	out := []byte{byte(n & 0x7f)}
	for n >>= 7; n > 0; n >>= 7 {
		n--
		out = append([]byte{byte(n&0x7f) | 0x80}, out...)
	}
	return out
}

// copyDelta is a delta that repeats its base so many times.
func copyDelta(base, times int) []byte {
	out := binary.AppendUvarint(nil, uint64(base))
	out = binary.AppendUvarint(out, uint64(base*times))
	for range times {
		out = append(out, 0x80|0x10|0x20|0x40, byte(base), byte(base>>8), byte(base>>16))
	}
	return out
}

func commitText(tree plumbing.Hash, parents ...plumbing.Hash) []byte {
	var b strings.Builder
	b.WriteString("tree " + tree.String() + "\n")
	for _, p := range parents {
		b.WriteString("parent " + p.String() + "\n")
	}
	b.WriteString("author A <a@b> 1700000000 +0000\ncommitter A <a@b> 1700000000 +0000\n\nx\n")
	return []byte(b.String())
}

// goodPack is a commit with a tree, a file and a delta of the file.
func goodPack() (*packBuilder, plumbing.Hash) {
	p := &packBuilder{}
	base := bytes.Repeat([]byte("hello\n"), 20)
	at := p.entry(byte(plumbing.BlobObject), len(base), nil, base)
	delta := copyDelta(len(base), 3)
	p.entry(byte(plumbing.OFSDeltaObject), len(delta), offsetBack(p.offset()-at), delta)
	one := plumbing.ComputeHash(plumbing.BlobObject, base)
	two := plumbing.ComputeHash(plumbing.BlobObject, bytes.Repeat(base, 3))
	tree := p.object(plumbing.TreeObject, encodeTree([]treeEntry{{filemode.Regular, "one", one}, {filemode.Regular, "two", two}}))
	return p, p.object(plumbing.CommitObject, commitText(tree))
}

// wrongPacks are packs that must be refused, by what is wrong with them.
func wrongPacks() map[string][]byte {
	good, _ := goodPack()
	whole := good.bytes()
	resum := func(b []byte) []byte {
		sum := sha1.Sum(b[:len(b)-20])
		return append(bytes.Clone(b[:len(b)-20]), sum[:]...)
	}
	out := map[string][]byte{
		"empty":         {},
		"text":          []byte("hello, this is no pack at all, not even nearly"),
		"truncated":     whole[:len(whole)-30],
		"no trailer":    whole[:len(whole)-20],
		"checksum":      append(bytes.Clone(whole[:len(whole)-1]), whole[len(whole)-1]^1),
		"trailing":      append(bytes.Clone(whole), "more"...),
		"version":       resum(append(append([]byte("PACK\x00\x00\x00\x09"), whole[8:12]...), whole[12:]...)),
		"huge count":    resum(append([]byte("PACK\x00\x00\x00\x02\xff\xff\xff\xff"), whole[12:]...)),
		"count too big": resum(append([]byte("PACK\x00\x00\x00\x02\x00\x00\x00\x07"), whole[12:]...)),
		"count too low": resum(append([]byte("PACK\x00\x00\x00\x02\x00\x00\x00\x01"), whole[12:]...)),
	}
	add := func(name string, build func(p *packBuilder)) {
		p := &packBuilder{}
		build(p)
		out[name] = p.bytes()
	}
	zeros := make([]byte, 8<<20)
	add("zlib bomb", func(p *packBuilder) { p.entry(3, 10, nil, zeros) })
	add("declared too large", func(p *packBuilder) { p.entry(3, 1<<40, nil, []byte("x")) })
	add("object too large", func(p *packBuilder) { p.entry(3, len(zeros), nil, zeros) })
	add("sum too large", func(p *packBuilder) {
		for range 9 {
			p.entry(3, 1<<20, nil, zeros[:1<<20])
		}
	})
	add("declared too small", func(p *packBuilder) { p.entry(3, 3, nil, []byte("more than three")) })
	add("unknown type", func(p *packBuilder) { p.entry(5, 1, nil, []byte("x")) })
	add("delta bomb", func(p *packBuilder) {
		base := bytes.Repeat([]byte("x"), 60_000)
		at := p.entry(3, len(base), nil, base)
		d := copyDelta(len(base), 100)
		p.entry(6, len(d), offsetBack(p.offset()-at), d)
	})
	add("delta size lie", func(p *packBuilder) {
		at := p.entry(3, 5, nil, []byte("hello"))
		d := append(binary.AppendUvarint(binary.AppendUvarint(nil, 5), 1<<60), 0x91, 0, 5)
		p.entry(6, len(d), offsetBack(p.offset()-at), d)
	})
	add("delta on nothing", func(p *packBuilder) {
		p.entry(3, 5, nil, []byte("hello"))
		p.entry(6, 4, offsetBack(3), []byte("\x05\x05\x91\x00"))
	})
	add("delta outside", func(p *packBuilder) { p.entry(7, 4, bytes.Repeat([]byte{7}, 20), []byte("\x05\x05\x91\x00")) })
	add("delta on itself", func(p *packBuilder) { p.entry(6, 4, []byte{0}, []byte("\x05\x05\x91\x00")) })
	none := plumbing.NewHash(strings.Repeat("ab", 20))
	add("missing tree", func(p *packBuilder) { p.object(plumbing.CommitObject, commitText(none)) })
	add("missing parent", func(p *packBuilder) {
		p.object(plumbing.CommitObject, commitText(p.object(plumbing.TreeObject, nil), none))
	})
	add("missing file", func(p *packBuilder) {
		p.object(plumbing.TreeObject, encodeTree([]treeEntry{{filemode.Regular, "a", none}}))
	})
	add("bad tree", func(p *packBuilder) {
		p.object(plumbing.TreeObject, []byte("40000 ..\x00"+strings.Repeat("\x01", 20)))
	})
	add("bad commit", func(p *packBuilder) { p.object(plumbing.CommitObject, []byte("hello")) })
	add("bad tag", func(p *packBuilder) { p.object(plumbing.TagObject, []byte("object x\n")) })
	return out
}

// smallLimits make the wrong packs cheap.
var smallLimits = Limits{PackBytes: 1 << 20, Objects: 1000, ObjectBytes: 4 << 20, InflatedBytes: 8 << 20, DeltaBytes: 8 << 20}.withDefaults()

func TestIntakeRefuses(t *testing.T) {
	for name, data := range wrongPacks() {
		t.Run(name, func(t *testing.T) {
			q := testQuarantine(t)
			err := q.receivePack(t.Context(), bytes.NewReader(data), smallLimits)
			if !errors.Is(err, ErrGarbage) && !errors.Is(err, ErrLimit) {
				t.Errorf("not refused with a reason: %v", err)
			}
			t.Log(err)
		})
	}
}

func TestIntakeAccepts(t *testing.T) {
	p, commit := goodPack()
	for _, loose := range []bool{true, false} {
		if !loose { // more objects than unpackLimit: kept as a pack
			for i := range unpackLimit {
				p.object(plumbing.BlobObject, []byte(strings.Repeat("y", i+1)))
			}
		}
		q := testQuarantine(t)
		if err := q.receivePack(t.Context(), bytes.NewReader(p.bytes()), smallLimits); err != nil {
			t.Fatal(err)
		}
		if err := q.release(); err != nil {
			t.Fatal(err)
		}
		if err := q.release(); err != nil {
			t.Errorf("a second release: %v", err)
		}
		if err := q.remove(); err != nil {
			t.Error(err)
		}
		c, err := openCommit(q, commit)
		if err != nil {
			t.Fatal(err)
		}
		data, err := c.Tree.(*treeFS).ReadFile("two")
		if err != nil || string(data) != strings.Repeat("hello\n", 60) {
			t.Errorf("two: %q, %v", data, err)
		}
		if err := os.WriteFile(filepath.Join(q.repo, "refs", "heads", "x"), []byte(commit.String()+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("git", "-C", q.repo, "fsck", "--strict").CombinedOutput(); err != nil {
			t.Errorf("fsck: %v\n%s", err, out)
		}
	}
}

// TestIntakeThin takes a pack whose deltas stand on objects of the repository.
func TestIntakeThin(t *testing.T) {
	base := bytes.Repeat([]byte("0123456789"), 30)
	for _, more := range []int{0, unpackLimit + 1} {
		q := testQuarantine(t)
		h, err := q.writeLoose(plumbing.BlobObject, base)
		if err != nil {
			t.Fatal(err)
		}
		if err := q.release(); err != nil {
			t.Fatal(err)
		}
		p := &packBuilder{}
		// A chain: the second delta stands on the result of the first, by hash, and
		// comes before it.
		mid := bytes.Repeat(base, 2)
		midHash := plumbing.ComputeHash(plumbing.BlobObject, mid)
		d2 := copyDelta(len(mid), 2)
		p.entry(7, len(d2), midHash[:], d2)
		d1 := copyDelta(len(base), 2)
		p.entry(7, len(d1), h[:], d1)
		for i := range more {
			p.object(plumbing.BlobObject, []byte(strings.Repeat("z", i+1)))
		}
		next, err := newQuarantine(q.repo, q.main)
		if err != nil {
			t.Fatal(err)
		}
		if err := next.receivePack(t.Context(), bytes.NewReader(p.bytes()), smallLimits); err != nil {
			t.Fatal(err)
		}
		if err := next.release(); err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat(mid, 2)
		got, err := readKind(q.main, plumbing.BlobObject, plumbing.ComputeHash(plumbing.BlobObject, want))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("more=%d: %d bytes, %v", more, len(got), err)
		}
		if packs, _ := filepath.Glob(filepath.Join(q.repo, "objects", "pack", "*.idx")); len(packs) > 0 {
			if out, err := exec.Command("git", "verify-pack", packs[0]).CombinedOutput(); err != nil {
				t.Errorf("verify-pack: %v\n%s", err, out)
			}
		}
	}
}

func TestIntakeStopsWithContext(t *testing.T) {
	p, _ := goodPack()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if err := testQuarantine(t).receivePack(ctx, bytes.NewReader(p.bytes()), smallLimits); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

// FuzzPackIntake: whatever comes, the intake ends with a reason, or with objects
// that are complete. Seeds are in testdata/fuzz: a good pack and the wrong ones above.
func FuzzPackIntake(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		q := testQuarantine(t)
		lim := Limits{PackBytes: 1 << 16, Objects: 200, ObjectBytes: 1 << 18, InflatedBytes: 1 << 20, DeltaBytes: 1 << 20}.withDefaults()
		err := q.receivePack(t.Context(), bytes.NewReader(data), lim)
		if err != nil {
			if !errors.Is(err, ErrGarbage) && !errors.Is(err, ErrLimit) {
				t.Errorf("refused without a reason: %v", err)
			}
			return
		}
		if err := q.release(); err != nil {
			t.Error(err)
		}
	})
}
