package backup

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds the memory that unpacking takes.
const maxWindow = 8 << 20

// maxDocument bounds the manifest and the sums.
const maxDocument = 4 << 20

// archiveReader reads a plain archive from its first to its last byte, in the order
// that the manifest gives, and trusts nothing in it.
type archiveReader struct {
	ctx      context.Context
	seal     *sealReader
	zstd     *zstd.Decoder
	tar      *tar.Reader
	head     *tar.Header // of the member that comes next, nil after the last
	manifest Manifest
	next     int // index in manifest.Parts
	sums     []Sum
}

// openArchive reads the manifest. The caller closes the archive.
func openArchive(ctx context.Context, plain io.Reader) (*archiveReader, error) {
	a := &archiveReader{ctx: ctx, seal: newSealReader(plain)}
	var err error
	// With a concurrency of one, the decoder works in this goroutine.
	a.zstd, err = zstd.NewReader(a.seal, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, fmt.Errorf("unpack archive: %w", err)
	}
	a.tar = tar.NewReader(a.zstd)
	if err := a.begin(); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

func (a *archiveReader) close() { a.zstd.Close() }

func (a *archiveReader) begin() error {
	if err := a.advance(); err != nil {
		return err
	}
	if err := a.document(fileManifest, &a.manifest); err != nil {
		return err
	}
	m := &a.manifest
	if m.Format != Format {
		return fmt.Errorf("the snapshot has format %d, this version of decree reads format %d: use the version that wrote it (%s)", m.Format, Format, m.Version)
	}
	for i, part := range m.Parts {
		if _, ok := repositoryOf(part); (i == 0) != (part == partState) || i > 0 && !ok || slices.Contains(m.Parts[:i], part) {
			return corrupt("its manifest lists the part %q", part)
		}
	}
	if len(m.Parts) == 0 || m.ClusterID == "" {
		return corrupt("its manifest is not complete")
	}
	return nil
}

// source marks the errors of the reader that an archive comes from: what cannot be read
// is not known to be damaged.
type source struct{ r io.Reader }

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		err = &sourceError{err}
	}
	return n, err
}

type sourceError struct{ cause error }

func (e *sourceError) Error() string { return "read archive: " + e.cause.Error() }
func (e *sourceError) Unwrap() error { return e.cause }

// damage says what an error on the way from the source to the content means.
func damage(err error) error {
	var failed *sourceError
	switch {
	case errors.As(err, &failed):
		return failed
	case errors.Is(err, ErrCorrupt):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return corrupt("unexpected end")
	}
	return corrupt("%w", err)
}

// damage is what is wrong with the archive. What decompression and tar make of a
// source that fails says less than the source.
func (a *archiveReader) damage(err error) error {
	if a.seal.err != nil && a.seal.err != io.EOF {
		err = a.seal.err
	}
	return damage(err)
}

// advance looks at the next member.
func (a *archiveReader) advance() error {
	if err := context.Cause(a.ctx); err != nil {
		return err
	}
	h, err := a.tar.Next()
	if errors.Is(err, io.EOF) {
		a.head = nil
		return nil
	}
	if err != nil {
		return a.damage(err)
	}
	if h.Typeflag != tar.TypeReg {
		return corrupt("%q is no file", h.Name)
	}
	a.head = h
	return nil
}

// document decodes the member name, which must be the next one.
func (a *archiveReader) document(name string, into any) error {
	if a.head == nil || a.head.Name != name || a.head.Size > maxDocument {
		return corrupt("%s is missing", name)
	}
	data, err := io.ReadAll(a.tar)
	if err != nil {
		return a.damage(err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return corrupt("%s: %w", name, err)
	}
	return a.advance()
}

// nextPart returns the next part, and ok false after the last one. The part before
// must have been finished.
func (a *archiveReader) nextPart() (p *partReader, ok bool) {
	if a.next == len(a.manifest.Parts) {
		return nil, false
	}
	a.next++
	return &partReader{archive: a, name: a.manifest.Parts[a.next-1], sum: sha256.New()}, true
}

// finish checks that the archive ends as it should, after the last part.
func (a *archiveReader) finish() error {
	var want []Sum
	if err := a.document(fileSums, &want); err != nil {
		return err
	}
	if a.head != nil {
		return corrupt("%q comes after its end", a.head.Name)
	}
	if !slices.Equal(want, a.sums) {
		return corrupt("its parts are not those that were written")
	}
	// Beyond the end of the tar file: nothing but zeros, then the seal.
	buf := make([]byte, 4096)
	for {
		n, err := a.zstd.Read(buf)
		for _, b := range buf[:n] {
			if b != 0 {
				return corrupt("bytes after its end")
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return a.drain()
		case err != nil:
			return a.damage(err)
		}
	}
}

// drain makes sure that the seal was seen.
func (a *archiveReader) drain() error {
	n, err := io.Copy(io.Discard, a.seal)
	switch {
	case err != nil:
		return a.damage(err)
	case n > 0:
		return corrupt("bytes after its end")
	}
	return nil
}

// partReader reads one part, piece after piece.
type partReader struct {
	archive *archiveReader
	name    string
	sum     hash.Hash
	size    int64
	pieces  int
	inside  bool // the tar reader stands in one of the pieces
	ended   bool
	err     error // damage to the archive
}

// Read implements io.Reader. It returns the archive's damage in the archive's words.
func (p *partReader) Read(b []byte) (int, error) {
	for {
		if p.err != nil {
			return 0, p.err
		}
		if p.ended {
			return 0, io.EOF
		}
		if !p.inside {
			if p.err = p.open(); p.err != nil {
				return 0, p.err
			}
			continue
		}
		n, err := p.archive.tar.Read(b)
		p.sum.Write(b[:n])
		p.size += int64(n)
		switch {
		case errors.Is(err, io.EOF):
			p.inside = false
			p.err = p.archive.advance()
		case err != nil:
			p.err = p.archive.damage(err)
		}
		if n > 0 || len(b) == 0 {
			return n, nil
		}
	}
}

// open enters the next piece, or notices that there is none.
func (p *partReader) open() error {
	head := p.archive.head
	switch {
	case head != nil && head.Name == pieceName(p.name, p.pieces):
		p.inside = true
		p.pieces++
	case p.pieces == 0:
		return corrupt("%s is missing", p.name)
	default:
		p.ended = true
	}
	return nil
}

// finish reads what is left of the part and notes its sum.
func (p *partReader) finish() error {
	if _, err := io.Copy(io.Discard, p); err != nil {
		return err
	}
	p.archive.sums = append(p.archive.sums, Sum{Part: p.name, Size: p.size, SHA256: hex.EncodeToString(p.sum.Sum(nil))})
	return nil
}
