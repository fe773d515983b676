package gitsource

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
)

// treeFS is the tree of a commit as a read-only file system, read straight from
// the objects. It is safe for concurrent use.
//
// Nothing is followed: a symbolic link opens as itself, with fs.ModeSymlink, and
// reading it is an error (ReadLink gives its target); a submodule is an
// fs.ModeIrregular entry that cannot be read. All times are the commit's.
type treeFS struct {
	objects objectReader
	root    plumbing.Hash
	time    time.Time

	mu   sync.Mutex
	dirs map[plumbing.Hash][]treeEntry // parsed trees
}

// Errors of reading what is not a file.
var (
	errSymlink   = errors.New("is a symbolic link, and those are not followed")
	errSubmodule = errors.New("is a submodule, and those are not fetched")
)

func newTreeFS(r objectReader, root plumbing.Hash, t time.Time) *treeFS {
	return &treeFS{objects: r, root: root, time: t, dirs: make(map[plumbing.Hash][]treeEntry)}
}

var (
	_ fs.ReadDirFS  = (*treeFS)(nil)
	_ fs.ReadFileFS = (*treeFS)(nil)
	_ fs.StatFS     = (*treeFS)(nil)
	_ fs.ReadLinkFS = (*treeFS)(nil)
)

// entries returns the parsed entries of a tree object, sorted by name.
func (t *treeFS) entries(h plumbing.Hash) ([]treeEntry, error) {
	t.mu.Lock()
	list, ok := t.dirs[h]
	t.mu.Unlock()
	if ok {
		return list, nil
	}
	data, err := readKind(t.objects, plumbing.TreeObject, h)
	if err != nil {
		return nil, err
	}
	list = []treeEntry{}
	if err := parseTree(data, func(e treeEntry) error { list = append(list, e); return entryName(e.name) }); err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b treeEntry) int { return strings.Compare(a.name, b.name) })
	t.mu.Lock()
	t.dirs[h] = list
	t.mu.Unlock()
	return list, nil
}

// lookup finds the entry of a path.
func (t *treeFS) lookup(op, name string) (treeEntry, error) {
	bad := func(err error) (treeEntry, error) { return treeEntry{}, &fs.PathError{Op: op, Path: name, Err: err} }
	if !fs.ValidPath(name) {
		return bad(fs.ErrInvalid)
	}
	at := treeEntry{mode: filemode.Dir, name: ".", hash: t.root}
	if name == "." {
		return at, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		if at.mode != filemode.Dir {
			return bad(fs.ErrNotExist)
		}
		list, err := t.entries(at.hash)
		if err != nil {
			return bad(err)
		}
		i, ok := slices.BinarySearchFunc(list, part, func(e treeEntry, n string) int { return strings.Compare(e.name, n) })
		if !ok {
			return bad(fs.ErrNotExist)
		}
		at = list[i]
	}
	return at, nil
}

// Open opens a file, folder, symbolic link or submodule.
func (t *treeFS) Open(name string) (fs.File, error) {
	e, err := t.lookup("open", name)
	if err != nil {
		return nil, err
	}
	if e.mode == filemode.Dir {
		list, err := t.ReadDir(name)
		if err != nil {
			return nil, err
		}
		return &treeDir{info: &treeInfo{t, e, 0}, path: name, list: list}, nil
	}
	info, err := t.info(e)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &treeFile{fs: t, path: name, info: info}, nil
}

// ReadFile returns the content of a regular file.
func (t *treeFS) ReadFile(name string) ([]byte, error) {
	e, err := t.lookup("read", name)
	if err != nil {
		return nil, err
	}
	data, err := t.content(e)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return data, nil
}

// ReadDir returns the entries of a folder, sorted by name.
func (t *treeFS) ReadDir(name string) ([]fs.DirEntry, error) {
	e, err := t.lookup("readdir", name)
	if err != nil {
		return nil, err
	}
	if e.mode != filemode.Dir {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: errors.New("not a folder")}
	}
	list, err := t.entries(e.hash)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	out := make([]fs.DirEntry, len(list))
	for i, c := range list {
		out[i] = dirEntry{t, c}
	}
	return out, nil
}

// Stat describes a path. Like Lstat, it does not follow symbolic links.
func (t *treeFS) Stat(name string) (fs.FileInfo, error) {
	e, err := t.lookup("stat", name)
	if err != nil {
		return nil, err
	}
	info, err := t.info(e)
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return info, nil
}

// Lstat is Stat.
func (t *treeFS) Lstat(name string) (fs.FileInfo, error) { return t.Stat(name) }

// ReadLink returns the target of a symbolic link as it is written.
func (t *treeFS) ReadLink(name string) (string, error) {
	e, err := t.lookup("readlink", name)
	if err != nil {
		return "", err
	}
	if e.mode != filemode.Symlink {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	data, err := readKind(t.objects, plumbing.BlobObject, e.hash)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return string(data), nil
}

func (t *treeFS) content(e treeEntry) ([]byte, error) {
	switch e.mode {
	case filemode.Dir:
		return nil, errors.New("is a folder")
	case filemode.Symlink:
		return nil, errSymlink
	case filemode.Submodule:
		return nil, errSubmodule
	}
	return readKind(t.objects, plumbing.BlobObject, e.hash)
}

func (t *treeFS) info(e treeEntry) (*treeInfo, error) {
	if e.mode == filemode.Dir || e.mode == filemode.Submodule {
		return &treeInfo{t, e, 0}, nil
	}
	n, err := t.objects.size(e.hash)
	if err != nil {
		return nil, err
	}
	return &treeInfo{t, e, n}, nil
}

// treeInfo is fs.FileInfo of one entry.
type treeInfo struct {
	fs    *treeFS
	entry treeEntry
	size  int64
}

func (i *treeInfo) Name() string       { return i.entry.name }
func (i *treeInfo) Size() int64        { return i.size }
func (i *treeInfo) ModTime() time.Time { return i.fs.time }
func (i *treeInfo) IsDir() bool        { return i.entry.mode == filemode.Dir }
func (i *treeInfo) Sys() any           { return nil }
func (i *treeInfo) Mode() fs.FileMode  { return fileMode(i.entry.mode) }

func fileMode(m filemode.FileMode) fs.FileMode {
	switch m {
	case filemode.Dir:
		return fs.ModeDir | 0o555
	case filemode.Executable:
		return 0o555
	case filemode.Symlink:
		return fs.ModeSymlink | 0o777
	case filemode.Submodule:
		return fs.ModeIrregular
	}
	return 0o444
}

// dirEntry is fs.DirEntry of one entry. Sizes are looked up only when asked for.
type dirEntry struct {
	fs    *treeFS
	entry treeEntry
}

func (d dirEntry) Name() string               { return d.entry.name }
func (d dirEntry) IsDir() bool                { return d.entry.mode == filemode.Dir }
func (d dirEntry) Type() fs.FileMode          { return fileMode(d.entry.mode).Type() }
func (d dirEntry) Info() (fs.FileInfo, error) { return d.fs.info(d.entry) }
func (d dirEntry) String() string             { return fs.FormatDirEntry(d) }

// treeFile is an open file, symbolic link or submodule. Its content is read from
// the objects at the first Read.
type treeFile struct {
	fs   *treeFS
	path string
	info *treeInfo
	r    *bytes.Reader
}

func (f *treeFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *treeFile) Close() error               { return nil }

func (f *treeFile) Read(p []byte) (int, error) {
	if f.r == nil {
		data, err := f.fs.content(f.info.entry)
		if err != nil {
			return 0, &fs.PathError{Op: "read", Path: f.path, Err: err}
		}
		f.r = bytes.NewReader(data)
	}
	return f.r.Read(p)
}

// treeDir is an open folder.
type treeDir struct {
	info *treeInfo
	path string
	list []fs.DirEntry
	next int
}

func (d *treeDir) Stat() (fs.FileInfo, error) {
	info := *d.info
	info.entry.name = path.Base(d.path)
	return &info, nil
}
func (d *treeDir) Close() error { return nil }

func (d *treeDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.path, Err: errors.New("is a folder")}
}

func (d *treeDir) ReadDir(n int) ([]fs.DirEntry, error) {
	rest := d.list[d.next:]
	if n <= 0 {
		d.next = len(d.list)
		return slices.Clone(rest), nil
	}
	if len(rest) == 0 {
		return nil, io.EOF
	}
	rest = rest[:min(n, len(rest))]
	d.next += len(rest)
	return slices.Clone(rest), nil
}

func (d *treeDir) String() string { return fmt.Sprintf("folder %s", d.path) }
