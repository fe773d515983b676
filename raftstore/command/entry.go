package command

import (
	"encoding/binary"
	"fmt"
)

// Bounds of the format. An encoder refuses what a decoder would refuse.
const (
	MaxEntry     = 32 << 20 // bytes of one log entry
	MaxTxns      = 4096     // transactions in one entry
	MaxMutations = 200_000  // mutations in one transaction
	maxName      = 1024     // bytes of a key, name, actor or uid
	maxReason    = 4096     // bytes of a reason
)

// EncodeTxn returns the encoding of t for [EncodeEntry], or for [Split] when it is
// too large for one entry. It returns an error matching [ErrTooLarge] if t exceeds a
// bound of the format.
func EncodeTxn(t *Txn) ([]byte, error) {
	b, err := appendTxn(make([]byte, 0, estimate(t)), t)
	if err != nil {
		return nil, fmt.Errorf("encode transaction of %s: %w", t.Actor, err)
	}
	if len(b) > MaxTxn {
		return nil, fmt.Errorf("encode transaction of %s: %d bytes in %d mutations, at most %d are possible (split the commit): %w",
			t.Actor, len(b), len(t.Mutations), MaxTxn, ErrTooLarge)
	}
	return b, nil
}

// estimate is how much memory the encoding of t will take, a little too much rather
// than too little.
func estimate(t *Txn) int {
	n := 128 + len(t.Key) + len(t.Actor) + len(t.Reason)
	if t.Part != nil {
		n += 64 + len(t.Part.Data)
	}
	if t.Commit != nil && t.Commit.Revision != nil {
		n += SizeOf(t.Commit.Revision)
	}
	for i := range t.Mutations {
		m := &t.Mutations[i]
		n += 32 + 2*len(m.Key.Resource) + len(m.Key.Namespace) + len(m.Key.Name) + len(m.UID)
		if m.Object != nil && !isNil(m.Object) {
			n += SizeOf(m.Object)
		}
	}
	return min(n, MaxTxn)
}

// EncodeEntry joins encoded transactions into one log entry, in the oldest format
// that can hold them. format is the newest that all servers of the cluster read; what
// needs a newer one is refused with an error matching [ErrFormat], what is too large
// with one matching [ErrTooLarge].
func EncodeEntry(format int, txns ...[]byte) ([]byte, error) {
	size := 16
	for _, t := range txns {
		size += len(t) + sizeOfUvarint(uint64(len(t)))
	}
	if size > MaxEntry || len(txns) > MaxTxns {
		return nil, fmt.Errorf("encode entry: %d transactions in %d bytes, at most %d in %d are possible: %w", len(txns), size, MaxTxns, MaxEntry, ErrTooLarge)
	}
	need := Oldest
	for i, t := range txns {
		f, err := formatOfEncoded(t)
		if err != nil {
			return nil, fmt.Errorf("encode entry: transaction %d of %d: %w", i+1, len(txns), err)
		}
		need = max(need, f)
	}
	if need > format {
		return nil, fmt.Errorf("encode entry: %w", &FormatError{Need: need, Have: format})
	}
	b := append(make([]byte, 0, size), byte(need))
	b = binary.AppendUvarint(b, uint64(len(txns)))
	for _, t := range txns {
		b = append(binary.AppendUvarint(b, uint64(len(t))), t...)
	}
	return b, nil
}

// FormatOfEntry is the format of an entry that [EncodeEntry] made.
func FormatOfEntry(entry []byte) int { return int(entry[0]) }

// Decoder decodes log entries. The zero value reads everything that this version
// knows.
type Decoder struct {
	// Max is the newest format to read, zero for [Newest]: with an older one, tests
	// pretend to be the version before this one.
	Max int
}

// DecodeEntry decodes one log entry with a zero [Decoder].
func DecodeEntry(b []byte) ([]Txn, error) { return Decoder{}.Entry(b) }

// Entry decodes one log entry. Nothing in the result shares memory with b. It
// returns an error matching [*VersionError] for an unknown format, and one matching
// [ErrMalformed] for anything that no encoder writes; it never panics.
func (d Decoder) Entry(b []byte) ([]Txn, error) {
	if len(b) > MaxEntry {
		return nil, fmt.Errorf("decode entry of %d bytes: %w", len(b), ErrTooLarge)
	}
	if d.Max == 0 {
		d.Max = Newest
	}
	r := reader{b: b}
	r.format = int(r.byte())
	if r.err == nil && (r.format < Oldest || r.format > d.Max) {
		return nil, &VersionError{Got: r.format, Max: d.Max}
	}
	txns := make([]Txn, r.count(MaxTxns, 1))
	before := new(Txn)
	for i := range txns {
		part := reader{b: r.bytes(MaxEntry), format: r.format}
		if r.err != nil {
			break
		}
		part.txn(&txns[i], before)
		if part.err == nil && len(part.b) > 0 {
			part.fail("%d bytes too many", len(part.b))
		}
		if part.err != nil {
			return nil, fmt.Errorf("decode transaction %d of %d: %w", i+1, len(txns), part.err)
		}
		before = &txns[i]
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail("%d bytes too many", len(r.b))
	}
	if r.err != nil {
		return nil, fmt.Errorf("decode entry: %w", r.err)
	}
	return txns, nil
}
