package dns

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/miekg/dns"
)

func TestCacheIsBounded(t *testing.T) {
	const limit = 1 << 20
	c := newCache(limit)
	keyAt := func(i int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(i)) }
	for i := range 10_000 {
		c.put(&entry{key: string(keyAt(i)), packed: &packed{wire: make([]byte, 100)}})
		c.get(keyAt(0)) // is asked for all the time
	}
	if n, bytes := c.size(); bytes > limit || bytes < limit/2 || n < limit/2/(entryOverhead+200) {
		t.Errorf("%d answers in %d bytes, at most %d are allowed", n, bytes, limit)
	}
	if c.get(keyAt(0)) == nil || c.get(keyAt(9_999)) == nil || c.get(keyAt(1)) != nil {
		t.Error("not the ones that were not asked for longest are gone")
	}
	c.put(&entry{key: "x", packed: &packed{wire: make([]byte, limit)}})
	if c.get([]byte("x")) != nil {
		t.Error("an answer that fills all is remembered")
	}
	for i := range 10_000 { // in place of what is there
		c.put(&entry{key: "y", packed: &packed{wire: make([]byte, i%1000)}})
	}
	before := 0
	for i := range c.shards {
		for _, e := range c.shards[i].entries {
			before += e.bytes()
		}
	}
	if _, bytes := c.size(); bytes != before {
		t.Errorf("counted %d bytes, there are %d", bytes, before)
	}
}

// TestMemory: a flood of names that are not there does not fill more than the cache.
func TestMemory(t *testing.T) {
	s := New(Config{CacheBytes: 1 << 20})
	s.Set(fixture())
	for i := range 20_000 {
		msg, err := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.default.svc.cluster.local.", i), dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		answerTo(s, msg, true)
	}
	if n, bytes := s.cache.size(); bytes > 1<<20 || n < 1000 {
		t.Errorf("%d answers in %d bytes", n, bytes)
	}
}
