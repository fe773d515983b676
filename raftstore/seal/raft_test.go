package seal

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// chain is a state machine that hashes all it applies.
type chain struct {
	mu    sync.Mutex
	sum   [32]byte
	count uint64
	moved chan struct{}
}

func (c *chain) Apply(log *raft.Log) any {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sum, c.count = sha256.Sum256(append(c.sum[:], log.Data...)), c.count+1
	c.wake()
	return nil
}

func (c *chain) wake() {
	select {
	case c.moved <- struct{}{}:
	default:
	}
}

func (c *chain) Snapshot() (raft.FSMSnapshot, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return chainSnapshot(binary.BigEndian.AppendUint64(c.sum[:], c.count)), nil
}

func (c *chain) Restore(r io.ReadCloser) error {
	b, err := io.ReadAll(r)
	if err != nil || len(b) != 40 {
		return fmt.Errorf("restore %d bytes: %w", len(b), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sum, c.count = [32]byte(b), binary.BigEndian.Uint64(b[32:])
	c.wake()
	return nil
}

func (c *chain) is(o *chain) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	o.mu.Lock()
	defer o.mu.Unlock()
	return c.sum == o.sum && c.count == o.count
}

type chainSnapshot []byte

func (s chainSnapshot) Persist(sink raft.SnapshotSink) error {
	_, err := sink.Write(s)
	return errors.Join(err, sink.Close())
}

func (chainSnapshot) Release() {}

type server struct {
	*raft.Raft
	vault     *Vault
	chain     *chain
	transport *raft.InmemTransport
}

func startServer(t *testing.T, dir, id string) *server {
	t.Helper()
	s := &server{vault: open(t, dir), chain: &chain{moved: make(chan struct{}, 1)}}
	verify(t, s.vault)
	_, s.transport = raft.NewInmemTransport(raft.ServerAddress(id))
	cfg := raft.DefaultConfig()
	cfg.LocalID, cfg.Logger, cfg.TrailingLogs = raft.ServerID(id), hclog.NewNullLogger(), 5
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout, cfg.CommitTimeout = 100*time.Millisecond, 100*time.Millisecond, 80*time.Millisecond, 5*time.Millisecond
	if id == "a" {
		servers := raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "a"}}}
		err := raft.BootstrapCluster(cfg, s.vault.Log, s.vault.Stable, s.vault.Snapshots, s.transport, servers)
		if err != nil && !errors.Is(err, raft.ErrCantBootstrap) {
			t.Fatal(err)
		}
	}
	var err error
	if s.Raft, err = raft.NewRaft(cfg, s.chain, s.vault.Log, s.vault.Stable, s.vault.Snapshots, s.transport); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) stop(t *testing.T) {
	t.Helper()
	if err := errors.Join(s.Shutdown().Error(), s.vault.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestRaft runs hashicorp/raft on vaults: restarts, snapshots, a rotation, and a second
// server that gets a snapshot first.
func TestRaft(t *testing.T) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	dir := t.TempDir()
	a := startServer(t, filepath.Join(dir, "a"), "a")
	expected := &chain{moved: make(chan struct{}, 1)}
	apply := func(n int) {
		t.Helper()
		<-a.LeaderCh()
		for i := range n {
			data := fmt.Appendf(nil, "\x01 command %d", i)
			expected.Apply(&raft.Log{Data: data})
			if err := a.Apply(data, 0).Error(); err != nil {
				t.Fatal(err)
			}
		}
		if !a.chain.is(expected) {
			t.Fatal("the state is another")
		}
	}
	apply(100)
	if err := a.vault.Rotate(1); err != nil {
		t.Fatal(err)
	}
	if err := a.Snapshot().Error(); err != nil {
		t.Fatal(err)
	}
	a.stop(t)
	a = startServer(t, filepath.Join(dir, "a"), "a")
	apply(50)
	b := startServer(t, filepath.Join(dir, "b"), "b")
	a.transport.Connect("b", b.transport)
	b.transport.Connect("a", a.transport)
	if err := a.AddNonvoter("b", "b", 0, 0).Error(); err != nil {
		t.Fatal(err)
	}
	for !b.chain.is(expected) {
		<-b.chain.moved
	}
	b.stop(t)
	b = startServer(t, filepath.Join(dir, "b"), "b")
	if list, err := b.vault.Snapshots.List(); len(list) != 1 || err != nil {
		t.Fatal(list, err)
	}
	b.stop(t)
	a.stop(t)
}
