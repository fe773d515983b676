package compile

import (
	"bytes"
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"path"
	"strings"
	"sync"
)

// cache remembers what folders mean. An entry holds the folders that its result depends
// on, or parts of them (its import closure), and the hash of all CUE files in them: it is good for
// any tree in which that hash is the same. It is safe for concurrent use.
type cache struct {
	mu    sync.Mutex
	byDir map[string][]*list.Element // newest last
	order *list.List                 // of *cacheEntry, newest first
	bytes int64
	limit int64
}

type cacheEntry struct {
	dir     string
	deps    []string
	hash    [sha256.Size]byte
	results []*packageResult
	size    int64
}

// maxVariants bounds how many states of one folder are remembered: those of several
// repositories with a folder of the same name.
const maxVariants = 8

func newCache(limit int64) *cache {
	return &cache{byDir: map[string][]*list.Element{}, order: list.New(), limit: limit}
}

// get returns what the folder of the tree means, if that is known.
func (c *cache) get(dir string, h *hasher) ([]*packageResult, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, el := range c.byDir[dir] {
		if e := el.Value.(*cacheEntry); h.sum(e.deps) == e.hash {
			c.order.MoveToFront(el)
			return e.results, true
		}
	}
	return nil, false
}

// put remembers what a folder means. size is the memory the results take, about.
func (c *cache) put(dir string, deps []string, h *hasher, results []*packageResult, size int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := &cacheEntry{dir: dir, deps: deps, hash: h.sum(deps), results: results, size: size}
	for _, el := range c.byDir[dir] {
		if old := el.Value.(*cacheEntry); old.hash == e.hash {
			c.remove(el)
			break
		}
	}
	c.byDir[dir] = append(c.byDir[dir], c.order.PushFront(e))
	c.bytes += size
	if variants := c.byDir[dir]; len(variants) > maxVariants {
		c.remove(variants[0])
	}
	for c.bytes > c.limit && c.order.Len() > 0 {
		c.remove(c.order.Back())
	}
}

// remove drops an entry; the caller holds mu.
func (c *cache) remove(el *list.Element) {
	e := c.order.Remove(el).(*cacheEntry)
	c.bytes -= e.size
	var rest []*list.Element
	for _, other := range c.byDir[e.dir] {
		if other != el {
			rest = append(rest, other)
		}
	}
	if c.byDir[e.dir] = rest; rest == nil {
		delete(c.byDir, e.dir)
	}
}

// hasher hashes the folders of one tree, each once. It is not safe for concurrent use.
type hasher struct {
	tree *tree
	dirs map[string][sha256.Size]byte // by dependency: a folder, or a part of one
}

func newHasher(t *tree) *hasher {
	return &hasher{tree: t, dirs: map[string][sha256.Size]byte{}}
}

// partOf is a dependency on those files of a folder that belong to one package.
func partOf(dir, pkg string) string { return dir + "\x00" + pkg }

// mayBeIn reports whether a file may belong to the package. It looks for the clause
// anywhere, so it says yes too often but never no by mistake, and does not have to parse.
func mayBeIn(data []byte, pkg string) bool {
	if !bytes.Contains(data, []byte(pkg)) {
		return false
	}
	for rest := data; ; {
		i := bytes.Index(rest, []byte("package"))
		if i < 0 {
			return false
		}
		rest = rest[i+len("package"):]
		name := rest
		for len(name) > 0 {
			if trimmed := bytes.TrimLeft(name, " \t\r\n"); len(trimmed) < len(name) {
				name = trimmed
			} else if bytes.HasPrefix(name, []byte("//")) {
				_, name, _ = bytes.Cut(name, []byte("\n"))
			} else {
				break
			}
		}
		if bytes.HasPrefix(name, []byte(pkg)) {
			return true
		}
	}
}

// sum hashes the CUE files of all these folders and parts of folders. One without any
// counts too: it may have some later.
func (h *hasher) sum(deps []string) [sha256.Size]byte {
	all := sha256.New()
	for _, d := range deps {
		sum, ok := h.dirs[d]
		if !ok {
			one := sha256.New()
			dir, pkg, part := strings.Cut(d, "\x00")
			for _, base := range h.tree.dirs[dir] {
				data := h.tree.files[path.Join(dir, base)]
				if part && !mayBeIn(data, pkg) {
					continue
				}
				writeSized(one.Write, []byte(base))
				writeSized(one.Write, data)
			}
			one.Sum(sum[:0])
			h.dirs[d] = sum
		}
		writeSized(all.Write, []byte(d))
		all.Write(sum[:])
	}
	return [sha256.Size]byte(all.Sum(nil))
}

func writeSized(write func([]byte) (int, error), data []byte) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(data)))
	_, _ = write(n[:]) // a hash never fails
	_, _ = write(data)
}
