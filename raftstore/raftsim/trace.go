package raftsim

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"sync"
	"time"
)

// trace hashes everything that happens, in order and with its fake time: two runs with
// the same hash were the same run.
type trace struct {
	begun time.Time
	tell  func([]byte)

	mu     sync.Mutex
	hash   hash.Hash
	events int
	line   []byte
}

func newTrace(tell func([]byte)) *trace {
	return &trace{begun: time.Now(), tell: tell, hash: sha256.New()}
}

func (t *trace) add(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events++
	t.line = fmt.Appendf(t.line[:0], "%.6f ", time.Since(t.begun).Seconds())
	t.line = append(fmt.Appendf(t.line, format, args...), '\n')
	t.hash.Write(t.line)
	if t.tell != nil {
		t.tell(t.line)
	}
}

func (t *trace) sum() (string, int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return hex.EncodeToString(t.hash.Sum(nil)[:16]), t.events
}
