package gitsource

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
)

func TestTreeIsAFileSystem(t *testing.T) {
	b := newBench(t)
	c := b.seed(hello)
	if err := fstest.TestFS(c.Tree, "app.cue", "run.sh", "sub/dir/one", "link"); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]fs.FileMode{
		"app.cue": 0o444, "run.sh": 0o555, "sub": fs.ModeDir | 0o555, "link": fs.ModeSymlink | 0o777, ".": fs.ModeDir | 0o555,
	} {
		info, err := fs.Stat(c.Tree, name)
		if err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v; want %v", name, info, err, want)
		}
	}
	if _, err := fs.ReadFile(c.Tree, "link"); !errors.Is(err, errSymlink) {
		t.Errorf("reading a symbolic link: %v", err)
	}
	if target, err := fs.ReadLink(c.Tree, "link"); err != nil || target != "../../etc/passwd" {
		t.Errorf("link: %q, %v", target, err)
	}
	for _, name := range []string{"link/x", "app.cue/x", "none", "sub/none"} {
		if _, err := fs.ReadFile(c.Tree, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"../x", "/etc/passwd", "sub/../app.cue", ""} {
		if _, err := c.Tree.Open(name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTreeConcurrently(t *testing.T) {
	b := newBench(t)
	c := b.seed(hello)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				if data, err := fs.ReadFile(c.Tree, "sub/dir/one"); err != nil || string(data) != "one\n" {
					t.Errorf("%q, %v", data, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestSubmodulesAreIrregular(t *testing.T) {
	q := testQuarantine(t)
	root, err := q.writeLoose(plumbing.TreeObject, encodeTree([]treeEntry{
		{filemode.Submodule, "sub", plumbing.NewHash(strings.Repeat("ab", 20))},
	}))
	if err != nil {
		t.Fatal(err)
	}
	if err := checkFollowed(q, root, Limits{}.withDefaults()); err != nil {
		t.Error(err)
	}
	tree := newTreeFS(q, root, hello["app.cue"].ModTime)
	if info, err := fs.Stat(tree, "sub"); err != nil || info.Mode() != fs.ModeIrregular {
		t.Errorf("submodule: %v, %v", info, err)
	}
	if _, err := fs.ReadFile(tree, "sub"); !errors.Is(err, errSubmodule) {
		t.Errorf("reading a submodule: %v", err)
	}
}

func testQuarantine(t testing.TB) *quarantine {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "x.git")
	if err := initBare(dir); err != nil {
		t.Fatal(err)
	}
	q, err := newQuarantine(dir, newObjectDir(dir))
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// TestTreeBomb: eleven objects that stand for ten thousand million files.
func TestTreeBomb(t *testing.T) {
	q := testQuarantine(t)
	h, err := q.writeLoose(plumbing.BlobObject, []byte("boom"))
	if err != nil {
		t.Fatal(err)
	}
	mode := filemode.Regular
	for range 10 {
		var list []treeEntry
		for i := range 10 {
			list = append(list, treeEntry{mode, fmt.Sprint(i), h})
		}
		if h, err = q.writeLoose(plumbing.TreeObject, encodeTree(list)); err != nil {
			t.Fatal(err)
		}
		mode = filemode.Dir
	}
	if err := checkFollowed(q, h, Limits{}.withDefaults()); !errors.Is(err, ErrLimit) {
		t.Errorf("a bomb: %v", err)
	}
}

func TestTreeDepth(t *testing.T) {
	q := testQuarantine(t)
	h, err := q.writeLoose(plumbing.TreeObject, nil)
	if err != nil {
		t.Fatal(err)
	}
	var at []plumbing.Hash
	for range 70 {
		if h, err = q.writeLoose(plumbing.TreeObject, encodeTree([]treeEntry{{filemode.Dir, "d", h}})); err != nil {
			t.Fatal(err)
		}
		at = append(at, h)
	}
	lim := Limits{}.withDefaults()
	if err := checkFollowed(q, at[63], lim); err != nil {
		t.Errorf("64 deep: %v", err)
	}
	if err := checkFollowed(q, at[64], lim); !errors.Is(err, ErrLimit) {
		t.Errorf("65 deep: %v", err)
	}
	// The same folder twice, once shallow and once too deep.
	both, err := q.writeLoose(plumbing.TreeObject, encodeTree([]treeEntry{{filemode.Dir, "a", at[30]}, {filemode.Dir, "b", at[60]}}))
	if err != nil {
		t.Fatal(err)
	}
	if both, err = q.writeLoose(plumbing.TreeObject, encodeTree([]treeEntry{{filemode.Dir, "c", both}, {filemode.Dir, "d", at[62]}})); err != nil {
		t.Fatal(err)
	}
	if err := checkFollowed(q, both, lim); err != nil {
		t.Errorf("at the limit: %v", err)
	}
}

func TestCheckTree(t *testing.T) {
	h := strings.Repeat("\x01", 20)
	for name, tt := range map[string]struct {
		data string
		ok   bool
	}{
		"empty":           {"", true},
		"file and folder": {"100644 a\x00" + h + "40000 b\x00" + h, true},
		"git's order":     {"100644 a.b\x00" + h + "40000 a\x00" + h + "100644 a0\x00" + h, true},
		"no name":         {"100644 \x00" + h, false},
		"dot":             {"40000 .\x00" + h, false},
		"dot dot":         {"40000 ..\x00" + h, false},
		".git":            {"40000 .git\x00" + h, false},
		".GIT":            {"40000 .GiT\x00" + h, false},
		"absolute":        {"100644 /etc/passwd\x00" + h, false},
		"slash":           {"100644 a/../../b\x00" + h, false},
		"twice":           {"100644 a\x00" + h + "100644 a\x00" + h, false},
		"twice, apart":    {"100644 a\x00" + h + "100644 a.b\x00" + h + "40000 a\x00" + h, false},
		"order":           {"100644 b\x00" + h + "100644 a\x00" + h, false},
		"mode":            {"100600 a\x00" + h, false},
		"device":          {"20644 a\x00" + h, false},
		"padded mode":     {"040000 a\x00" + h, false},
		"truncated":       {"100644 a\x00" + h[:10], false},
		"no mode":         {"a\x00" + h, false},
		"zero hash":       {"100644 a\x00" + strings.Repeat("\x00", 20), false},
		"long name":       {"100644 " + strings.Repeat("a", 5000) + "\x00" + h, false},
	} {
		err := checkTree([]byte(tt.data), 100, func(plumbing.Hash, plumbing.ObjectType) error { return nil })
		if (err == nil) != tt.ok || (err != nil && !errors.Is(err, ErrGarbage)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var many bytes.Buffer
	for i := range 101 {
		fmt.Fprintf(&many, "100644 %03d\x00%s", i, h)
	}
	err := checkTree(many.Bytes(), 100, func(plumbing.Hash, plumbing.ObjectType) error { return nil })
	if !errors.Is(err, ErrLimit) {
		t.Errorf("101 entries: %v", err)
	}
}

func TestSeedPassesOverGitAndEmptyFolders(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	for _, p := range []string{"a/.git/config", "a/x.cue"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(p)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, p), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "empty"), 0o755); err != nil {
		t.Fatal(err)
	}
	c, err := b.server.Seed(t.Context(), "shop", os.DirFS(dir), "Ann <ann@example.org>", "first\n\nmore")
	if err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(c.Tree, "a/x.cue"); err != nil {
		t.Error(err)
	}
	if _, err := fs.Stat(c.Tree, "a/.git"); err == nil {
		t.Error(".git was stored")
	}
	if c.Subject != "first" || c.Author != "Ann <ann@example.org>" {
		t.Errorf("%+v", c)
	}
	b.mustGit(filepath.Join(b.dir, "repos", "shop.git"), "fsck", "--strict", c.Hash)
}
