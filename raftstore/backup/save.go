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
	"time"

	"github.com/klauspost/compress/zstd"
)

// pieceSize is how much of a part is held in memory: a tar file says how long a
// member is before the member, and nobody knows how long a part becomes. So a part
// travels in pieces: state/000000, state/000001, ...
const pieceSize = 1 << 20

// Save writes a snapshot of src to w as p asks for. It needs memory for a few MiB. After
// an error, what was written is recognisable as incomplete.
func Save(ctx context.Context, w io.Writer, src Source, p Protection) (Manifest, error) {
	m, err := src.manifest()
	if err != nil {
		return m, err
	}
	locked, err := p.wrap(w)
	if err != nil {
		return m, err
	}
	if err := save(ctx, locked, src, m); err != nil {
		return m, fmt.Errorf("save snapshot of revision %d: %w", m.Revision, err)
	}
	if err := locked.Close(); err != nil {
		return m, fmt.Errorf("save snapshot of revision %d: %w", m.Revision, err)
	}
	return m, nil
}

func (src *Source) manifest() (Manifest, error) {
	if src.State == nil || src.State.Settings() == nil {
		return Manifest{}, errors.New("save snapshot: there is no cluster's state yet")
	}
	m := Manifest{
		Format: Format, ClusterID: src.State.Settings().ClusterID, Revision: src.State.Revision(), Index: src.State.Index(),
		Created: src.Now.UTC().Truncate(time.Second), Version: src.Version, Parts: []string{partState},
	}
	if src.Repositories == nil {
		return m, nil
	}
	names, err := src.Repositories.Names()
	if err != nil {
		return m, fmt.Errorf("save snapshot: %w", err)
	}
	for _, name := range slices.Sorted(slices.Values(names)) {
		part := gitPrefix + name
		if _, ok := repositoryOf(part); !ok {
			return m, fmt.Errorf("save snapshot: %q is no name of a repository", name)
		}
		m.Parts = append(m.Parts, part)
	}
	return m, nil
}

func save(ctx context.Context, w io.Writer, src Source, m Manifest) (err error) {
	seal := newSealWriter(w)
	// With a concurrency of one, the encoder works in this goroutine.
	z, err := zstd.NewWriter(seal, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		return err
	}
	a := &archiveWriter{ctx: ctx, tar: tar.NewWriter(z), time: m.Created}
	if err := a.json(fileManifest, m); err != nil {
		return err
	}
	for _, part := range m.Parts {
		if err := a.part(part, func(w io.Writer) error {
			if name, ok := repositoryOf(part); ok {
				return src.Repositories.Export(ctx, name, w)
			}
			_, err := src.State.WriteTo(w)
			return err
		}); err != nil {
			return err
		}
	}
	if err := a.json(fileSums, a.sums); err != nil {
		return err
	}
	if err := a.tar.Close(); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return seal.Close()
}

// archiveWriter writes the members of an archive.
type archiveWriter struct {
	ctx  context.Context
	tar  *tar.Writer
	time time.Time
	sums []Sum
}

func (a *archiveWriter) member(name string, data []byte) error {
	if err := context.Cause(a.ctx); err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(data)), Mode: 0o600, ModTime: a.time}
	if err := a.tar.WriteHeader(h); err != nil {
		return err
	}
	_, err := a.tar.Write(data)
	return err
}

func (a *archiveWriter) json(name string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return a.member(name, append(data, '\n'))
}

// part writes one part, as fill makes it.
func (a *archiveWriter) part(name string, fill func(io.Writer) error) error {
	p := &partWriter{archive: a, name: name, sum: sha256.New(), buf: make([]byte, 0, pieceSize)}
	err := fill(p)
	if err == nil {
		err = p.flush()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	a.sums = append(a.sums, Sum{Part: name, Size: p.size, SHA256: hex.EncodeToString(p.sum.Sum(nil))})
	return nil
}

// partWriter cuts a part into pieces.
type partWriter struct {
	archive *archiveWriter
	name    string
	sum     hash.Hash
	buf     []byte
	pieces  int
	size    int64
}

func (p *partWriter) Write(b []byte) (int, error) {
	for written := 0; ; {
		n := min(len(b)-written, pieceSize-len(p.buf))
		p.buf = append(p.buf, b[written:written+n]...)
		written += n
		if written == len(b) {
			return written, nil
		}
		if err := p.flush(); err != nil {
			return written, err
		}
	}
}

// flush writes the piece that has gathered; a part has one at least.
func (p *partWriter) flush() error {
	if len(p.buf) == 0 && p.pieces > 0 {
		return nil
	}
	if err := p.archive.member(pieceName(p.name, p.pieces), p.buf); err != nil {
		return err
	}
	p.sum.Write(p.buf)
	p.size += int64(len(p.buf))
	p.pieces++
	p.buf = p.buf[:0]
	return nil
}

func pieceName(part string, i int) string { return fmt.Sprintf("%s/%06d", part, i) }
