package gitsource

import (
	"context"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
)

func hashOf(c string) plumbing.Hash { return plumbing.NewHash(strings.Repeat(c, 40)) }

func TestTableEncoding(t *testing.T) {
	in := table{"refs/heads/b": hashOf("1"), "refs/heads/a/x": hashOf("2"), "refs/tags/v1": hashOf("1")}
	out, err := parseTable(in.encode())
	if err != nil || !maps.Equal(in, out) {
		t.Errorf("%v, %v", out, err)
	}
	if got := in.hashes(); len(got) != 2 {
		t.Errorf("hashes %v", got)
	}
	line := func(name string) string { return hashOf("1").String() + " " + name + "\n" }
	for what, text := range map[string]string{
		"nothing":           "",
		"another file":      "replicas: 2\n",
		"no hash":           tableHead + "refs/heads/a\n",
		"the followed one":  tableHead + line(FollowedRef),
		"a strange one":     tableHead + line("refs/decree/x"),
		"a path":            tableHead + line("refs/heads/../../x"),
		"twice":             tableHead + line("refs/heads/a") + line("refs/heads/a"),
		"out of order":      tableHead + line("refs/heads/b") + line("refs/heads/a"),
		"cut off in a hash": tableHead + line("refs/heads/a")[:20],
	} {
		if got, err := parseTable([]byte(text)); err == nil {
			t.Errorf("%s: parsed as %v", what, got)
		}
	}
}

func TestTableApply(t *testing.T) {
	now := table{"refs/heads/a": hashOf("1"), "refs/heads/d/e": hashOf("1")}
	zero, one, two := plumbing.ZeroHash, hashOf("1"), hashOf("2")
	tests := []struct {
		name     string
		old, new plumbing.Hash
		ref      string
		want     string
	}{
		{"create", zero, two, "refs/heads/b", ""},
		{"change", one, two, "refs/heads/a", ""},
		{"delete", one, zero, "refs/heads/a", ""},
		{"create what exists", zero, two, "refs/heads/a", "fetch first"},
		{"change what moved", two, one, "refs/heads/a", "fetch first: it is at 111111111111 now"},
		{"delete what is gone", one, zero, "refs/heads/z", "fetch first: it is at no commit now"},
		{"a folder where a reference is", zero, two, "refs/heads/a/b", "refs/heads/a exists"},
		{"a reference where a folder is", zero, two, "refs/heads/d", "refs/heads/d/e exists"},
	}
	for _, tt := range tests {
		c := &packp.Command{Name: plumbing.ReferenceName(tt.ref), Old: tt.old, New: tt.new}
		next, refused := now.apply([]*packp.Command{c}, 10)
		if tt.want != "" {
			if err := refused[c.Name]; err == nil || !strings.Contains(err.Error(), tt.want) || !maps.Equal(next, now) {
				t.Errorf("%s: %v, %v", tt.name, err, next)
			}
		} else if len(refused) > 0 || next[tt.ref] != tt.new {
			t.Errorf("%s: %v, %v", tt.name, refused, next)
		}
	}
	// Deletions make room, whatever the order.
	swap := []*packp.Command{{Name: "refs/heads/a/b", New: two}, {Name: "refs/heads/a", Old: one}}
	if next, refused := now.apply(swap, 2); len(refused) > 0 || next["refs/heads/a/b"] != two {
		t.Errorf("swap: %v, %v", refused, next)
	}
	if _, refused := now.apply([]*packp.Command{{Name: "refs/heads/c", New: two}}, 2); refused["refs/heads/c"] == nil {
		t.Error("more references than allowed")
	}
	if len(now) != 2 {
		t.Errorf("apply changed its receiver: %v", now)
	}
}

// TestReferenceFilesAreAdopted: a repository from before there were tables.
func TestReferenceFilesAreAdopted(t *testing.T) {
	b := newBench(t)
	first := b.seed(hello)
	repo, err := b.server.repository("shop")
	if err != nil {
		t.Fatal(err)
	}
	h := plumbing.NewHash(first.Hash)
	for _, name := range []string{"refs/heads/old", "refs/decree/ours", FollowedRef} {
		if err := repo.refs.set(name, h); err != nil {
			t.Fatal(err)
		}
	}
	work := b.clone()
	if out := b.mustGit(work, "ls-remote", "origin"); !strings.Contains(out, "refs/heads/old") || strings.Contains(out, "ours") {
		t.Errorf("before: %s", out)
	}
	if err := b.server.AdoptReferences(t.Context(), "shop"); err != nil {
		t.Fatal(err)
	}
	got, at, err := b.server.table(t.Context(), repo)
	if err != nil || at == "" || !maps.Equal(got, table{"refs/heads/old": h}) {
		t.Errorf("table %v at %q, %v", got, at, err)
	}
	b.mustGit(work, "push", "-q", "origin", ":old")
	if err := b.server.AdoptReferences(t.Context(), "shop"); err != nil {
		t.Fatal(err)
	}
	if out := b.mustGit(work, "ls-remote", "origin"); strings.Contains(out, "old") {
		t.Errorf("a deleted reference came back: %s", out)
	}
}

// TestCrashDuringRelease stops after every step and looks whether a commit that is
// there is there whole.
func TestCrashDuringRelease(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	var hashes []string
	for _, name := range []string{"a/b/c", "a/b/d", "e"} {
		hashes = append(hashes, b.commit(work, name, name))
	}
	b.mustGit(work, "tag", "-a", "v1", "-m", "one")
	tag := strings.TrimSpace(b.mustGit(work, "rev-parse", "v1"))
	data := packOf(t, b, work, "v1", "main", "--not", "origin/main")
	for stop := 0; ; stop++ {
		repo := filepath.Join(t.TempDir(), "repo.git")
		if err := os.CopyFS(repo, os.DirFS(filepath.Join(b.dir, "repos", "shop.git"))); err != nil {
			t.Fatal(err)
		}
		main := newObjectDir(repo)
		q, err := newQuarantine(repo, main)
		if err != nil {
			t.Fatal(err)
		}
		if err := q.receivePack(t.Context(), strings.NewReader(data), Limits{}.withDefaults()); err != nil {
			t.Fatal(err)
		}
		steps, err := q.steps()
		if err != nil {
			t.Fatal(err)
		}
		if want := 2 + 3 + 1; len(steps) != want {
			t.Fatalf("%d steps, want %d: files, indexes, 3 commits, a tag", len(steps), want)
		}
		if stop > len(steps) {
			break
		}
		for _, files := range steps[:stop] {
			if err := q.move(files); err != nil {
				t.Fatal(err)
			}
		}
		main.refresh()
		if err := removeQuarantines(repo); err != nil {
			t.Fatal(err)
		}
		var there []string
		for _, h := range append(slices.Clone(hashes), tag) {
			if ok, err := main.has(plumbing.NewHash(h)); err != nil {
				t.Fatal(err)
			} else if ok {
				there = append(there, h)
				b.mustGit(repo, "rev-list", "--objects", "--quiet", h) // fails when anything is missing
			}
		}
		if want := max(0, stop-2); len(there) != want {
			t.Errorf("after %d steps there are %d commits and tags, want %d", stop, len(there), want)
		}
		main.refresh() // closes files
	}
}

// packOf makes a pack of what a revision list names.
func packOf(t *testing.T, b *bench, work string, revs ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", "pack-objects", "--revs", "--stdout", "-q")
	cmd.Dir, cmd.Env, cmd.Stdin = work, b.env, strings.NewReader(strings.Join(revs, "\n")+"\n")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// A push is not begun again for the objects of a Receiver that forgets durable, and
// the replicas are asked once.
func TestReplicasAreAskedOnce(t *testing.T) {
	asked := &askedReplicas{}
	b := newBench(t, func(c *ServerConfig) { c.Replicas = asked })
	b.seed(hello)
	asked.spread = nil
	work := b.clone()
	hash := b.commit(work, "a", "1")
	b.recv.receive = func(ctx context.Context, p *Push, durable func() error, _ io.Writer) error {
		for range 2 {
			if err := b.recv.accept(p, durable); err != nil {
				return err
			}
		}
		return nil
	}
	b.mustGit(work, "push", "-q", "origin", "main")
	if !slices.Equal(asked.spread, []string{hash}) {
		t.Errorf("asked about %v, want %s once", asked.spread, hash)
	}
}

type askedReplicas struct{ spread []string }

func (a *askedReplicas) Spread(_ context.Context, _, hash string) error {
	a.spread = append(a.spread, hash)
	return nil
}

func (a *askedReplicas) Obtain(context.Context, string, string) error { return ErrNotFound }
