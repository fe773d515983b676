package gitsource

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
)

// ErrMoved says that another table of references came into force meanwhile.
var ErrMoved = errors.New("the references have changed meanwhile")

// References says which references a repository has beside FollowedRef.
//
// They are written down as a whole in a table, which is an object of the
// repository, and in force is the table that the replicated state names, as with
// the commit in force. So all servers have the same references, and of two servers
// that change them at the same moment one is told that it was too late.
// Implementations are safe for concurrent use.
type References interface {
	// Table returns the hash of the table in force, "" for none.
	Table(ctx context.Context, repository string) (string, error)
	// Replace puts the table new into force if old ("" for none) is in force.
	// Otherwise it changes nothing and the error matches ErrMoved.
	Replace(ctx context.Context, repository, old, new, pusher string) error
}

// tableHead is the first line of a table; then follow lines of hash and name,
// sorted by name.
const tableHead = "decree references 1\n"

// table holds references by name.
type table map[string]plumbing.Hash

func (t table) encode() []byte {
	out := []byte(tableHead)
	for _, name := range slices.Sorted(maps.Keys(t)) {
		out = fmt.Appendf(out, "%s %s\n", t[name], name)
	}
	return out
}

func parseTable(data []byte) (table, error) {
	rest, ok := bytes.CutPrefix(data, []byte(tableHead))
	if !ok {
		return nil, garbagef("not a table of references")
	}
	t, last := table{}, ""
	for line := range strings.Lines(string(rest)) {
		hash, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		h, err := parseHash(hash)
		if err != nil || name <= last || !ordinary(name) {
			return nil, garbagef("table of references: line %q", line)
		}
		t[name], last = h, name
	}
	return t, nil
}

// ordinary says whether clients may push a reference of this name. FollowedRef is
// no part of a table.
func ordinary(name string) bool {
	n := plumbing.ReferenceName(name)
	return n.Validate() == nil && (n.IsBranch() || n.IsTag() || n.IsNote()) && name != FollowedRef
}

// hashes lists what the table points to, each once, sorted.
func (t table) hashes() []plumbing.Hash {
	list := slices.Collect(maps.Values(t))
	plumbing.HashesSort(list)
	return slices.Compact(list)
}

// apply carries out commands, deletions first, on a copy of the table and says which
// of them cannot be.
func (t table) apply(commands []*packp.Command, max int) (next table, refused map[plumbing.ReferenceName]error) {
	next, refused = maps.Clone(t), make(map[plumbing.ReferenceName]error)
	for _, deletions := range []bool{true, false} {
		for _, c := range commands {
			if (c.Action() == packp.Delete) != deletions {
				continue
			}
			if err := next.mayChange(c, max); err != nil {
				refused[c.Name] = err
				continue
			}
			next.change(c)
		}
	}
	return next, refused
}

// mayChange says why a command cannot be carried out on the table.
func (t table) mayChange(c *packp.Command, max int) error {
	name := c.Name.String()
	if old := t[name]; old != c.Old {
		return fmt.Errorf("fetch first: it is at %s now", short(old))
	}
	if c.Action() != packp.Create {
		return nil
	}
	if len(t) >= max {
		return limitf("the repository has %d references; delete some", len(t))
	}
	for other := range t {
		if strings.HasPrefix(other, name+"/") || strings.HasPrefix(name, other+"/") {
			return fmt.Errorf("%s exists, and Git keeps references like files and folders", other)
		}
	}
	return nil
}

func (t table) change(c *packp.Command) {
	if c.Action() == packp.Delete {
		delete(t, c.Name.String())
	} else {
		t[c.Name.String()] = c.New
	}
}

// table returns the references in force beside FollowedRef, and the hash of their
// table.
func (s *Server) table(ctx context.Context, repo *repository) (t table, at string, err error) {
	if at, err = s.references(repo).Table(ctx, repo.name); err != nil {
		return nil, "", fmt.Errorf("references of %s: %w", repo.name, err)
	}
	if at == "" {
		t, err = repo.oldTable()
		return t, at, err
	}
	h, err := parseHash(at)
	if err != nil {
		return nil, "", fmt.Errorf("references of %s: %w", repo.name, err)
	}
	if err := s.obtain(ctx, repo, h); err != nil {
		return nil, "", fmt.Errorf("the references of %s are not stored on this server yet: %w", repo.name, err)
	}
	data, err := readKind(repo.objects, plumbing.BlobObject, h)
	if err == nil {
		t, err = parseTable(data)
	}
	if err != nil {
		return nil, "", fmt.Errorf("references of %s: table %s: %w", repo.name, h, err)
	}
	return t, at, nil
}

// oldTable reads the references that were kept as files, before there were tables.
// They count until the first table is in force.
func (r *repository) oldTable() (table, error) {
	refs, err := r.refs.list()
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(refs, func(name string, _ plumbing.Hash) bool { return !ordinary(name) })
	return refs, nil
}

// replaceTable stores a table here and on other servers and puts it into force
// instead of the one at old.
func (s *Server) replaceTable(ctx context.Context, repo *repository, old string, t table, pusher string) (err error) {
	q, err := newQuarantine(repo.dir, repo.objects)
	if err != nil {
		return err
	}
	defer func() {
		if rerr := q.remove(); rerr != nil {
			s.log.Warn("remove quarantine", "repository", repo.name, "error", rerr)
		}
	}()
	h, err := q.writeLoose(plumbing.BlobObject, t.encode())
	if err != nil {
		return err
	}
	if err := q.release(); err != nil {
		return err
	}
	if err := s.spread(ctx, repo, h); err != nil {
		return err
	}
	return s.references(repo).Replace(ctx, repo.name, old, h.String(), pusher)
}

// AdoptReferences puts the references of a repository that are still kept as files
// into a table. Where one is in force, or no such files are, it does nothing.
func (s *Server) AdoptReferences(ctx context.Context, name string) error {
	repo, err := s.repository(name)
	if err != nil {
		return err
	}
	if old, err := repo.oldTable(); err != nil || len(old) == 0 {
		return err
	}
	release, err := repo.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	t, at, err := s.table(ctx, repo)
	if err != nil || at != "" {
		return err
	}
	if err := s.replaceTable(ctx, repo, "", t, "system"); err != nil && !errors.Is(err, ErrMoved) {
		return fmt.Errorf("adopt references of %s: %w", name, err)
	}
	return nil
}

func (s *Server) references(repo *repository) References {
	if s.cfg.References != nil {
		return s.cfg.References
	}
	return localReferences{repo.dir}
}

// localReferences remembers the table in force of one repository in its folder. The
// caller serializes changes.
type localReferences struct{ dir string }

func (l localReferences) path() string { return filepath.Join(l.dir, "decree-references") }

func (l localReferences) Table(context.Context, string) (string, error) {
	data, err := os.ReadFile(l.path())
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(data)), err
}

func (l localReferences) Replace(ctx context.Context, repository, old, new, _ string) error {
	if now, err := l.Table(ctx, repository); err != nil || now != old {
		return errors.Join(ErrMoved, err)
	}
	if err := writeDurable(l.path(), []byte(new+"\n")); err != nil {
		return err
	}
	return syncDir(l.dir)
}
