package gitsource

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
)

// treeEntry is one line of a tree object.
type treeEntry struct {
	mode filemode.FileMode
	name string
	hash plumbing.Hash
}

// parseTree reads a tree object. It refuses what is not a sequence of entries with
// a known mode and a usable name; order and duplicates are checkTree's business.
func parseTree(data []byte, visit func(treeEntry) error) error {
	for len(data) > 0 {
		sp := bytes.IndexByte(data, ' ')
		if sp < 0 || sp > 6 {
			return garbagef("tree entry without a mode")
		}
		mode, err := entryMode(string(data[:sp]))
		if err != nil {
			return err
		}
		data = data[sp+1:]
		nul := bytes.IndexByte(data, 0)
		if nul < 0 || len(data) < nul+1+20 {
			return garbagef("truncated tree entry")
		}
		e := treeEntry{mode: mode, name: string(data[:nul])}
		copy(e.hash[:], data[nul+1:])
		data = data[nul+21:]
		if err := visit(e); err != nil {
			return err
		}
	}
	return nil
}

func entryMode(s string) (filemode.FileMode, error) {
	switch s {
	case "40000":
		return filemode.Dir, nil
	case "100644", "100664":
		return filemode.Regular, nil
	case "100755":
		return filemode.Executable, nil
	case "120000":
		return filemode.Symlink, nil
	case "160000":
		return filemode.Submodule, nil
	}
	return 0, garbagef("tree entry with mode %q", s)
}

// entryName says whether a tree may hold an entry of this name.
func entryName(name string) error {
	switch {
	case name == "":
		return garbagef("tree entry without a name")
	case name == "." || name == "..":
		return garbagef("tree entry named %q", name)
	case strings.Contains(name, "/"):
		return garbagef("tree entry %q holds a slash", name)
	case strings.EqualFold(name, ".git") || strings.EqualFold(name, "git~1"):
		return garbagef("tree entry named %q, which Git keeps for itself", name)
	case len(name) > 4096:
		return garbagef("tree entry with a name of %d bytes", len(name))
	}
	return nil
}

// checkTree says whether a tree object is sound: known modes, usable names, in
// order, none twice, at most max entries. It calls link for everything the tree
// points to, submodules excepted.
func checkTree(data []byte, max int, link func(plumbing.Hash, plumbing.ObjectType) error) error {
	seen := make(map[string]bool)
	var last string
	return parseTree(data, func(e treeEntry) error {
		if err := entryName(e.name); err != nil {
			return err
		}
		if seen[e.name] {
			return garbagef("tree with two entries named %q", e.name)
		}
		if seen[e.name] = true; len(seen) > max {
			return limitf("a folder has more than %d entries", max)
		}
		key := e.name
		kind := plumbing.BlobObject
		if e.mode == filemode.Dir {
			key, kind = e.name+"/", plumbing.TreeObject
		}
		if key <= last {
			return garbagef("tree entry %q is out of order", e.name)
		}
		last = key
		if e.hash.IsZero() {
			return garbagef("tree entry %q points to nothing", e.name)
		}
		if e.mode == filemode.Submodule {
			return nil
		}
		return link(e.hash, kind)
	})
}

// commitLinks returns the tree and the parents of a commit object.
func commitLinks(data []byte) (tree plumbing.Hash, parents []plumbing.Hash, err error) {
	line, rest, _ := bytes.Cut(data, []byte("\n"))
	if tree, err = hashLine(line, "tree "); err != nil {
		return tree, nil, fmt.Errorf("commit: %w", err)
	}
	for {
		line, rest, _ = bytes.Cut(rest, []byte("\n"))
		if !bytes.HasPrefix(line, []byte("parent ")) {
			break
		}
		p, err := hashLine(line, "parent ")
		if err != nil {
			return tree, nil, fmt.Errorf("commit: %w", err)
		}
		parents = append(parents, p)
	}
	if !bytes.HasPrefix(line, []byte("author ")) {
		return tree, nil, garbagef("commit without an author line")
	}
	line, _, _ = bytes.Cut(rest, []byte("\n"))
	if !bytes.HasPrefix(line, []byte("committer ")) {
		return tree, nil, garbagef("commit without a committer line")
	}
	return tree, parents, nil
}

// tagLinks returns what an annotated tag points to.
func tagLinks(data []byte) (target plumbing.Hash, kind plumbing.ObjectType, err error) {
	line, rest, _ := bytes.Cut(data, []byte("\n"))
	if target, err = hashLine(line, "object "); err != nil {
		return target, 0, fmt.Errorf("tag: %w", err)
	}
	line, _, _ = bytes.Cut(rest, []byte("\n"))
	name, ok := bytes.CutPrefix(line, []byte("type "))
	if !ok {
		return target, 0, garbagef("tag without a type line")
	}
	if kind, err = plumbing.ParseObjectType(string(name)); err != nil || kind.IsDelta() {
		return target, 0, garbagef("tag of type %q", name)
	}
	return target, kind, nil
}

func hashLine(line []byte, prefix string) (h plumbing.Hash, err error) {
	text, ok := bytes.CutPrefix(line, []byte(prefix))
	if !ok || len(text) != 40 {
		return h, garbagef("no %q line", strings.TrimSpace(prefix))
	}
	if _, err := hex.Decode(h[:], text); err != nil {
		return h, garbagef("bad hash in %q line", strings.TrimSpace(prefix))
	}
	return h, nil
}

// checkFollowed says whether the tree of a commit that is to be followed is within
// bounds and sound all the way down. It counts paths, not objects: a few objects
// that hold each other many times over can make a tree too large to walk, so every
// subtree is counted once and multiplied.
func checkFollowed(r objectReader, tree plumbing.Hash, lim Limits) error {
	w := treeWalk{r: r, lim: lim, paths: make(map[plumbing.Hash]int), height: make(map[plumbing.Hash]int)}
	_, _, err := w.count(tree, ".", 0)
	return err
}

type treeWalk struct {
	r      objectReader
	lim    Limits
	paths  map[plumbing.Hash]int // files and folders below a tree
	height map[plumbing.Hash]int // folders inside folders below a tree
}

func (w *treeWalk) count(h plumbing.Hash, name string, depth int) (paths, height int, err error) {
	if depth > w.lim.Depth {
		return 0, 0, limitf("folder %q: folders inside folders are more than %d deep", name, w.lim.Depth)
	}
	if n, ok := w.paths[h]; ok {
		if depth+w.height[h] > w.lim.Depth {
			return 0, 0, limitf("folder %q: folders inside folders are more than %d deep", name, w.lim.Depth)
		}
		return n, w.height[h], nil
	}
	data, err := readKind(w.r, plumbing.TreeObject, h)
	if err != nil {
		return 0, 0, fmt.Errorf("folder %q: %w", name, err)
	}
	var dirs []treeEntry
	paths = 0
	err = checkTree(data, w.lim.Objects, func(plumbing.Hash, plumbing.ObjectType) error { return nil })
	if err == nil {
		err = parseTree(data, func(e treeEntry) error {
			paths++
			if e.mode == filemode.Dir {
				dirs = append(dirs, e)
			}
			return nil
		})
	}
	if err != nil {
		return 0, 0, fmt.Errorf("folder %q: %w", name, err)
	}
	for _, e := range dirs {
		n, up, err := w.count(e.hash, join(name, e.name), depth+1)
		if err != nil {
			return 0, 0, err
		}
		paths += n
		height = max(height, up+1)
		if paths > w.lim.Files {
			break
		}
	}
	if paths > w.lim.Files {
		return 0, 0, limitf("the tree holds more than %d files and folders", w.lim.Files)
	}
	w.paths[h], w.height[h] = paths, height
	return paths, height, nil
}

func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}
