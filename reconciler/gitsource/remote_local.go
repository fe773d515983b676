package gitsource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	git "github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/storer"
)

// localSession reads a repository on this machine, bare or with a working tree,
// without running git.
type localSession struct {
	repo    *git.Repository
	objects *storerReader
}

func openLocal(path string, lim Limits) (session, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, because(localCause(err), fmt.Errorf("repository: %w", err))
	}
	repo, err := git.PlainOpenWithOptions(path, &git.PlainOpenOptions{EnableDotGitCommonDir: true})
	if errors.Is(err, git.ErrRepositoryNotExists) {
		return nil, because(CauseNotFound, errors.New("there is no Git repository at this path"))
	}
	if err != nil {
		return nil, because(CauseGarbage, fmt.Errorf("open repository: %w", err))
	}
	if err := refuseBorrowed(path); err != nil {
		return nil, err
	}
	return &localSession{repo: repo, objects: &storerReader{store: repo.Storer, max: lim.ObjectBytes}}, nil
}

func localCause(err error) Cause {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return CauseNotFound
	case errors.Is(err, os.ErrPermission):
		return CauseAuth
	}
	return CauseUnreachable
}

// refuseBorrowed refuses a repository that borrows objects from another one: the
// library looks for them in the wrong place.
func refuseBorrowed(path string) error {
	for _, dir := range []string{path, filepath.Join(path, ".git")} {
		data, err := os.ReadFile(filepath.Join(dir, "objects", "info", "alternates"))
		if err == nil && len(strings.TrimSpace(string(data))) > 0 {
			return because(CauseInvalid, errors.New("the repository borrows objects from another one; run in it: git repack -ad && rm "+filepath.Join(dir, "objects/info/alternates")))
		}
	}
	return nil
}

func (l *localSession) references(ctx context.Context) (*packp.AdvRefs, error) {
	adv := packp.NewAdvRefs()
	if err := setCapabilities(adv.Capabilities, "allow-reachable-sha1-in-want"); err != nil {
		return nil, err
	}
	iter, err := l.repo.Storer.IterReferences()
	if err != nil {
		return nil, because(CauseGarbage, fmt.Errorf("list references: %w", err))
	}
	err = iter.ForEach(func(r *plumbing.Reference) error {
		if r.Type() == plumbing.HashReference && r.Name() != plumbing.HEAD {
			adv.References[r.Name().String()] = r.Hash()
		}
		return ctx.Err()
	})
	if err != nil {
		return nil, because(CauseGarbage, fmt.Errorf("list references: %w", err))
	}
	if head, err := storer.ResolveReference(l.repo.Storer, plumbing.HEAD); err == nil {
		h := head.Hash()
		adv.Head = &h
	}
	if len(adv.References) == 0 && adv.Head == nil {
		return nil, because(CauseNotFound, errors.New("the repository is empty"))
	}
	return adv, nil
}

// pack selects what is missing like the server does, and streams it.
func (l *localSession) pack(ctx context.Context, wants, haves []plumbing.Hash) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	sel := newSelection(ctx, l.objects, &fetchRequest{wants: wants})
	err := sel.checkWants()
	for _, h := range haves {
		if err == nil {
			_, err = sel.addHave(h)
		}
	}
	var list []plumbing.Hash
	if err == nil {
		list, err = sel.objects()
	}
	if err != nil {
		cancel()
		return nil, localReadError(err)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(localReadError(writePack(ctx, pw, l.objects, list)))
	}()
	return &localPack{PipeReader: pr, stop: func() { cancel(); pr.Close(); <-done }}, nil
}

func localReadError(err error) error {
	switch {
	case err == nil, errors.Is(err, ErrLimit), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case strings.HasPrefix(err.Error(), "not our ref"):
		return because(CauseNotFound, err)
	}
	return because(CauseGarbage, err)
}

type localPack struct {
	*io.PipeReader
	stop func()
}

func (p *localPack) Close() error {
	p.stop()
	return nil
}

func (l *localSession) close() error {
	if c, ok := l.repo.Storer.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// storerReader reads the objects of any go-git storage, one at a time.
type storerReader struct {
	store storer.EncodedObjectStorer
	max   int64 // bytes of one object

	mu sync.Mutex
}

func (s *storerReader) read(h plumbing.Hash) (plumbing.ObjectType, []byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	obj, err := s.store.EncodedObject(plumbing.AnyObject, h)
	if err != nil {
		return 0, nil, fmt.Errorf("read object %s: %w", h, err)
	}
	if obj.Size() > s.max {
		return 0, nil, limitf("object %s is larger than %s", h, bytesText(s.max))
	}
	return readObject(h, obj)
}

func (s *storerReader) size(h plumbing.Hash) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.store.EncodedObjectSize(h)
}

func (s *storerReader) has(h plumbing.Hash) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.store.EncodedObject(plumbing.AnyObject, h) // looks into borrowed objects, unlike HasEncodedObject
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		return false, nil
	}
	return err == nil, err
}
