package compile

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"path"
	"sync"
)

// cache remembers what folders mean. An entry holds the folders that its result depends
// on (its import closure) and the hash of all CUE files in them: it is good for
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

// hasher hashes the folders of one tree, each once.
type hasher struct {
	tree *tree
	dirs map[string][sha256.Size]byte
}

func newHasher(t *tree) *hasher {
	return &hasher{tree: t, dirs: map[string][sha256.Size]byte{}}
}

// sum hashes the CUE files of all these folders. A folder without any counts too: it may
// have some later.
func (h *hasher) sum(dirs []string) [sha256.Size]byte {
	all := sha256.New()
	for _, d := range dirs {
		sum, ok := h.dirs[d]
		if !ok {
			one := sha256.New()
			for _, base := range h.tree.dirs[d] {
				data := h.tree.files[path.Join(d, base)]
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
