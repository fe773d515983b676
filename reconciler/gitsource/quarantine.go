package gitsource

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/objfile"
)

// incomingDir is where quarantines live inside a bare repository. Its name keeps
// Git's own tools from taking it for anything of theirs.
const incomingDir = "decree-incoming"

// quarantine holds the objects of one push or fetch until they are accepted. Reads
// look here first and then in the repository, also after release has moved the
// objects there.
type quarantine struct {
	dir  string // a bare repository layout: objects/…
	repo string // the repository folder it belongs to
	main *objectDir

	mu       sync.Mutex
	own      *objectDir // nil after release
	released bool
	tops     map[plumbing.Hash][]plumbing.Hash // see note
}

func newQuarantine(repo string, main *objectDir) (*quarantine, error) {
	parent := filepath.Join(repo, incomingDir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("create quarantine: %w", err)
	}
	dir, err := os.MkdirTemp(parent, "")
	if err != nil {
		return nil, fmt.Errorf("create quarantine: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "objects", "pack"), 0o700); err != nil {
		return nil, errors.Join(fmt.Errorf("create quarantine: %w", err), os.RemoveAll(dir))
	}
	return &quarantine{dir: dir, repo: repo, main: main, own: newObjectDir(dir), tops: make(map[plumbing.Hash][]plumbing.Hash)}, nil
}

// note remembers a commit or an annotated tag of the quarantine, with the parents or
// the target it stands on.
func (q *quarantine) note(h plumbing.Hash, on ...plumbing.Hash) { q.tops[h] = on }

// tips lists the noted commits and tags that nothing noted stands on.
func (q *quarantine) tips() []plumbing.Hash {
	below := make(map[plumbing.Hash]bool)
	for _, on := range q.tops {
		for _, h := range on {
			below[h] = true
		}
	}
	var list []plumbing.Hash
	for h := range q.tops {
		if !below[h] {
			list = append(list, h)
		}
	}
	plumbing.HashesSort(list)
	return list
}

// removeQuarantines deletes what an earlier process left behind. That process may have
// ended between moving objects and syncing their folders, so these are synced first:
// what can be seen is taken to be durable.
func removeQuarantines(repo string) error {
	if left, err := os.ReadDir(filepath.Join(repo, incomingDir)); err != nil || len(left) == 0 {
		return nil
	}
	err := filepath.WalkDir(filepath.Join(repo, "objects"), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return syncDir(path)
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("leftover quarantine: %w", err)
	}
	if err := os.RemoveAll(filepath.Join(repo, incomingDir)); err != nil {
		return fmt.Errorf("remove leftover quarantine: %w", err)
	}
	return nil
}

// remove deletes the quarantine. After release it only removes empty folders.
func (q *quarantine) remove() error {
	if own := q.reader(); own != nil {
		own.refresh() // closes files
	}
	return os.RemoveAll(q.dir)
}

func (q *quarantine) read(h plumbing.Hash) (plumbing.ObjectType, []byte, error) {
	if own := q.reader(); own != nil {
		kind, data, err := own.read(h)
		if err == nil {
			return kind, data, nil
		}
		if !q.moved() && !errors.Is(err, plumbing.ErrObjectNotFound) {
			return 0, nil, err
		}
	}
	return q.main.read(h)
}

func (q *quarantine) size(h plumbing.Hash) (int64, error) {
	if own := q.reader(); own != nil {
		n, err := own.size(h)
		if err == nil {
			return n, nil
		}
		if !q.moved() && !errors.Is(err, plumbing.ErrObjectNotFound) {
			return 0, err
		}
	}
	return q.main.size(h)
}

func (q *quarantine) has(h plumbing.Hash) (bool, error) {
	if own := q.reader(); own != nil {
		ok, err := own.has(h)
		if ok || (err != nil && !q.moved()) {
			return ok, err
		}
	}
	return q.main.has(h)
}

func (q *quarantine) reader() *objectDir {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.own
}

func (q *quarantine) moved() bool { return q.reader() == nil }

// writeLoose stores one object as a file of its own.
func (q *quarantine) writeLoose(kind plumbing.ObjectType, data []byte) (h plumbing.Hash, err error) {
	h = plumbing.ComputeHash(kind, data)
	name := h.String()
	path := filepath.Join(q.dir, "objects", name[:2], name[2:])
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return h, fmt.Errorf("write object %s: %w", h, err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if errors.Is(err, os.ErrExist) {
		return h, nil
	}
	if err != nil {
		return h, fmt.Errorf("write object %s: %w", h, err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("write object %s: %w", h, cerr)
		}
	}()
	w := objfile.NewWriter(f)
	if err := w.WriteHeader(kind, int64(len(data))); err != nil {
		return h, fmt.Errorf("write object %s: %w", h, err)
	}
	if _, err := w.Write(data); err != nil {
		return h, fmt.Errorf("write object %s: %w", h, err)
	}
	if err := w.Close(); err != nil {
		return h, fmt.Errorf("write object %s: %w", h, err)
	}
	return h, nil
}

// release moves the objects into the repository and syncs files and folders, so
// that they survive a power cut. It is idempotent. An object is moved after all that
// it stands on, which is synced by then: whatever a crash leaves, a commit that is in
// the repository is there with its history and its files.
func (q *quarantine) release() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.released {
		return nil
	}
	q.main.moving.Lock()
	defer q.main.moving.Unlock()
	steps, err := q.steps()
	if err != nil {
		return err
	}
	for _, files := range steps {
		if err := q.move(files); err != nil {
			return err
		}
	}
	q.main.refresh()
	q.own.refresh() // closes files
	q.released = true
	q.own = nil
	return nil
}

// move moves files into the repository and syncs them and their folders.
func (q *quarantine) move(files []string) error {
	target := filepath.Join(q.repo, "objects")
	dirs := map[string]bool{}
	for _, rel := range files {
		if err := moveDurable(filepath.Join(q.dir, "objects", rel), filepath.Join(target, rel)); err != nil {
			return fmt.Errorf("keep object file %s: %w", rel, err)
		}
		dirs[filepath.Join(target, filepath.Dir(rel))] = true
	}
	if len(files) > 0 {
		dirs[target] = true
	}
	for dir := range dirs {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// steps lists what is to be moved, step by step: files, folders and packs, then the
// indexes of packs, because Git looks for a pack only when it sees the index, then
// commits and tags one by one.
func (q *quarantine) steps() ([][]string, error) {
	root := filepath.Join(q.dir, "objects")
	var first, indexes []string
	tops := map[plumbing.Hash]string{}
	dirs, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("list quarantine: %w", err)
	}
	for _, d := range dirs {
		entries, err := os.ReadDir(filepath.Join(root, d.Name()))
		if err != nil {
			return nil, fmt.Errorf("list quarantine: %w", err)
		}
		for _, e := range entries {
			rel := filepath.Join(d.Name(), e.Name())
			h := plumbing.NewHash(d.Name() + e.Name())
			switch _, top := q.tops[h]; {
			case top:
				tops[h] = rel
			case strings.HasSuffix(rel, ".idx"):
				indexes = append(indexes, rel)
			case d.Name() != "pack" || strings.HasSuffix(rel, ".pack"):
				first = append(first, rel)
			}
		}
	}
	steps := [][]string{first, indexes}
	var add func(h plumbing.Hash)
	add = func(h plumbing.Hash) {
		rel, ok := tops[h]
		if !ok {
			return
		}
		delete(tops, h)
		for _, on := range q.tops[h] {
			add(on)
		}
		steps = append(steps, []string{rel})
	}
	for len(tops) > 0 {
		for h := range tops {
			add(h)
		}
	}
	return steps, nil
}

// moveDurable syncs a file and gives it its final name. A file that is already
// there has the same content, because its name is the hash of it.
func moveDurable(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(from, to)
}

// syncDir makes the names in a folder durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}
