package state

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// A snapshot is a magic line with the format version, then frames (type, length,
// payload), of which the last one holds a SHA-256 of all bytes before it. What can
// be derived from the objects (indexes, taken addresses, counts) is not in it.
const snapshotMagic = "decree state 1\n"

// The frames. Their numbers are part of the format.
const (
	frameHeader = 1 // counters
	frameConfig = 2 // command.Bootstrap, absent before the first transaction
	frameSource = 3 // name, sequence number
	frameObject = 4 // command.AppendObject
	frameKey    = 5 // transaction key, revision; oldest first
	frameEnd    = 6 // checksum
)

// maxFrame bounds the memory that one frame takes to read.
const maxFrame = command.MaxObject + 4096

// ErrCorrupt is matched by the errors of [Read] about bytes that WriteTo did not
// write.
var ErrCorrupt = errors.New("corrupt snapshot")

// WriteTo implements [io.WriterTo]: it streams the whole state to w. Equal states
// give equal bytes.
func (s *State) WriteTo(w io.Writer) (int64, error) {
	e := &snapshotWriter{w: w, sum: sha256.New()}
	e.write([]byte(snapshotMagic))
	header := binary.AppendUvarint(nil, s.index)
	header = binary.AppendUvarint(header, s.revision)
	header = binary.AppendVarint(header, s.time)
	for _, n := range []uint64{s.services.next, s.nodes.next, s.history.next, uint64(s.history.order.Len())} {
		header = binary.AppendUvarint(header, n)
	}
	e.frame(frameHeader, header)
	if s.settings != nil {
		e.frame(frameConfig, command.AppendBootstrap(nil, s.settings))
	}
	s.writeSources(e)
	s.writeObjects(e)
	s.writeHistory(e)
	e.frame(frameEnd, e.sum.Sum(nil))
	if e.err != nil {
		return e.n, fmt.Errorf("write snapshot of revision %d: %w", s.revision, e.err)
	}
	return e.n, nil
}

func (s *State) writeSources(e *snapshotWriter) {
	it := s.sources.Root().Iterator()
	for name, record, ok := it.Next(); ok; name, record, ok = it.Next() {
		e.frame(frameSource, append(binary.AppendUvarint(nil, record.sequence), name...))
	}
}

func (s *State) writeObjects(e *snapshotWriter) {
	var buf []byte
	for _, kind := range api.Kinds() {
		for o := range s.List(kind.Resource, "") {
			b, err := command.AppendObject(buf[:0], o)
			if err != nil {
				e.err = errors.Join(e.err, err)
				return
			}
			e.frame(frameObject, b)
			buf = b
		}
	}
}

func (s *State) writeHistory(e *snapshotWriter) {
	it := s.history.order.Root().Iterator()
	for _, key, ok := it.Next(); ok; _, key, ok = it.Next() {
		revision, _ := s.history.find(key)
		e.frame(frameKey, append(binary.AppendUvarint(nil, revision), key...))
	}
}

// Hash is a fingerprint of everything in the state, as hexadecimal digits: replicas
// that applied the same log have the same. It takes time in proportion to the size
// of the state.
func (s *State) Hash() string {
	h := sha256.New()
	if _, err := s.WriteTo(h); err != nil {
		return "unknown: " + err.Error()
	}
	return hex.EncodeToString(h.Sum(nil))
}

type snapshotWriter struct {
	w   io.Writer
	sum hash.Hash
	n   int64
	err error
}

func (e *snapshotWriter) write(b []byte) {
	if e.err != nil {
		return
	}
	e.sum.Write(b)
	n, err := e.w.Write(b)
	e.n, e.err = e.n+int64(n), err
}

func (e *snapshotWriter) frame(kind byte, payload []byte) {
	head := binary.AppendUvarint([]byte{kind}, uint64(len(payload)))
	e.write(head)
	e.write(payload)
}

// Read reads a state that WriteTo wrote, from its first to its last byte. Beside
// the state it needs memory for one object at a time. Its errors match [ErrCorrupt]
// unless r fails.
func Read(r io.Reader) (*State, error) {
	d := &snapshotReader{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New(), s: New()}
	s, err := d.read()
	if err != nil {
		return nil, fmt.Errorf("read snapshot: %w", err)
	}
	return s, nil
}

type snapshotReader struct {
	r   *bufio.Reader
	sum hash.Hash
	buf bytes.Buffer
	s   *State

	draft     *draft
	sawHeader bool
	keys      uint64 // sequence number after the last key
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
}

func (d *snapshotReader) read() (*State, error) {
	magic := make([]byte, len(snapshotMagic))
	if _, err := io.ReadFull(d.r, magic); err != nil {
		return nil, cut(err)
	}
	if string(magic) != snapshotMagic {
		return nil, corrupt("begins with %.20q, this version of decree reads %q", magic, snapshotMagic)
	}
	d.sum.Write(magic)
	d.draft = newDraft(d.s, 0, &command.Txn{})
	for {
		want := d.sum.Sum(nil)
		kind, payload, err := d.frame()
		if err != nil {
			return nil, err
		}
		if kind == frameEnd {
			return d.end(want, payload)
		}
		if err := d.take(kind, payload); err != nil {
			return nil, err
		}
	}
}

// cut tells an early end from a failing reader.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return corrupt("unexpected end")
	}
	return err
}

// frame reads one frame; the payload is valid until the next call.
func (d *snapshotReader) frame() (kind byte, payload []byte, err error) {
	if kind, err = d.r.ReadByte(); err != nil {
		return 0, nil, cut(err)
	}
	n, err := binary.ReadUvarint(d.r)
	if err != nil {
		return 0, nil, cut(err)
	}
	if n > maxFrame {
		return 0, nil, corrupt("frame of %d bytes", n)
	}
	d.buf.Reset()
	if got, err := io.CopyN(&d.buf, d.r, int64(n)); err != nil || got != int64(n) {
		return 0, nil, cut(err)
	}
	d.sum.Write(binary.AppendUvarint([]byte{kind}, n))
	d.sum.Write(d.buf.Bytes())
	return kind, d.buf.Bytes(), nil
}

func (d *snapshotReader) take(kind byte, payload []byte) error {
	if (kind == frameHeader) == d.sawHeader {
		return corrupt("frame %d is out of place", kind)
	}
	switch kind {
	case frameHeader:
		d.sawHeader = true
		return d.header(payload)
	case frameConfig:
		b, err := command.DecodeBootstrap(payload)
		if err != nil {
			return corrupt("%w", err)
		}
		if err := CheckBootstrap(b); err != nil {
			return corrupt("%w", err)
		}
		d.draft.next.settings = b
	case frameSource:
		sequence, n := binary.Uvarint(payload)
		if n <= 0 {
			return corrupt("source frame")
		}
		record, _ := d.draft.next.sources.Get(payload[n:])
		record.sequence = sequence
		name := bytes.Clone(payload[n:])
		d.draft.next.sources, _, _ = d.draft.next.sources.Insert(name, record)
	case frameObject:
		return d.object(payload)
	case frameKey:
		revision, n := binary.Uvarint(payload)
		if n <= 0 || n == len(payload) {
			return corrupt("key frame")
		}
		if _, twice := d.draft.next.history.find(string(payload[n:])); twice {
			return corrupt("a transaction key occurs twice")
		}
		d.draft.next.history = d.draft.next.history.add(string(payload[n:]), revision)
	default:
		return corrupt("frame %d is not known", kind)
	}
	return nil
}

func (d *snapshotReader) header(payload []byte) error {
	r := bytes.NewReader(payload)
	next := &d.draft.next
	var err error
	for _, p := range []*uint64{&next.index, &next.revision} {
		if *p, err = binary.ReadUvarint(r); err != nil {
			return corrupt("header")
		}
	}
	if next.time, err = binary.ReadVarint(r); err != nil {
		return corrupt("header")
	}
	var count uint64
	for _, p := range []*uint64{&next.services.next, &next.nodes.next, &d.keys, &count} {
		if *p, err = binary.ReadUvarint(r); err != nil {
			return corrupt("header")
		}
	}
	next.history.next = d.keys - count
	return nil
}

// object puts one object back into its table, the indexes and the pools.
func (d *snapshotReader) object(payload []byte) error {
	o, err := command.DecodeObject(payload)
	if err != nil {
		return corrupt("%w", err)
	}
	b := d.draft.next.settings
	if b == nil {
		return corrupt("objects come before the cluster's settings")
	}
	key := api.KeyOf(o)
	if _, twice := d.draft.get(key); twice {
		return corrupt("%s occurs twice", key)
	}
	d.draft.table(key.Resource).Insert(tableKey(key.Namespace, key.Name), o)
	d.draft.index(key, nil, o)
	switch o := o.(type) {
	case *corev1.Service:
		if n, ok := serviceNumber(b, o); ok {
			d.draft.next.services = d.draft.next.services.take(n, holderOf(key))
		}
	case *corev1.Node:
		if n, ok := nodeNumber(b, o); ok {
			d.draft.next.nodes = d.draft.next.nodes.take(n, holderOf(key))
		}
	}
	return nil
}

// end checks the sum and makes a state of what was read.
func (d *snapshotReader) end(want, got []byte) (*State, error) {
	if !bytes.Equal(want, got) {
		return nil, corrupt("checksum is %x, of its content %x", got, want)
	}
	if !d.sawHeader {
		return nil, corrupt("has no header")
	}
	if _, err := d.r.ReadByte(); err == nil {
		return nil, corrupt("bytes after its end")
	}
	next := &d.draft.next
	if next.history.next != d.keys {
		return nil, corrupt("transaction keys are missing")
	}
	tables := append([]*table(nil), d.s.tables...)
	for i, t := range d.draft.tables {
		if t != nil {
			tables[i] = t.CommitOnly()
		}
	}
	next.tables = tables
	if d.draft.owned != nil {
		next.owned = d.draft.owned.CommitOnly()
	}
	return next, nil
}
