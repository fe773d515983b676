package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestWritten: what is written can be read.
func TestWritten(t *testing.T) {
	var w Conn
	for _, kind := range []uint16{7, 8} {
		at, _ := w.Message(kind, unix.NLM_F_DUMP, [4]byte{1, 2, 3, 4})
		n := w.Nest(5)
		w.Attr(6, "odd")
		w.Unnest(n)
		w.Ask(at)
		w.End(at)
	}
	var kinds []uint16
	err := Messages(w.Buf, func(kind, flags uint16, seq uint32, body []byte) error {
		kinds = append(kinds, kind)
		if flags != unix.NLM_F_REQUEST|unix.NLM_F_DUMP|unix.NLM_F_ACK || seq != uint32(len(kinds)) || string(body[:4]) != "\x01\x02\x03\x04" {
			t.Errorf("flags %x, number %d, %x", flags, seq, body)
		}
		Attributes(body[4:], func(kind uint16, v []byte) {
			inner := ""
			Attributes(v, func(k uint16, v []byte) { inner = string(v) + string(rune('0'+k)) })
			if kind != 5 || inner != "odd6" {
				t.Errorf("attribute %d: %q", kind, inner)
			}
		})
		return nil
	})
	if err != nil || len(kinds) != 2 || kinds[0] != 7 || kinds[1] != 8 {
		t.Errorf("%v, %v", kinds, err)
	}
}

// FuzzMessages: nothing that a kernel sends breaks the reader.
func FuzzMessages(f *testing.F) {
	var w Conn
	at, _ := w.Message(1, 0, [4]byte{})
	w.Attr(2, "three")
	w.End(at)
	f.Add(w.Buf)
	f.Add(binary.NativeEndian.AppendUint32(nil, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := 0
		err := Messages(b, func(_, _ uint16, _ uint32, body []byte) error {
			read += unix.NLMSG_HDRLEN + len(body)
			_ = Errno(body)
			Attributes(body, func(_ uint16, v []byte) { Attributes(v, func(uint16, []byte) {}) })
			return nil
		})
		if read > len(b) || err != nil && !errors.Is(err, unix.EBADMSG) {
			t.Errorf("read %d of %d bytes: %v", read, len(b), err)
		}
	})
}

// TestSettled: a reading counts if it is expected, or when the next one agrees.
func TestSettled(t *testing.T) {
	const interrupted, broken = -1, -2
	for _, c := range []struct {
		reads   []int
		want    int
		counted int
		err     error
	}{
		{reads: []int{7}, want: 7, counted: 1},
		{reads: []int{1, 7}, want: 7, counted: 2},
		{reads: []int{1, 2, 2}, want: 2, counted: 3},
		{reads: []int{1, interrupted, 1}, want: 1, counted: 3},
		{reads: []int{0, 0}, want: 0, counted: 2}, // nothing before the first is no reading
		{reads: []int{1, broken}, want: broken, counted: 2, err: unix.EPERM},
		{reads: []int{1, 2, 1, 2, 1, 2, 1, 2, 1, 2}, counted: 10, want: 2, err: errUnsettled},
		{reads: []int{1, -1, -1, -1, -1, -1, -1, -1, -1, -1}, counted: 10, want: 1, err: ErrInterrupted},
	} {
		n := 0
		got, err := Settled(t.Context(), func() (int, error) {
			n++
			switch x := c.reads[n-1]; x {
			case interrupted:
				return x, ErrInterrupted
			case broken:
				return x, unix.EPERM
			default:
				return x, nil
			}
		}, func(x int) bool { return x == 7 }, func(a, b int) bool { return a == b })
		if got != c.want || n != c.counted || !errors.Is(err, c.err) {
			t.Errorf("%v: %d after %d, %v; want %d after %d, %v", c.reads, got, n, err, c.want, c.counted, c.err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Settled(ctx, func() (int, error) { return 7, nil }, func(int) bool { return true }, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
