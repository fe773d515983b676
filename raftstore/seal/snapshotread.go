package seal

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
)

// snapshotReader reads a sealed snapshot. It holds one chunk in memory.
type snapshotReader struct {
	meta   raft.SnapshotMeta
	key    KeyID
	file   *os.File
	aead   cipher.AEAD
	box    []byte
	start  int64 // of the first chunk in the file
	chunks int64
	next   int64  // the next chunk to read
	sealed []byte // memory of a chunk
	plain  []byte // what of it was not read yet
	err    error
}

// openSealed reads the meta, and the last chunk: if that one is whole, none after it
// was cut off, and the size is known. The error matches fs.ErrNotExist if there is no
// such file.
func (s *SnapshotStore) openSealed(id string) (*snapshotReader, error) {
	if id != filepath.Base(id) {
		return nil, fmt.Errorf("snapshot %q: %w", id, fs.ErrNotExist)
	}
	file, err := os.Open(filepath.Join(s.dir, id+snapshotSuffix))
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", id, err)
	}
	r := &snapshotReader{file: file}
	err = r.readHeader(s.ring, id)
	if err == nil {
		err = r.readEnd()
	}
	if err != nil {
		file.Close()
		return nil, corrupt("snapshot "+id, "%w", err)
	}
	return r, nil
}

func (r *snapshotReader) readHeader(ring *Keyring, id string) error {
	start := make([]byte, len(snapshotMagic)+4)
	if _, err := io.ReadFull(r.file, start); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(start[len(snapshotMagic):])
	if string(start[:len(snapshotMagic)]) != snapshotMagic || n > maxMeta {
		return errors.New("it does not begin like a snapshot")
	}
	r.box = make([]byte, n)
	if _, err := io.ReadFull(r.file, r.box); err != nil {
		return err
	}
	plain, err := ring.open(nil, r.box, snapshotName(id))
	if err != nil {
		return err
	}
	var header snapshotHeader
	if err := json.Unmarshal(plain, &header); err != nil {
		return err
	}
	r.meta, r.key = header.Meta, KeyID(r.box[2:])
	r.start = int64(len(start)) + int64(n)
	r.aead, err = newAEAD(header.Key)
	return err
}

func (r *snapshotReader) readEnd() error {
	info, err := r.file.Stat()
	if err != nil {
		return err
	}
	size := info.Size() - r.start
	r.chunks = (size + sealedChunk - 1) / sealedChunk
	r.sealed = make([]byte, sealedChunk)
	r.next = r.chunks - 1
	if r.chunks < 1 || r.chunks > 1<<32 {
		return errors.New("it was cut off")
	}
	last, err := r.readChunk()
	if err != nil {
		return err
	}
	r.meta.Size = (r.chunks-1)*chunkSize + int64(len(last))
	r.next = 0
	return nil
}

// readChunk reads and opens the next chunk.
func (r *snapshotReader) readChunk() ([]byte, error) {
	n, err := r.file.ReadAt(r.sealed, r.start+r.next*sealedChunk)
	if err != nil && err != io.EOF {
		return nil, err
	}
	plain, err := r.aead.Open(r.sealed[:0], chunkNonce(uint32(r.next), r.next == r.chunks-1), r.sealed[:n], r.box)
	if err != nil {
		return nil, fmt.Errorf("chunk %d of %d: %w", r.next+1, r.chunks, errTag)
	}
	r.next++
	return plain, nil
}

// Read implements io.Reader.
func (r *snapshotReader) Read(p []byte) (int, error) {
	for len(r.plain) == 0 && r.err == nil {
		if r.next == r.chunks {
			r.err = io.EOF
		} else if r.plain, r.err = r.readChunk(); r.err != nil {
			r.err = corrupt("snapshot "+r.meta.ID, "%w", r.err)
		}
	}
	n := copy(p, r.plain)
	r.plain = r.plain[n:]
	if n == 0 && len(p) > 0 {
		return 0, r.err
	}
	return n, nil
}

// Close implements io.Closer.
func (r *snapshotReader) Close() error { return r.file.Close() }

// plainMeta is what raft.FileSnapshotStore writes to meta.json.
type plainMeta struct {
	raft.SnapshotMeta
	CRC []byte
}

func (s *SnapshotStore) plainMeta(id string) (*plainMeta, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, id, "meta.json"))
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", id, err)
	}
	var meta plainMeta
	if err := json.Unmarshal(data, &meta); err != nil {
		return nil, corrupt("snapshot "+id, "%w", err)
	}
	if want := fmt.Sprintf("%d-%d-", meta.Term, meta.Index); meta.ID != id || !bytes.HasPrefix([]byte(id), []byte(want)) {
		return nil, corrupt("snapshot "+id, "its meta is of another one")
	}
	return &meta, nil
}

// openPlain opens a snapshot of raft.FileSnapshotStore. There is one checksum for all
// of it, so all is read once before any of it is handed out.
func (s *SnapshotStore) openPlain(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	if id != filepath.Base(id) {
		return nil, nil, fmt.Errorf("snapshot %q: %w", id, fs.ErrNotExist)
	}
	meta, err := s.plainMeta(id)
	if err != nil {
		return nil, nil, err
	}
	file, err := os.Open(filepath.Join(s.dir, id, "state.bin"))
	if err != nil {
		return nil, nil, corrupt("snapshot "+id, "%w", err)
	}
	sum := crc64.New(crc64.MakeTable(crc64.ECMA))
	_, err = io.Copy(sum, file)
	if err == nil && !bytes.Equal(sum.Sum(nil), meta.CRC) {
		err = errors.New("its checksum does not fit")
	}
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		file.Close()
		return nil, nil, corrupt("snapshot "+id, "%w", err)
	}
	return &meta.SnapshotMeta, file, nil
}
