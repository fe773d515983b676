package command

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendUvarints(b []byte, ns ...uint64) []byte {
	for _, n := range ns {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

// sizeOfUvarint is how many bytes binary.AppendUvarint appends.
func sizeOfUvarint(n uint64) int {
	size := 1
	for ; n >= 0x80; n >>= 7 {
		size++
	}
	return size
}

// reader cuts values off the front of b, then of rest. After the first error every
// further call returns a zero value, so that callers check err once.
type reader struct {
	b      []byte
	rest   [][]byte // what follows b
	err    error
	format int // what may occur
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format+": %w", append(args, ErrMalformed)...)
		r.b, r.rest = nil, nil
	}
}

// left is how many bytes there are.
func (r *reader) left() int {
	n := len(r.b)
	for _, b := range r.rest {
		n += len(b)
	}
	return n
}

// fill makes b at least n bytes long, if there are as many.
func (r *reader) fill(n int) {
	if len(r.b) < n && len(r.rest) > 0 {
		r.refill(n)
	}
}

func (r *reader) refill(n int) {
	for len(r.b) == 0 && len(r.rest) > 0 {
		r.b, r.rest = r.rest[0], r.rest[1:]
	}
	if len(r.b) >= n || len(r.rest) == 0 {
		return
	}
	// A value lies across two pieces: it gets memory of its own.
	joined := append(make([]byte, 0, min(n, r.left())), r.b...)
	rest := slices.Clone(r.rest)
	for len(joined) < n && len(rest) > 0 {
		more := min(n-len(joined), len(rest[0]))
		joined = append(joined, rest[0][:more]...)
		if rest[0] = rest[0][more:]; len(rest[0]) == 0 {
			rest = rest[1:]
		}
	}
	r.b, r.rest = joined, rest
}

func (r *reader) byte() byte {
	r.fill(1)
	if len(r.b) == 0 {
		r.fail("unexpected end")
		return 0
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c
}

func (r *reader) uvarint() uint64 {
	r.fill(binary.MaxVarintLen64)
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail("bad number")
		return 0
	}
	r.b = r.b[n:]
	return v
}

// small reads a number that fits everywhere.
func (r *reader) small() int {
	n := r.uvarint()
	if n > math.MaxInt32 {
		r.fail("number %d", n)
		return 0
	}
	return int(n)
}

func (r *reader) varint() int64 {
	r.fill(binary.MaxVarintLen64)
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.fail("bad number")
		return 0
	}
	r.b = r.b[n:]
	return v
}

// bytes returns a length-prefixed run without copying it.
func (r *reader) bytes(limit int) []byte {
	n := r.uvarint()
	if r.err != nil {
		return nil
	}
	if n > uint64(limit) {
		r.fail("%d bytes where at most %d are possible", n, limit)
		return nil
	}
	return r.take(int(n))
}

// take returns n bytes without copying them.
func (r *reader) take(n int) []byte {
	r.fill(n)
	if n > len(r.b) {
		r.fail("unexpected end")
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) str(limit int) string { return string(r.bytes(limit)) }

// same is str, and returns before when that is what stands there: neighbours often
// say the same, and a string less is a piece of garbage less.
func (r *reader) same(limit int, before string) string {
	b := r.bytes(limit)
	if string(b) == before {
		return before
	}
	return string(b)
}

// count returns a number of elements that take at least size bytes each, so that
// no forged count makes the caller allocate more than the input is worth.
func (r *reader) count(limit, size int) int {
	n := r.uvarint()
	if r.err != nil {
		return 0
	}
	if n > uint64(limit) || n > uint64(r.left()/size) {
		r.fail("%d elements in %d bytes", n, r.left())
		return 0
	}
	return int(n)
}
