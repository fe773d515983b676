package gitsource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
)

// unpackLimit is the number of objects up to which a pack is kept as loose
// objects. Pushes of a few files would otherwise leave a pack each, and every
// lookup asks every pack. Git uses the same number (receive.unpackLimit).
const unpackLimit = 100

// receivePack takes a pack from the network into the quarantine: spools it to
// disk, resolves its deltas, checks every object and that everything the objects
// point to exists here or in the repository. The reason of a refusal matches
// ErrLimit or ErrGarbage.
//
// Because each accepted pack is complete in this sense, so is the repository, and
// no walk over the history is needed.
func (q *quarantine) receivePack(ctx context.Context, r io.Reader, lim Limits) error {
	path := filepath.Join(q.dir, "incoming.pack")
	size, err := spool(ctx, r, path, lim.PackBytes)
	if err != nil {
		return err
	}
	defer os.Remove(path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("read spooled pack: %w", err)
	}
	defer f.Close()
	in := &intake{ctx: ctx, q: q, lim: lim, file: f, fileSize: size,
		byHash: make(map[plumbing.Hash]int32), waiting: make(map[plumbing.Hash][]int32), pending: make(map[plumbing.Hash]struct{})}
	if err := in.scan(); err != nil {
		return in.reason(err)
	}
	if err := in.resolve(); err != nil {
		return in.reason(err)
	}
	if err := in.checkPending(); err != nil {
		return err
	}
	if in.loose || len(in.entries) == 0 {
		return nil
	}
	return in.keepPack(path)
}

// spool copies a pack of at most max bytes to a file.
func spool(ctx context.Context, r io.Reader, path string, max int64) (n int64, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, fmt.Errorf("spool pack: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("spool pack: %w", cerr)
		}
	}()
	n, err = io.Copy(f, io.LimitReader(contextReader{ctx, r}, max+1))
	if n > max {
		return n, limitf("the pack is larger than %s", bytesText(max))
	}
	if err != nil {
		return n, fmt.Errorf("receive pack: %w", err)
	}
	return n, nil
}

// contextReader ends reads when the context is done.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// packEntry is one object of a pack being taken in.
type packEntry struct {
	offset  int64
	length  int64 // of the entry as stored: the object, or the delta
	crc     uint32
	kind    plumbing.ObjectType // of the object; 0 until its delta is resolved
	delta   bool
	hash    plumbing.Hash
	child   int32 // first delta on this object by offset, -1 for none
	sibling int32 // next delta on the same object
}

type intake struct {
	ctx      context.Context
	q        *quarantine
	lim      Limits
	file     *os.File
	fileSize int64
	scanner  *packfile.Scanner
	loose    bool

	entries  []packEntry
	byHash   map[plumbing.Hash]int32
	waiting  map[plumbing.Hash][]int32 // deltas by the hash of their base
	outside  []plumbing.Hash           // bases of a thin pack, taken from the repository
	pending  map[plumbing.Hash]struct{}
	inflated int64
	resolved int
	checksum plumbing.Hash
}

// reason turns what the pack library says into our errors.
func (in *intake) reason(err error) error {
	if errors.Is(err, ErrLimit) || errors.Is(err, ErrGarbage) || in.ctx.Err() != nil {
		return err
	}
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) {
		return err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return garbagef("the pack is truncated")
	}
	return garbagef("%w", err)
}

// scan reads every entry once, hashing whole objects and noting deltas.
func (in *intake) scan() error {
	in.scanner = packfile.NewScanner(in.file)
	_, count, err := in.scanner.Header()
	if err != nil {
		return fmt.Errorf("pack header: %w", err)
	}
	if int64(count) > int64(in.lim.Objects) {
		return limitf("the pack declares %d objects, more than %d", count, in.lim.Objects)
	}
	in.loose = count <= unpackLimit
	for i := int32(0); i < int32(count); i++ {
		if err := in.ctx.Err(); err != nil {
			return context.Cause(in.ctx)
		}
		if err := in.scanEntry(i); err != nil {
			return fmt.Errorf("pack entry %d of %d: %w", i+1, count, err)
		}
	}
	if in.checksum, err = in.scanner.Checksum(); err != nil {
		return fmt.Errorf("pack checksum: %w", err)
	}
	if end, err := in.scanner.SeekFromStart(0); err != nil {
		return err
	} else if end != in.fileSize {
		return garbagef("%d bytes after the end of the pack", in.fileSize-end)
	}
	return nil
}

func (in *intake) scanEntry(i int32) error {
	head, err := in.scanner.NextObjectHeader()
	if err != nil {
		return err
	}
	if err := in.account(head.Length); err != nil {
		return err
	}
	e := packEntry{offset: head.Offset, length: head.Length, child: -1, sibling: -1}
	switch head.Type {
	case plumbing.OFSDeltaObject:
		base := in.at(head.OffsetReference)
		if base < 0 {
			return garbagef("a delta on an object that is not there")
		}
		e.delta, e.sibling = true, in.entries[base].child
		in.entries[base].child = i
	case plumbing.REFDeltaObject:
		e.delta = true
		in.waiting[head.Reference] = append(in.waiting[head.Reference], i)
	case plumbing.CommitObject, plumbing.TreeObject, plumbing.BlobObject, plumbing.TagObject:
		e.kind = head.Type
	default:
		return garbagef("an object of type %d", head.Type)
	}
	in.entries = append(in.entries, e)
	return in.scanContent(&in.entries[i], i)
}

// scanContent reads the content of the entry whose header was read last. Blobs of
// a large pack are only hashed; everything else is small or about to be stored.
func (in *intake) scanContent(e *packEntry, i int32) error {
	if e.delta {
		n, crc, err := in.scanner.NextObject(io.Discard)
		if e.crc = crc; err == nil && n != e.length {
			err = garbagef("a delta of %d bytes that declares %d", n, e.length)
		}
		return err
	}
	if e.kind == plumbing.BlobObject && !in.loose {
		hasher := plumbing.NewHasher(e.kind, e.length)
		n, crc, err := in.scanner.NextObject(hasher)
		if err == nil && n != e.length {
			err = garbagef("an object of %d bytes that declares %d", n, e.length)
		}
		if err != nil {
			return err
		}
		e.crc = crc
		return in.done(i, e.kind, hasher.Sum(), nil)
	}
	data, crc, err := in.content(e.length)
	if err != nil {
		return err
	}
	e.crc = crc
	return in.done(i, e.kind, plumbing.ComputeHash(e.kind, data), data)
}

// content inflates the entry whose header was read last.
func (in *intake) content(length int64) ([]byte, uint32, error) {
	buf := &sliceWriter{data: make([]byte, 0, min(length, 1<<20))}
	n, crc, err := in.scanner.NextObject(buf)
	if err == nil && n != length {
		err = garbagef("an object of %d bytes that declares %d", n, length)
	}
	return buf.data, crc, err
}

type sliceWriter struct{ data []byte }

func (w *sliceWriter) Write(p []byte) (int, error) {
	w.data = append(w.data, p...)
	return len(p), nil
}

// account refuses an object, or a sum of objects, over the limits. It is asked
// before anything is inflated; the pack library stops at the declared length.
func (in *intake) account(length int64) error {
	if length < 0 || length > in.lim.ObjectBytes {
		return limitf("an object is larger than %s", bytesText(in.lim.ObjectBytes))
	}
	if in.inflated += length; in.inflated > in.lim.InflatedBytes {
		return limitf("the objects of the pack are larger than %s together", bytesText(in.lim.InflatedBytes))
	}
	return nil
}

// at finds the entry that begins at an offset, or -1.
func (in *intake) at(offset int64) int32 {
	lo, hi := 0, len(in.entries)
	for lo < hi {
		mid := (lo + hi) / 2
		if in.entries[mid].offset < offset {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(in.entries) && in.entries[lo].offset == offset {
		return int32(lo)
	}
	return -1
}

// done records an object whose content and hash are known. data may be nil for a
// blob that is stored in the pack.
func (in *intake) done(i int32, kind plumbing.ObjectType, h plumbing.Hash, data []byte) error {
	e := &in.entries[i]
	e.kind, e.hash = kind, h
	in.byHash[h] = i
	delete(in.pending, h)
	in.resolved++
	if err := in.checkObject(kind, h, data); err != nil {
		return err
	}
	if !in.loose {
		return nil
	}
	_, err := in.q.writeLoose(kind, data)
	return err
}

// checkObject checks one object by itself and notes what it points to.
func (in *intake) checkObject(kind plumbing.ObjectType, h plumbing.Hash, data []byte) error {
	var err error
	switch kind {
	case plumbing.CommitObject:
		var tree plumbing.Hash
		var parents []plumbing.Hash
		if tree, parents, err = commitLinks(data); err == nil {
			in.q.note(h, parents...)
			for _, l := range append(parents, tree) {
				if err = in.link(l); err != nil {
					break
				}
			}
		}
	case plumbing.TreeObject:
		err = checkTree(data, in.lim.Objects, func(l plumbing.Hash, _ plumbing.ObjectType) error { return in.link(l) })
	case plumbing.TagObject:
		var target plumbing.Hash
		if target, _, err = tagLinks(data); err == nil {
			in.q.note(h, target)
			err = in.link(target)
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", kind, h, err)
	}
	return nil
}

// link notes that h must exist. When very many are noted, those that the
// repository has are forgotten, to bound memory.
func (in *intake) link(h plumbing.Hash) error {
	if _, ok := in.byHash[h]; ok {
		return nil
	}
	in.pending[h] = struct{}{}
	if len(in.pending) <= 4*in.lim.Objects {
		return nil
	}
	for l := range in.pending {
		ok, err := in.q.main.has(l)
		if err != nil {
			return err
		}
		if ok {
			delete(in.pending, l)
		}
	}
	if len(in.pending) > 2*in.lim.Objects {
		return garbagef("the pack points to more objects than it holds")
	}
	return nil
}

// checkPending refuses a pack that points to objects that are nowhere.
func (in *intake) checkPending() error {
	missing := 0
	var example plumbing.Hash
	for h := range in.pending {
		if err := in.ctx.Err(); err != nil {
			return context.Cause(in.ctx)
		}
		ok, err := in.q.main.has(h)
		if err != nil {
			return err
		}
		if !ok {
			missing++
			if example.IsZero() || h.String() < example.String() {
				example = h
			}
		}
	}
	if missing > 0 {
		return garbagef("the pack points to %d objects that neither it nor the repository has, such as %s", missing, example)
	}
	return nil
}

// keepPack names the spooled pack after its checksum and writes its index.
func (in *intake) keepPack(path string) error {
	if err := in.completeThin(); err != nil {
		return err
	}
	w := new(idxfile.Writer)
	if err := w.OnHeader(uint32(len(in.entries))); err != nil {
		return fmt.Errorf("index pack: %w", err)
	}
	for _, e := range in.entries {
		w.Add(e.hash, uint64(e.offset), e.crc)
	}
	if err := w.OnFooter(in.checksum); err != nil {
		return fmt.Errorf("index pack: %w", err)
	}
	idx, err := w.Index()
	if err != nil {
		return fmt.Errorf("index pack: %w", err)
	}
	base := filepath.Join(in.q.dir, "objects", "pack", "pack-"+in.checksum.String())
	f, err := os.OpenFile(base+".idx", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("index pack: %w", err)
	}
	if err := writeIndex(f, idx); err != nil {
		return errors.Join(fmt.Errorf("index pack: %w", err), f.Close())
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("index pack: %w", err)
	}
	if err := in.file.Chmod(0o444); err != nil {
		return fmt.Errorf("keep pack: %w", err)
	}
	if err := os.Rename(path, base+".pack"); err != nil {
		return fmt.Errorf("keep pack: %w", err)
	}
	in.q.own.refresh()
	return nil
}
