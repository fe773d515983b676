package state

import (
	"bytes"
	"encoding/binary"
	"io"
	"slices"

	"decree.dev/decree/raftstore/command"
)

// parts reads the head of a transaction of which parts are missing.
func (d *snapshotReader) parts(payload []byte) error {
	if d.version < 2 {
		return corrupt("parts of a transaction in version %d", d.version)
	}
	r := bytes.NewReader(payload)
	var numbers [3]uint64
	for i := range numbers {
		n, err := binary.ReadUvarint(r)
		if err != nil || n > command.MaxTxn {
			return corrupt("parts frame")
		}
		numbers[i] = n
	}
	p := &parts{Part: command.Part{Format: int(numbers[0]), Count: int(numbers[1]), Total: int64(numbers[2])}}
	var err error
	if p.touched, err = binary.ReadVarint(r); err != nil {
		return corrupt("parts frame")
	}
	if _, err := io.ReadFull(r, p.Sum[:]); err != nil {
		return corrupt("parts frame")
	}
	p.ID = string(payload[len(payload)-r.Len():])
	next := &d.draft.next
	if slices.ContainsFunc(next.parts, func(other *parts) bool { return other.ID == p.ID }) {
		return corrupt("a transaction in parts occurs twice")
	}
	if rejection := d.draft.roomForParts(p.Total); rejection != nil {
		return corrupt("%w", rejection)
	}
	if p.Count < 1 || p.Count > command.MaxParts {
		return corrupt("a transaction in %d parts", p.Count)
	}
	p.data = make([][]byte, p.Count)
	next.parts = append(next.parts, p)
	return nil
}

// part reads a part of the transaction whose head came last.
func (d *snapshotReader) part(payload []byte) error {
	if len(d.draft.next.parts) == 0 {
		return corrupt("a part of no transaction")
	}
	p := d.draft.next.parts[len(d.draft.next.parts)-1]
	index, n := binary.Uvarint(payload)
	if n <= 0 || index >= uint64(p.Count) || p.data[index] != nil {
		return corrupt("part frame")
	}
	whole := p.Part
	whole.Index, whole.Data = int(index), bytes.Clone(payload[n:])
	if err := whole.Check(); err != nil {
		return corrupt("%w", err)
	}
	p.data[index] = whole.Data
	p.have++
	if p.size += int64(len(whole.Data)); p.size > p.Total {
		return corrupt("more in parts than the %d bytes of the transaction", p.Total)
	}
	return nil
}
