package peer

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// writeTimeout is how long the other end may take to read anything at all.
const writeTimeout = 10 * time.Second

// outbox gathers frames while earlier ones are being written, so that many small ones
// share a TLS record and a system call.
type outbox struct {
	mu    sync.Mutex
	buf   []byte
	spare []byte
	err   error
	wake  chan struct{} // capacity 1: buf is not empty, or err is set
}

func newOutbox() *outbox { return &outbox{wake: make(chan struct{}, 1)} }

// add queues a frame; it never waits. What is queued is bounded by the calls that are
// under way.
func (o *outbox) add(id uint32, kind byte, payload ...[]byte) error {
	size := 5
	for _, p := range payload {
		size += len(p)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return o.err
	}
	o.buf = binary.BigEndian.AppendUint32(o.buf, uint32(size))
	o.buf = binary.BigEndian.AppendUint32(o.buf, id)
	o.buf = append(o.buf, kind)
	for _, p := range payload {
		o.buf = append(o.buf, p...)
	}
	select {
	case o.wake <- struct{}{}:
	default:
	}
	return nil
}

// fail makes every later add return err, and ends run.
func (o *outbox) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// run writes to conn until fail, or until conn fails.
func (o *outbox) run(conn net.Conn) error {
	for range o.wake {
		o.mu.Lock()
		out, err := o.buf, o.err
		o.buf, o.spare = o.spare[:0], nil
		o.mu.Unlock()
		if err != nil {
			return err
		}
		if len(out) > 0 {
			if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
				return err
			}
			if _, err := conn.Write(out); err != nil {
				return err
			}
		}
		o.mu.Lock()
		if cap(out) <= 1<<20 { // one huge frame must not hold its memory for ever
			o.spare = out
		}
		o.mu.Unlock()
	}
	return nil
}

// frame is one message that was read; its payload is the reader's own.
type frame struct {
	id      uint32
	kind    byte
	payload []byte
}

// readFrame reads one frame of at most limit bytes.
func readFrame(r *bufio.Reader, limit int) (frame, error) {
	var head [headSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	size := binary.BigEndian.Uint32(head[:4])
	if size < 5 || int64(size)-5 > int64(limit) {
		return frame{}, fmt.Errorf("frame of %d bytes: %w", size, errMalformed)
	}
	f := frame{id: binary.BigEndian.Uint32(head[4:8]), kind: head[8]}
	if size == 5 {
		return f, nil
	}
	// Memory is taken as bytes arrive, so that an announced size costs nothing.
	n := int(size) - 5
	f.payload = make([]byte, min(n, 64<<10))
	if _, err := io.ReadFull(r, f.payload); err != nil {
		return frame{}, err
	}
	for len(f.payload) < n {
		grown := min(n-len(f.payload), len(f.payload))
		start := len(f.payload)
		f.payload = append(f.payload, make([]byte, grown)...)
		if _, err := io.ReadFull(r, f.payload[start:]); err != nil {
			return frame{}, err
		}
	}
	return f, nil
}
