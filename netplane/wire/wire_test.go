package wire

import (
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
