package backup

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"hash"
	"io"
)

// A plain archive ends with a seal: a skippable frame of Zstandard (RFC 8878, section
// 3.1.2) that holds the SHA-256 of every byte before it. The frame's own checksum
// does not cover its header, and nothing in a stream of frames says that it is the
// last one; the seal does both, and tools that unpack Zstandard pass over it.
const (
	sealMagic = 0x184D2A5D
	sealSize  = 8 + sha256.Size
)

func sealOf(sum []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, sealMagic)
	b = binary.LittleEndian.AppendUint32(b, sha256.Size)
	return append(b, sum...)
}

// sealWriter passes bytes on, and ends them with their seal.
type sealWriter struct {
	w   io.Writer
	sum hash.Hash
}

func newSealWriter(w io.Writer) *sealWriter { return &sealWriter{w, sha256.New()} }

func (s *sealWriter) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.sum.Write(p[:n])
	return n, err
}

// Close writes the seal.
func (s *sealWriter) Close() error {
	_, err := s.w.Write(sealOf(s.sum.Sum(nil)))
	return err
}

// sealReader passes on what stands before the seal. Its io.EOF says that the seal is
// there and fits.
type sealReader struct {
	r   io.Reader
	sum hash.Hash
	buf []byte // read and not passed on; the newest sealSize bytes may be the seal
	err error  // what r ended with
}

func newSealReader(r io.Reader) *sealReader {
	return &sealReader{r: r, sum: sha256.New(), buf: make([]byte, 0, 64<<10)}
}

func (s *sealReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(s.buf) <= sealSize && s.err == nil {
		n, err := s.r.Read(s.buf[len(s.buf):cap(s.buf)])
		s.buf = s.buf[:len(s.buf)+n]
		s.err = err
	}
	if len(s.buf) > sealSize {
		n := copy(p, s.buf[:len(s.buf)-sealSize])
		s.sum.Write(p[:n])
		s.buf = s.buf[:copy(s.buf, s.buf[n:])]
		return n, nil
	}
	switch {
	case s.err != io.EOF: // an early end of what is encrypted is another error
		return 0, s.err
	case subtle.ConstantTimeCompare(s.buf, sealOf(s.sum.Sum(nil))) != 1:
		return 0, corrupt("it ends early, or was changed: the seal at its end does not fit")
	}
	return 0, io.EOF
}
