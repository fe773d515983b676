package seal

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"
)

// The file format of bbolt (version 2), as its internal/common defines it, in the
// machine's byte order: pages with a header of 16 bytes, two of them with a meta.
const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	boltNoFreelist = ^uint64(0)
	pageHeader     = 16
	elementSize    = 16
	metaLength     = 64
	bucketHeader   = 16

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10
	bucketFlag   = 0x01
)

var native = binary.NativeEndian

// boltChecker walks the pages of a file. Everything is read with pread, not mapped:
// a bad sector is an error then, and no fault.
type boltChecker struct {
	file     *os.File
	pageSize uint64
	pages    uint64 // ids below this are in use or free
	seen     []bool
}

// checkBolt returns an error that matches [ErrCorrupt] if following the pages of the
// file could lead bbolt astray. It is stricter than what bbolt checks when it opens a
// file: there, a goroutine would go on with what the panic has closed. What the pages
// hold is not its business.
func checkBolt(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	c := &boltChecker{file: f}
	if err := c.check(uint64(info.Size())); err != nil {
		return corrupt("the log", "%w", err)
	}
	return nil
}

func (c *boltChecker) check(size uint64) error {
	meta, err := c.newestMeta()
	if err != nil {
		return err
	}
	if c.pages > size/c.pageSize {
		return fmt.Errorf("it has %d bytes, and should have %d pages of %d", size, c.pages, c.pageSize)
	}
	c.seen = make([]bool, c.pages)
	if err := c.page(meta.root, nil, nil, c.root); err != nil {
		return err
	}
	if meta.freelist != boltNoFreelist {
		return c.freelist(meta.freelist)
	}
	return nil
}

type boltMeta struct{ root, freelist, pages, txid uint64 }

// newestMeta returns the meta of the last transaction. Both must be intact: each is
// in one sector, which disks write as a whole, so a crash damages none; and with the
// other one alone the last transaction would silently never have been.
func (c *boltChecker) newestMeta() (boltMeta, error) {
	c.pageSize = 512 // enough for the first
	first, err := c.meta(0)
	if err != nil {
		return first, err
	}
	second, err := c.meta(1)
	if err != nil {
		return second, err
	}
	if second.txid > first.txid {
		first, second = second, first
	}
	if first.txid != second.txid+1 {
		return first, fmt.Errorf("its two metas are of transactions %d and %d", second.txid, first.txid)
	}
	c.pages = first.pages
	return first, nil
}

func (c *boltChecker) meta(id uint64) (m boltMeta, err error) {
	b := make([]byte, pageHeader+metaLength)
	if _, err := c.file.ReadAt(b, int64(id*c.pageSize)); err != nil {
		return m, fmt.Errorf("read meta %d: %w", id, err)
	}
	b = b[pageHeader:]
	sum := fnv.New64a()
	sum.Write(b[:56])
	if native.Uint32(b) != boltMagic || native.Uint32(b[4:]) != boltVersion || native.Uint64(b[56:]) != sum.Sum64() {
		return m, fmt.Errorf("meta %d is not intact", id)
	}
	c.pageSize = uint64(native.Uint32(b[8:]))
	if c.pageSize < 512 || c.pageSize > 1<<16 {
		return m, fmt.Errorf("meta %d says that pages have %d bytes", id, c.pageSize)
	}
	word := func(i int) uint64 { return native.Uint64(b[i:]) }
	return boltMeta{root: word(16), freelist: word(32), pages: word(40), txid: word(48)}, nil
}

// read returns a page with its overflow, and notes that it is in use.
func (c *boltChecker) read(id uint64) ([]byte, error) {
	if id < 2 || id >= c.pages {
		return nil, fmt.Errorf("page %d does not exist", id)
	}
	var header [pageHeader]byte
	if _, err := c.file.ReadAt(header[:], int64(id*c.pageSize)); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	overflow := uint64(native.Uint32(header[12:]))
	if native.Uint64(header[:]) != id || overflow >= c.pages-id {
		return nil, fmt.Errorf("page %d has a wrong header", id)
	}
	for i := id; i <= id+overflow; i++ {
		if c.seen[i] {
			return nil, fmt.Errorf("page %d is used twice", i)
		}
		c.seen[i] = true
	}
	b := make([]byte, (overflow+1)*c.pageSize)
	if _, err := c.file.ReadAt(b, int64(id*c.pageSize)); err != nil {
		return nil, fmt.Errorf("read page %d: %w", id, err)
	}
	return b, nil
}

// page checks a page and all below it; its keys must be in [low, high), and high is
// open if nil. Leaf is called with every element.
func (c *boltChecker) page(id uint64, low, high []byte, leaf func(e boltElement) error) error {
	b, err := c.read(id)
	if err != nil {
		return err
	}
	elements, err := parsePage(b)
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	for i, e := range elements {
		if i > 0 && bytes.Compare(elements[i-1].key, e.key) >= 0 {
			return fmt.Errorf("page %d: its keys are not in order", id)
		}
		if bytes.Compare(e.key, low) < 0 || high != nil && bytes.Compare(e.key, high) >= 0 {
			return fmt.Errorf("page %d: a key is in the wrong place", id)
		}
		if !e.branch {
			if err := leaf(e); err != nil {
				return fmt.Errorf("page %d: %w", id, err)
			}
			continue
		}
		to := high
		if i+1 < len(elements) {
			to = elements[i+1].key
		}
		if err := c.page(e.child, e.key, to, leaf); err != nil {
			return err
		}
	}
	return nil
}

// root checks an element of the root bucket: raft-boltdb has two buckets there.
func (c *boltChecker) root(e boltElement) error {
	if name := string(e.key); name != "conf" && name != "logs" || e.flags != bucketFlag || len(e.value) < bucketHeader {
		return fmt.Errorf("%q is not a bucket of a log", e.key)
	}
	if id := native.Uint64(e.value); id != 0 {
		return c.page(id, nil, nil, plainElement)
	}
	elements, err := parsePage(e.value[bucketHeader:]) // a small bucket is inside its parent
	if err != nil {
		return fmt.Errorf("bucket %s: %w", e.key, err)
	}
	for _, inside := range elements {
		if inside.branch {
			return fmt.Errorf("bucket %s has branches", e.key)
		}
		if err := plainElement(inside); err != nil {
			return fmt.Errorf("bucket %s: %w", e.key, err)
		}
	}
	return nil
}

func plainElement(e boltElement) error {
	if e.flags != 0 {
		return fmt.Errorf("a bucket where none belongs")
	}
	return nil
}

func (c *boltChecker) freelist(id uint64) error {
	b, err := c.read(id)
	if err != nil {
		return err
	}
	count, ids := uint64(native.Uint16(b[10:])), b[pageHeader:]
	if count == 0xffff { // the real one comes first
		count, ids = native.Uint64(ids), ids[8:]
	}
	if native.Uint16(b[8:]) != freelistPage || count > uint64(len(ids))/8 {
		return fmt.Errorf("page %d is not a list of free pages", id)
	}
	for i := range count {
		free := native.Uint64(ids[8*i:])
		if free < 2 || free >= c.pages || c.seen[free] {
			return fmt.Errorf("page %d is in use and said to be free", free)
		}
	}
	return nil
}

// boltElement is an element of a leaf (flags, value) or of a branch (child).
type boltElement struct {
	branch     bool
	flags      uint32
	child      uint64
	key, value []byte
}

// parsePage returns the elements of a branch or leaf page, which share b's memory.
func parsePage(b []byte) ([]boltElement, error) {
	if len(b) < pageHeader {
		return nil, fmt.Errorf("it is too short")
	}
	kind, count := native.Uint16(b[8:]), uint64(native.Uint16(b[10:]))
	if kind != branchPage && kind != leafPage || pageHeader+count*elementSize > uint64(len(b)) || kind == branchPage && count == 0 {
		return nil, fmt.Errorf("it has a wrong header")
	}
	elements := make([]boltElement, count)
	for i := range elements {
		at := pageHeader + uint64(i)*elementSize
		head := b[at:]
		e := &elements[i]
		var position, keySize, valueSize uint64
		if e.branch = kind == branchPage; e.branch {
			position, keySize = uint64(native.Uint32(head)), uint64(native.Uint32(head[4:]))
			e.child = native.Uint64(head[8:])
		} else {
			e.flags, position = native.Uint32(head), uint64(native.Uint32(head[4:]))
			keySize, valueSize = uint64(native.Uint32(head[8:])), uint64(native.Uint32(head[12:]))
		}
		start := at + position
		if start < pageHeader+count*elementSize || start+keySize+valueSize > uint64(len(b)) {
			return nil, fmt.Errorf("element %d is outside of it", i)
		}
		e.key = b[start : start+keySize]
		e.value = b[start+keySize : start+keySize+valueSize]
	}
	return elements, nil
}
