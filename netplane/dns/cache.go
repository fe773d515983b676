package dns

import (
	"hash/maphash"
	"sync"
	"time"
)

const (
	shards = 16
	// entryOverhead is what an entry takes besides its bytes: the structs, and its
	// share of a map. Measured, and rounded up.
	entryOverhead = 320
)

// entry is an answer that is remembered. It is immutable, but for its links.
//
// Times are since the server was made, by its monotonic clock.
type entry struct {
	key string
	*packed
	// generation is that of the zone that the answer is from; zero: it is from upstream.
	generation uint64
	born, dies time.Duration
	// again is when upstream may be asked once more after that went wrong.
	again time.Duration
	// rcode is kept for the metrics.
	rcode int

	newer, older *entry
}

func (e *entry) bytes() int { return entryOverhead + len(e.key) + len(e.wire) + 2*len(e.ttls) }

// cache remembers answers, up to a number of bytes; what was not asked for longest goes
// first. Methods may be called concurrently.
type cache struct {
	seed   maphash.Seed
	limit  int // bytes of one shard
	shards [shards]shard
}

type shard struct {
	mu      sync.Mutex
	entries map[string]*entry
	ring    entry // newer is the oldest one, older the newest
	bytes   int
	_       [64]byte // shards are used by several cores
}

// newCache returns a cache for about that many bytes.
func newCache(bytes int) *cache {
	c := &cache{seed: maphash.MakeSeed(), limit: bytes / shards}
	c.clear()
	return c
}

func (c *cache) shard(hash uint64) *shard { return &c.shards[hash%shards] }

// get returns what is remembered under key, whatever its age, or nil.
func (c *cache) get(key []byte) *entry {
	s := c.shard(maphash.Bytes(c.seed, key))
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[string(key)]
	if e != nil && s.ring.older != e {
		s.unlink(e)
		s.link(e)
	}
	return e
}

// put remembers e in place of what is there under its key.
func (c *cache) put(e *entry) {
	s := c.shard(maphash.String(c.seed, e.key))
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.entries[e.key]; old != nil {
		s.drop(old)
	}
	if e.bytes() > c.limit {
		return
	}
	s.entries[e.key] = e
	s.bytes += e.bytes()
	s.link(e)
	for s.bytes > c.limit {
		s.drop(s.ring.newer)
	}
}

// clear forgets everything.
func (c *cache) clear() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		s.entries, s.bytes = map[string]*entry{}, 0
		s.ring.newer, s.ring.older = &s.ring, &s.ring
		s.mu.Unlock()
	}
}

// size is how many answers are remembered, and in how many bytes.
func (c *cache) size() (entries, bytes int) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		entries += len(s.entries)
		bytes += s.bytes
		s.mu.Unlock()
	}
	return entries, bytes
}

// link makes e the newest.
func (s *shard) link(e *entry) {
	e.older, e.newer = s.ring.older, &s.ring
	e.older.newer, e.newer.older = e, e
}

func (s *shard) unlink(e *entry) { e.older.newer, e.newer.older = e.newer, e.older }

func (s *shard) drop(e *entry) {
	s.unlink(e)
	delete(s.entries, e.key)
	s.bytes -= e.bytes()
}
