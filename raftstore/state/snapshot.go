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
//
// The version is that of the log format which the content needs, so that equal states
// give equal bytes whichever version of Decree writes them, and so that servers of the
// version before can be sent a snapshot until the cluster writes the newer format.
const (
	snapshotMagic = "decree state %d\n" // one digit
	magicSize     = len("decree state 1\n")
)

// The frames. Their numbers are part of the format.
const (
	frameHeader = 1 // counters
	frameConfig = 2 // command.Bootstrap, absent before the first transaction
	frameSource = 3 // name, sequence number
	frameObject = 4 // command.AppendObject
	frameKey    = 5 // transaction key, revision; oldest first
	frameEnd    = 6 // checksum
	frameParts  = 7 // a transaction in parts that is not complete; since version 2
	framePart   = 8 // a part of the last frameParts: index, data; since version 2
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
	fmt.Fprintf(e, snapshotMagic, s.Format())
	header := binary.AppendUvarint(nil, s.index)
	header = binary.AppendUvarint(header, s.revision)
	header = binary.AppendVarint(header, s.time)
	for _, n := range []uint64{s.services[0].next, s.nodes.next, s.history.next, uint64(s.history.size)} {
		header = binary.AppendUvarint(header, n)
	}
	if s.Format() >= 3 {
		header = binary.AppendUvarint(header, s.services[1].next)
	}
	e.frame(frameHeader, header)
	if s.settings != nil {
		e.frame(frameConfig, command.AppendBootstrap(nil, s.settings))
	}
	s.writeSources(e)
	s.writeObjects(e)
	s.writeHistory(e)
	s.writeParts(e)
	e.frame(frameEnd, e.sum.Sum(nil))
	if e.err != nil {
		return e.n, fmt.Errorf("write snapshot of revision %d: %w", s.revision, e.err)
	}
	return e.n, nil
}

// Format is the oldest log format that knows all of the content.
func (s *State) Format() int {
	format := command.Oldest
	if len(s.parts) > 0 {
		format = command.FormatOfParts
	}
	if s.settings != nil && s.settings.Restored != nil {
		format = max(format, 2)
	}
	if s.settings != nil && command.FormatOf(&command.Txn{Bootstrap: s.settings}) == 3 || s.ports.used.Len() > 0 {
		format = max(format, 3)
	}
	for r, kind := range kinds {
		if s.tables[kind.index].Len() > 0 {
			format = max(format, command.FormatOfKind(r))
		}
	}
	return format
}

func (s *State) writeSources(e *snapshotWriter) {
	for name, record := range s.sources.all() {
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
	for key, revision := range s.history.all() {
		e.frame(frameKey, append(binary.AppendUvarint(nil, revision), key...))
	}
}

func (s *State) writeParts(e *snapshotWriter) {
	for _, p := range s.parts {
		b := binary.AppendUvarint(nil, uint64(p.Format))
		b = binary.AppendUvarint(b, uint64(p.Count))
		b = binary.AppendUvarint(b, uint64(p.Total))
		b = binary.AppendVarint(b, p.touched)
		b = append(b, p.Sum[:]...)
		e.frame(frameParts, append(b, p.ID...))
		for i, data := range p.data {
			if data != nil {
				index := binary.AppendUvarint(nil, uint64(i))
				e.frame(framePart, index, data)
			}
		}
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

// Write implements io.Writer; the error is kept for later.
func (e *snapshotWriter) Write(b []byte) (int, error) {
	if e.err == nil {
		e.sum.Write(b)
		var n int
		n, e.err = e.w.Write(b)
		e.n += int64(n)
	}
	return len(b), nil
}

func (e *snapshotWriter) frame(kind byte, payload ...[]byte) {
	size := 0
	for _, b := range payload {
		size += len(b)
	}
	e.Write(binary.AppendUvarint([]byte{kind}, uint64(size)))
	for _, b := range payload {
		e.Write(b)
	}
}

// Read reads a state that WriteTo wrote, from its first to its last byte. Beside
// the state it needs memory for one object at a time. Its errors match [ErrCorrupt]
// unless r fails.
func Read(r io.Reader) (*State, error) { return ReadFormat(r, command.Newest) }

// ReadFormat is Read for snapshots of versions up to newest: with an older one, tests
// pretend to be the version before this one.
func ReadFormat(r io.Reader, newest int) (*State, error) {
	d := &snapshotReader{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New(), newest: newest, draft: newDraft(New(), 0, 0)}
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

	newest    int
	version   int
	draft     *draft
	sawHeader bool
	keys      uint64 // sequence number after the last key
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
}

func (d *snapshotReader) read() (*State, error) {
	magic := make([]byte, magicSize)
	if _, err := io.ReadFull(d.r, magic); err != nil {
		return nil, cut(err)
	}
	for v := command.Oldest; v <= d.newest; v++ {
		if string(magic) == fmt.Sprintf(snapshotMagic, v) {
			d.version = v
		}
	}
	if d.version == 0 {
		return nil, corrupt("begins with %.20q, this version of decree reads %q to %q: if it is of a newer version, upgrade this server to it",
			magic, fmt.Sprintf(snapshotMagic, command.Oldest), fmt.Sprintf(snapshotMagic, d.newest))
	}
	d.sum.Write(magic)
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
		if need := command.FormatOf(&command.Txn{Bootstrap: b}); need > d.version {
			return corrupt("settings of version %d in version %d", need, d.version)
		}
		d.draft.next.settings = b
	case frameSource:
		sequence, n := binary.Uvarint(payload)
		if n <= 0 {
			return corrupt("source frame")
		}
		record, _ := d.draft.next.sources.get(string(payload[n:]))
		record.sequence = sequence
		d.draft.next.sources.set(d.draft.edit, string(payload[n:]), record)
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
		d.draft.next.history.add(d.draft.edit, string(payload[n:]), revision)
	case frameParts:
		return d.parts(payload)
	case framePart:
		return d.part(payload)
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
	numbers := []*uint64{&next.services[0].next, &next.nodes.next, &d.keys, &count}
	if d.version >= 3 {
		numbers = append(numbers, &next.services[1].next)
	}
	for _, p := range numbers {
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
	at := slotOf(key)
	if command.FormatOfKind(key.Resource) > d.version {
		return corrupt("%s in version %d", key, d.version)
	}
	if _, twice := d.draft.get(at); twice {
		return corrupt("%s occurs twice", key)
	}
	d.draft.next.tables[at.kind.index].set(d.draft.edit, at.at, o)
	d.draft.reindex(key, nil, o)
	switch o := o.(type) {
	case *corev1.Service:
		if d.version < 3 && len(portsOf(o)) > 0 {
			return corrupt("node ports of %s in version %d", key, d.version)
		}
		d.hold(key, o)
	case *corev1.Node:
		if n, ok := nodeNumber(b, o); ok {
			d.draft.next.nodes.take(d.draft.edit, n, holderOf(key))
		}
	}
	return nil
}

// hold marks what a stored service holds as taken.
func (d *snapshotReader) hold(key api.Key, svc *corev1.Service) {
	next, edit := &d.draft.next, d.draft.edit
	for f, ip := range d.draft.heldAddresses(svc) {
		if n, ok := addressNumber(next.settings, f, ip); ok {
			next.services[f].take(edit, n, holderOf(key))
		}
	}
	for _, n := range portsOf(svc) {
		next.ports.take(edit, uint64(n), holderOf(key))
	}
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
	for _, p := range next.parts {
		if p.have == 0 || p.have == p.Count {
			return nil, corrupt("%d parts of %d of a transaction", p.have, p.Count)
		}
	}
	d.draft.changed = true
	return d.draft.state(), nil
}
