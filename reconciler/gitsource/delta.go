package gitsource

import (
	"bufio"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
)

// maxDeltaChain is how many deltas may stand on each other. Git itself allows this
// many (pack.depth is capped at 4095).
const maxDeltaChain = 4095

// frame is an object on the way down a tree of deltas.
type frame struct {
	kind plumbing.ObjectType
	data []byte
	todo []int32
}

// resolve applies every delta: first those whose base is in the pack, then those of
// a thin pack, whose base the repository has.
func (in *intake) resolve() error {
	for i := range in.entries {
		e := &in.entries[i]
		if e.delta || (e.child < 0 && len(in.waiting[e.hash]) == 0) {
			continue
		}
		data, err := in.reread(e)
		if err != nil {
			return err
		}
		if err := in.descend(frame{kind: e.kind, data: data, todo: in.deltasOn(int32(i))}); err != nil {
			return err
		}
	}
	if err := in.resolveThin(); err != nil {
		return err
	}
	if in.resolved != len(in.entries) {
		return garbagef("%d deltas whose base neither the pack nor the repository has", len(in.entries)-in.resolved)
	}
	return nil
}

// resolveThin applies the deltas whose base is not in the pack.
func (in *intake) resolveThin() error {
	var bases []plumbing.Hash
	for h := range in.waiting {
		bases = append(bases, h)
	}
	plumbing.HashesSort(bases)
	for _, h := range bases {
		todo := in.waiting[h]
		if len(todo) == 0 {
			continue // came up while another base was resolved
		}
		size, err := in.q.main.size(h)
		if err != nil {
			continue // counted as unresolved by the caller
		}
		if err := in.account(size); err != nil {
			return err
		}
		kind, data, err := in.q.main.read(h)
		if err != nil {
			return err
		}
		delete(in.waiting, h)
		in.outside = append(in.outside, h)
		if err := in.descend(frame{kind: kind, data: data, todo: todo}); err != nil {
			return err
		}
	}
	return nil
}

// deltasOn lists the entries that are deltas on entry i, by offset or by hash.
func (in *intake) deltasOn(i int32) []int32 {
	var list []int32
	for c := in.entries[i].child; c >= 0; c = in.entries[c].sibling {
		list = append(list, c)
	}
	h := in.entries[i].hash
	list = append(list, in.waiting[h]...)
	delete(in.waiting, h)
	return list
}

// descend resolves all deltas below an object, depth first. The content of an
// object is dropped as soon as its last delta has been applied, so a plain chain
// holds two objects at a time; what branches hold is bounded.
func (in *intake) descend(root frame) error {
	stack := []frame{root}
	held := int64(len(root.data))
	for len(stack) > 0 {
		if err := in.ctx.Err(); err != nil {
			return context.Cause(in.ctx)
		}
		top := &stack[len(stack)-1]
		if len(top.todo) == 0 {
			held -= int64(len(top.data))
			stack = stack[:len(stack)-1]
			continue
		}
		next := top.todo[0]
		top.todo = top.todo[1:]
		data, err := in.apply(next, top.data)
		if err != nil {
			return err
		}
		kind := top.kind
		if len(top.todo) == 0 {
			held -= int64(len(top.data))
			top.data = nil
		}
		if err := in.done(next, kind, plumbing.ComputeHash(kind, data), data); err != nil {
			return err
		}
		todo := in.deltasOn(next)
		if len(todo) == 0 {
			continue
		}
		if len(stack) > maxDeltaChain {
			return limitf("more than %d deltas stand on each other", maxDeltaChain)
		}
		if held += int64(len(data)); held > in.lim.DeltaBytes {
			return limitf("applying the deltas takes more than %s of memory", bytesText(in.lim.DeltaBytes))
		}
		stack = append(stack, frame{kind: kind, data: data, todo: todo})
	}
	return nil
}

// apply computes the object of a delta entry.
func (in *intake) apply(i int32, base []byte) ([]byte, error) {
	delta, err := in.reread(&in.entries[i])
	if err != nil {
		return nil, err
	}
	_, n := binary.Uvarint(delta)
	if n <= 0 {
		return nil, garbagef("a delta without a source size")
	}
	target, m := binary.Uvarint(delta[n:])
	if m <= 0 || target > uint64(1<<62) {
		return nil, garbagef("a delta without a target size")
	}
	if err := in.account(int64(target)); err != nil {
		return nil, err
	}
	if len(base) == 0 {
		return nil, garbagef("a delta on an empty object")
	}
	data, err := packfile.PatchDelta(base, delta)
	if err != nil {
		return nil, garbagef("a delta that does not fit its base: %w", err)
	}
	return data, nil
}

// reread inflates an entry that scan has passed.
func (in *intake) reread(e *packEntry) ([]byte, error) {
	if _, err := in.scanner.SeekObjectHeader(e.offset); err != nil {
		return nil, fmt.Errorf("read pack at %d: %w", e.offset, err)
	}
	data, _, err := in.content(e.length)
	if err != nil {
		return nil, fmt.Errorf("read pack at %d: %w", e.offset, err)
	}
	return data, nil
}

// completeThin appends the bases that a thin pack left out, so that the stored
// pack stands by itself, and corrects its count and checksum.
func (in *intake) completeThin() error {
	bases := slices.DeleteFunc(in.outside, func(h plumbing.Hash) bool { _, ok := in.byHash[h]; return ok })
	if len(bases) == 0 {
		return nil
	}
	at := in.fileSize - sha1.Size
	for _, h := range bases {
		kind, data, err := in.q.main.read(h)
		if err != nil {
			return err
		}
		sum := crc32.NewIEEE()
		w := &countingWriter{w: io.MultiWriter(io.NewOffsetWriter(in.file, at), sum)}
		if err := writePackEntry(w, zlib.NewWriter(nil), kind, data); err != nil {
			return fmt.Errorf("complete thin pack: %w", err)
		}
		in.entries = append(in.entries, packEntry{offset: at, crc: sum.Sum32(), kind: kind, hash: h})
		at += w.n
	}
	return in.seal(at)
}

// seal writes the object count and the checksum of a pack that ends at end.
func (in *intake) seal(end int64) error {
	if _, err := in.file.WriteAt(binary.BigEndian.AppendUint32(nil, uint32(len(in.entries))), 8); err != nil {
		return fmt.Errorf("complete thin pack: %w", err)
	}
	sum := sha1.New()
	if _, err := io.Copy(sum, io.NewSectionReader(in.file, 0, end)); err != nil {
		return fmt.Errorf("complete thin pack: %w", err)
	}
	copy(in.checksum[:], sum.Sum(nil))
	if _, err := in.file.WriteAt(in.checksum[:], end); err != nil {
		return fmt.Errorf("complete thin pack: %w", err)
	}
	if err := in.file.Truncate(end + sha1.Size); err != nil {
		return fmt.Errorf("complete thin pack: %w", err)
	}
	return nil
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func writeIndex(w io.Writer, idx *idxfile.MemoryIndex) error {
	buf := bufio.NewWriterSize(w, 64<<10)
	if _, err := idxfile.NewEncoder(buf).Encode(idx); err != nil {
		return err
	}
	return buf.Flush()
}

// writePackEntry writes one whole object in pack form.
func writePackEntry(w io.Writer, zw *zlib.Writer, kind plumbing.ObjectType, data []byte) error {
	size := uint64(len(data))
	head := []byte{byte(kind)<<4 | byte(size&0x0f)}
	for size >>= 4; size > 0; size >>= 7 {
		head[len(head)-1] |= 0x80
		head = append(head, byte(size&0x7f))
	}
	if _, err := w.Write(head); err != nil {
		return err
	}
	zw.Reset(w)
	if _, err := zw.Write(data); err != nil {
		return err
	}
	return zw.Close()
}
