package gitsource

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
)

// Seed stores a folder as the first commit of a repository, creating the
// repository if needed, and returns the commit. The objects are durable when it
// returns; nothing is in force by that: the caller applies the commit, and the
// Receiver's Head names it from then on.
//
// author is "Name <mail>". Folders named .git are passed over; symbolic links are
// kept as such. A repository that has a commit in force is ErrExists.
func (s *Server) Seed(ctx context.Context, name string, tree fs.FS, author, message string) (*Commit, error) {
	if err := s.Init(ctx, name); err != nil {
		return nil, err
	}
	repo, err := s.repository(name)
	if err != nil {
		return nil, err
	}
	release, err := repo.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	head, err := s.head(ctx, name)
	if err != nil {
		return nil, err
	}
	if !head.IsZero() {
		return nil, fmt.Errorf("seed repository %s: commit %s is in force: %w", name, short(head), ErrExists)
	}
	c, err := s.seed(ctx, repo, tree, author, message)
	if err != nil {
		return nil, fmt.Errorf("seed repository %s: %w", name, err)
	}
	return c, nil
}

func (s *Server) seed(ctx context.Context, repo *repository, tree fs.FS, author, message string) (c *Commit, err error) {
	q, err := newQuarantine(repo.dir, repo.objects)
	if err != nil {
		return nil, err
	}
	defer func() {
		if rerr := q.remove(); rerr != nil {
			err = errors.Join(err, rerr)
		}
	}()
	root, err := writeFolder(ctx, q, tree, ".", s.limits)
	if err != nil {
		return nil, err
	}
	if root.IsZero() { // Git has no empty folders, save at the root
		if root, err = q.writeLoose(plumbing.TreeObject, nil); err != nil {
			return nil, err
		}
	}
	if err := checkFollowed(q, root, s.limits); err != nil {
		return nil, err
	}
	who := strings.NewReplacer("\n", " ", "\x00", " ").Replace(author)
	if !strings.HasSuffix(who, ">") {
		who += " <>"
	}
	stamp := fmt.Sprintf("%s %d +0000", who, time.Now().Unix())
	text := fmt.Sprintf("tree %s\nauthor %s\ncommitter %s\n\n%s\n", root, stamp, stamp, strings.TrimRight(message, "\n"))
	h, err := q.writeLoose(plumbing.CommitObject, []byte(text))
	if err != nil {
		return nil, err
	}
	q.note(h)
	if err := q.release(); err != nil {
		return nil, err
	}
	if err := s.spread(ctx, repo, h); err != nil {
		return nil, err
	}
	return openCommit(repo.objects, h)
}

// writeFolder stores a folder and all below it, and returns zero if it is empty.
func writeFolder(ctx context.Context, q *quarantine, tree fs.FS, dir string, lim Limits) (plumbing.Hash, error) {
	if ctx.Err() != nil {
		return plumbing.ZeroHash, context.Cause(ctx)
	}
	list, err := fs.ReadDir(tree, dir)
	if err != nil {
		return plumbing.ZeroHash, err
	}
	var entries []treeEntry
	for _, d := range list {
		if d.Name() == ".git" {
			continue
		}
		e, err := writeEntry(ctx, q, tree, join(dir, d.Name()), d, lim)
		if err != nil {
			return plumbing.ZeroHash, err
		}
		if !e.hash.IsZero() {
			entries = append(entries, e)
		}
	}
	if len(entries) == 0 {
		return plumbing.ZeroHash, nil
	}
	return q.writeLoose(plumbing.TreeObject, encodeTree(entries))
}

func writeEntry(ctx context.Context, q *quarantine, tree fs.FS, path string, d fs.DirEntry, lim Limits) (e treeEntry, err error) {
	e = treeEntry{name: d.Name()}
	var data []byte
	switch {
	case d.IsDir():
		e.mode = filemode.Dir
		e.hash, err = writeFolder(ctx, q, tree, path, lim)
		return e, err
	case d.Type()&fs.ModeSymlink != 0:
		target, err := fs.ReadLink(tree, path)
		if err != nil {
			return e, err
		}
		e.mode, data = filemode.Symlink, []byte(target)
	case d.Type().IsRegular():
		info, err := d.Info()
		if err != nil {
			return e, err
		}
		if info.Size() > lim.ObjectBytes {
			return e, limitf("%s is larger than %s", path, bytesText(lim.ObjectBytes))
		}
		if e.mode = filemode.Regular; info.Mode()&0o111 != 0 {
			e.mode = filemode.Executable
		}
		if data, err = fs.ReadFile(tree, path); err != nil {
			return e, err
		}
	default:
		return e, fmt.Errorf("%s is neither a file, a folder nor a symbolic link", path)
	}
	e.hash, err = q.writeLoose(plumbing.BlobObject, data)
	return e, err
}

// encodeTree writes entries in the order that Git wants: folders as if their name
// ended in a slash.
func encodeTree(entries []treeEntry) []byte {
	key := func(e treeEntry) string {
		if e.mode == filemode.Dir {
			return e.name + "/"
		}
		return e.name
	}
	slices.SortFunc(entries, func(a, b treeEntry) int { return strings.Compare(key(a), key(b)) })
	var out []byte
	for _, e := range entries {
		out = fmt.Appendf(out, "%o %s\x00", uint32(e.mode), e.name)
		out = append(out, e.hash[:]...)
	}
	return out
}
