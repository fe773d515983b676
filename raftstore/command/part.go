package command

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Bounds of transactions that travel in parts.
const (
	// MaxTxn bounds the encoding of one transaction in bytes, in parts or whole.
	MaxTxn = 256 << 20
	// MaxPart bounds the data of one part in bytes.
	MaxPart = 8 << 20
	// MaxParts is how many parts a transaction may have.
	MaxParts = 4096
)

// Part is a piece of the encoding of a transaction that is too large for one entry.
// The state machine gathers the parts, in any order; the one that completes them
// brings the transaction into force, all of it at once. A Txn with a Part carries
// nothing else but Time, Actor and Reason, and needs no Key: a part that comes twice
// counts once.
type Part struct {
	// ID tells the parts of one transaction from those of another: it is derived from
	// the content.
	ID string
	// Index counts from 0; there are Count parts.
	Index, Count int
	// Total is the size of all parts together in bytes, Sum the SHA-256 of them.
	Total int64
	Sum   [sha256.Size]byte
	// Format is the log format of the transaction inside.
	Format int
	// Data is this part. It is shared and must not be modified.
	Data []byte
}

// Check says what is wrong with a part, whatever other parts there are.
func (p *Part) Check() error {
	switch {
	case p.ID == "" || len(p.ID) > maxName:
		return fmt.Errorf("a part whose id has %d bytes", len(p.ID))
	case p.Count < 1 || p.Count > MaxParts || p.Index < 0 || p.Index >= p.Count:
		return fmt.Errorf("part %d of %d", p.Index+1, p.Count)
	case p.Total < int64(p.Count) || p.Total > MaxTxn:
		return fmt.Errorf("parts of %d bytes, at most %d are possible", p.Total, MaxTxn)
	case len(p.Data) == 0 || len(p.Data) > MaxPart || int64(len(p.Data)) > p.Total-int64(p.Count-1):
		return fmt.Errorf("a part of %d bytes", len(p.Data))
	case p.Format < Oldest || p.Format > Newest:
		return fmt.Errorf("a transaction of format %d in parts", p.Format)
	}
	return nil
}

// Split cuts a transaction that EncodeTxn wrote into transactions with a Part of at
// most maxPart bytes each, to be proposed one after another (or several at a time).
// They share memory with encoded. Time, Actor and Reason are for the caller to fill.
// The same bytes give the same parts, so that all of it can be tried again.
//
// The last part to arrive has the outcome of the whole. The others, and a part that
// comes when some are missing, have [Result.Missing].
func Split(encoded []byte, maxPart int) ([]Txn, error) {
	if maxPart < 1 || maxPart > MaxPart {
		return nil, fmt.Errorf("split transaction: parts of %d bytes, between 1 and %d are possible", maxPart, MaxPart)
	}
	count := (len(encoded) + maxPart - 1) / maxPart
	if len(encoded) > MaxTxn || count > MaxParts {
		return nil, fmt.Errorf("split transaction of %d bytes into %d parts: %w", len(encoded), count, ErrTooLarge)
	}
	format, err := formatOfEncoded(encoded)
	if err != nil {
		return nil, fmt.Errorf("split transaction: %w", err)
	}
	sum := sha256.Sum256(encoded)
	txns := make([]Txn, count)
	for i := range txns {
		txns[i].Part = &Part{
			ID: hex.EncodeToString(sum[:16]), Index: i, Count: count, Total: int64(len(encoded)), Sum: sum, Format: format,
			Data: encoded[i*maxPart : min((i+1)*maxPart, len(encoded))],
		}
	}
	return txns, nil
}

// Join decodes the transaction whose encoding is data, one piece after another, and
// checks it against the sum. It copies none of data but the objects that lie across
// two pieces. format is that of the parts. Its errors match [ErrMalformed].
func Join(data [][]byte, sum [sha256.Size]byte, format int) (*Txn, error) {
	h := sha256.New()
	for _, b := range data {
		h.Write(b)
	}
	if got := h.Sum(nil); !bytes.Equal(got, sum[:]) {
		return nil, fmt.Errorf("join %d parts: their checksum is %x, %x is expected: %w", len(data), got, sum, ErrMalformed)
	}
	r := reader{rest: data, format: format}
	r.fill(1)
	var t Txn
	r.txn(&t, &t)
	if r.err == nil && r.left() > 0 {
		r.fail("%d bytes too many", r.left())
	}
	if r.err == nil && t.Part != nil {
		r.fail("a part within parts")
	}
	if r.err != nil {
		return nil, fmt.Errorf("join %d parts: %w", len(data), r.err)
	}
	return &t, nil
}

func appendPart(b []byte, p *Part) ([]byte, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	b = appendUvarints(b, uint64(p.Format), uint64(p.Index), uint64(p.Count), uint64(p.Total))
	b = append(b, p.Sum[:]...)
	b = appendString(b, p.ID)
	b = appendUvarints(b, uint64(len(p.Data)))
	return append(b, p.Data...), nil
}

// part reads what appendPart wrote. Of all that is decoded this alone is copied as
// it stands, so that what keeps a part does not keep its entry.
func (r *reader) part() *Part {
	p := &Part{Format: r.small(), Index: r.small(), Count: r.small(), Total: int64(r.small())}
	if r.err == nil && p.Format > r.format {
		r.err = &VersionError{Got: p.Format, Max: r.format}
		return p
	}
	copy(p.Sum[:], r.take(sha256.Size))
	p.ID = r.str(maxName)
	p.Data = bytes.Clone(r.bytes(MaxPart))
	if r.err != nil {
		return p
	}
	if err := p.Check(); err != nil {
		r.fail("%w", err)
	}
	return p
}
