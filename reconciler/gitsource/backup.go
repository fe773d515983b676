package gitsource

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/pktline"
)

// Tips are what the replicated state names of a repository: all that is reachable
// from there is its content.
type Tips struct {
	Head       string // the commit in force, "" for none
	References string // the table of references, "" for none
}

// Names lists the repositories, sorted.
func (s *Server) Names() ([]string, error) {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("list repositories: %w", err)
	}
	var list []string
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".git")
		if !ok || !ValidName(name) {
			continue
		}
		if _, err := os.Stat(filepath.Join(s.cfg.Dir, e.Name(), "HEAD")); err == nil {
			list = append(list, name)
		}
	}
	return list, nil
}

// An export is a sequence of packets in Git's framing. The first byte of each says
// what it holds; the packs in it are like those on the wire and can be taken in one
// after the other, so that a repository of any size needs little memory.
const (
	exportHead = "decree git export 1\n"

	exportTips = 'T' // head, space, table; "-" for none
	exportPack = 'P' // bytes of the current pack
	exportNext = 'N' // the current pack ends
	exportEnd  = 'E' // SHA-256 of all payloads before, in hexadecimal digits
)

// importPrefix begins the names of folders of imports that are under way.
const importPrefix = ".importing-"

// Export writes all that is reachable from tips: the history and files of the commit
// in force and of the other references. It holds the hashes of all objects in memory,
// about 100 bytes for each, and one object. Pushes may go on meanwhile.
func (s *Server) Export(ctx context.Context, name string, tips Tips, w io.Writer) error {
	repo, err := s.repository(name)
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	if err := s.export(ctx, repo, tips, w); err != nil {
		return fmt.Errorf("export repository %s: %w", name, err)
	}
	return nil
}

func (s *Server) export(ctx context.Context, repo *repository, tips Tips, w io.Writer) error {
	wants, err := rootsOf(repo.objects, tips)
	if err != nil {
		return err
	}
	sel := newSelection(ctx, repo.objects, &fetchRequest{wants: wants})
	if err := sel.checkWants(); err != nil {
		return err
	}
	buf := bufio.NewWriterSize(w, 64<<10)
	out := &exporter{out: pktline.NewEncoder(buf), sum: sha256.New()}
	if _, err := buf.WriteString(exportHead); err != nil {
		return err
	}
	if err := out.packet(exportTips, []byte(orDash(tips.Head)+" "+orDash(tips.References))); err != nil {
		return err
	}
	for part, err := range sel.parts(s.limits) {
		if err == nil {
			err = writePack(ctx, out, repo.objects, part)
		}
		if err == nil {
			err = out.packet(exportNext, nil)
		}
		if err != nil {
			return err
		}
	}
	if err := out.packet(exportEnd, hex.AppendEncode(nil, out.sum.Sum(nil))); err != nil {
		return err
	}
	return buf.Flush()
}

// rootsOf lists the objects from which all of a repository is reachable.
func rootsOf(r objectReader, tips Tips) ([]plumbing.Hash, error) {
	var list []plumbing.Hash
	if tips.Head != "" {
		h, err := parseHash(tips.Head)
		if err != nil {
			return nil, err
		}
		if _, err := readKind(r, plumbing.CommitObject, h); err != nil {
			return nil, fmt.Errorf("commit in force: %w", notFound(err))
		}
		list = append(list, h)
	}
	if tips.References != "" {
		h, err := parseHash(tips.References)
		if err != nil {
			return nil, err
		}
		data, err := readKind(r, plumbing.BlobObject, h)
		if err != nil {
			return nil, fmt.Errorf("table of references: %w", notFound(err))
		}
		t, err := parseTable(data)
		if err != nil {
			return nil, err
		}
		list = append(append(list, h), t.hashes()...)
	}
	return list, nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// exporter writes packets, and packs as packets.
type exporter struct {
	out *pktline.Encoder
	sum hash.Hash
}

func (e *exporter) packet(kind byte, data []byte) error {
	payload := append([]byte{kind}, data...)
	e.sum.Write(payload)
	return e.out.Encode(payload)
}

func (e *exporter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		size := min(len(p), pktline.MaxPayloadSize-1)
		if err := e.packet(exportPack, p[:size]); err != nil {
			return n, err
		}
		n, p = n+size, p[size:]
	}
	return n, nil
}

// Import makes a repository of what Export wrote, and returns the tips that the
// replicated state must name for it. Everything is checked like a push, and the whole
// for completeness; only then does the repository exist, synced to disk. One that
// exists and holds any object is ErrExists.
func (s *Server) Import(ctx context.Context, name string, r io.Reader) (Tips, error) {
	if !ValidName(name) {
		return Tips{}, fmt.Errorf("import repository %q: use lower-case letters, digits, '-' and '.'", name)
	}
	tips, err := s.importNew(ctx, name, r)
	if err != nil {
		return Tips{}, fmt.Errorf("import repository %s: %w", name, err)
	}
	return tips, nil
}

func (s *Server) importNew(ctx context.Context, name string, r io.Reader) (tips Tips, err error) {
	target := filepath.Join(s.cfg.Dir, name+".git")
	if err := mustBeEmpty(target); err != nil {
		return tips, err
	}
	dir, err := os.MkdirTemp(s.cfg.Dir, importPrefix)
	if err != nil {
		return tips, err
	}
	defer func() {
		if rerr := os.RemoveAll(dir); err == nil {
			err = rerr
		}
	}()
	if err := initBare(dir); err != nil {
		return tips, err
	}
	in := &importer{ctx: ctx, lim: s.limits, repo: openRepository(name, dir), sum: sha256.New()}
	in.lim.PackBytes, in.lim.Objects = in.lim.InflatedBytes+in.lim.InflatedBytes/64, 2*in.lim.Objects
	tips, err = in.run(r)
	in.repo.objects.refresh() // closes files
	if err != nil {
		return tips, err
	}
	return tips, s.settle(name, dir, target)
}

// settle gives an imported repository its name.
func (s *Server) settle(name, dir, target string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := mustBeEmpty(target); err != nil {
		return err
	}
	if err := os.RemoveAll(target); err != nil {
		return err
	}
	delete(s.repos, name)
	if err := os.Rename(dir, target); err != nil {
		return err
	}
	return syncDir(s.cfg.Dir)
}

// mustBeEmpty says whether a repository holds objects.
func mustBeEmpty(dir string) error {
	err := filepath.WalkDir(filepath.Join(dir, "objects"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return fmt.Errorf("%s: %w", path, ErrExists)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// importer reads an export.
type importer struct {
	ctx  context.Context
	lim  Limits
	repo *repository
	scan *pktline.Scanner
	sum  hash.Hash
	tips Tips
}

func (in *importer) run(r io.Reader) (Tips, error) {
	head := make([]byte, len(exportHead))
	if _, err := io.ReadFull(r, head); err != nil || string(head) != exportHead {
		return Tips{}, errors.Join(garbagef("not an export of a repository"), err)
	}
	in.scan = pktline.NewScanner(bufio.NewReaderSize(r, 64<<10))
	kind, data, err := in.packet()
	if err != nil {
		return Tips{}, err
	}
	if kind != exportTips {
		return Tips{}, garbagef("the export does not begin with its tips")
	}
	a, b, _ := strings.Cut(string(data), " ")
	in.tips = Tips{Head: strings.TrimPrefix(a, "-"), References: strings.TrimPrefix(b, "-")}
	for {
		more, err := in.pack()
		if err != nil {
			return Tips{}, err
		}
		if !more {
			return in.tips, in.complete()
		}
	}
}

// packet reads one packet. The sum covers all before the one that ends the export.
func (in *importer) packet() (kind byte, data []byte, err error) {
	if !in.scan.Scan() {
		return 0, nil, errors.Join(garbagef("the export is cut off"), in.scan.Err())
	}
	payload := in.scan.Bytes()
	if len(payload) == 0 {
		return 0, nil, garbagef("an empty packet in the export")
	}
	if payload[0] != exportEnd {
		in.sum.Write(payload)
	}
	return payload[0], payload[1:], nil
}

// pack takes in the next pack and reports whether there was one.
func (in *importer) pack() (more bool, err error) {
	kind, data, err := in.packet()
	switch {
	case err != nil:
		return false, err
	case kind == exportEnd:
		if string(data) != hex.EncodeToString(in.sum.Sum(nil)) {
			return false, garbagef("the checksum of the export does not match")
		}
		return false, nil
	case kind != exportPack:
		return false, garbagef("a packet %q where a pack is expected", kind)
	}
	q, err := newQuarantine(in.repo.dir, in.repo.objects)
	if err != nil {
		return false, err
	}
	body := &packetReader{in: in, rest: bytes.Clone(data)}
	if err = q.receivePack(in.ctx, body, in.lim); err == nil {
		err = q.release()
	}
	return true, errors.Join(err, q.remove())
}

// packetReader is the body of one pack.
type packetReader struct {
	in   *importer
	rest []byte
	end  bool
}

func (p *packetReader) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		if p.end {
			return 0, io.EOF
		}
		kind, data, err := p.in.packet()
		switch {
		case err != nil:
			return 0, err
		case kind == exportNext:
			p.end = true
		case kind == exportPack:
			p.rest = data
		default:
			return 0, garbagef("a packet %q in a pack", kind)
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// complete says whether all that the tips name is there. What these stand on is,
// because every pack was checked for that.
func (in *importer) complete() error {
	roots, err := rootsOf(in.repo.objects, in.tips)
	if err != nil {
		return err
	}
	for _, h := range roots {
		if ok, err := in.repo.objects.has(h); err != nil || !ok {
			return errors.Join(garbagef("the export lacks object %s", h), err)
		}
	}
	if in.tips.Head == "" {
		return nil
	}
	n, err := readNode(in.repo.objects, plumbing.NewHash(in.tips.Head))
	if err != nil {
		return err
	}
	return checkFollowed(in.repo.objects, n.tree, in.lim)
}
