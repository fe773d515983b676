// Package raftstore keeps the cluster's state: it replicates transactions with
// hashicorp/raft, makes them durable, applies them with state.Reduce and tells
// watchers what changed.
//
// It knows nothing about what the objects mean, and nothing about HTTP; those live
// in reconciler and raftstore/apiserver. It touches its data folder, its transport
// and nothing else. DESIGN.md beside this file tells how proposals, reads and
// watches work.
package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/seal"
	"decree.dev/decree/raftstore/state"
)

// Config says where a Store lives and how it behaves. Dir and NodeID are required,
// everything else has a default.
type Config struct {
	// Dir is the data folder; it is made if absent. One process uses it at a time.
	Dir string
	// NodeID names this server in the cluster, for ever.
	NodeID string
	// Bootstrap are the settings of a new cluster; an empty ClusterID is drawn at
	// random. They are ignored once the cluster has settings, but a ClusterID other
	// than the folder's is refused. Nil: an empty folder waits to be joined.
	Bootstrap *command.Bootstrap
	// Servers are the first servers of a new cluster, the same list on all of them.
	// Nil: this one alone.
	Servers []raft.Server
	// Transport connects the servers; the store closes it. Nil: an in-memory one
	// that reaches nobody.
	Transport raft.Transport
	// Peers, when not nil, is how this server asks another one that leads: proposals
	// and reads then work on every server. Nil: they fail where this one does not lead.
	Peers Peers
	// Logger receives what raft and the store have to say. Nil: nothing is logged.
	Logger *slog.Logger
	// Metrics, when not nil, gets the store's collectors; Close takes them back.
	Metrics prometheus.Registerer
	// Fatal is called once, on its own goroutine, when the store has to stop because
	// the log holds what it must not skip. Every later call of the store fails.
	Fatal func(error)

	// Storage opens what raft keeps on disk. Nil: sealed, in Dir, with the keys that
	// [Store.RotateKeys] is about; with another one there are none.
	Storage func(dir string) (Storage, error)
	// MasterKey is the file with the key that wraps the keys of everything on disk;
	// keys/master.key in Dir when empty.
	MasterKey string
	// Format is the newest log format to understand and to write; command.Newest when
	// zero. With an older one a server stands in for the version before this one.
	Format int

	// HeartbeatTimeout is how long a follower waits for its leader before it stands
	// for election: 300 ms when zero. A single server does not wait.
	HeartbeatTimeout time.Duration
	// ElectionTimeout is how long a candidate waits for votes; HeartbeatTimeout when
	// zero.
	ElectionTimeout time.Duration
	// SnapshotThreshold is how many log entries make a snapshot worth while, 8192
	// when zero; SnapshotInterval how often that is checked, 2 min when zero;
	// TrailingLogs how many entries stay for slow followers, 4096 when zero.
	SnapshotThreshold uint64
	SnapshotInterval  time.Duration
	TrailingLogs      uint64
	// HistoryEvents and HistoryBytes bound what watchers can go back to: 100,000
	// events and 32 MiB (in encoded size) when zero.
	HistoryEvents int
	HistoryBytes  int
	// PendingBytes bounds the proposals that wait: 64 MiB when zero. More make
	// Propose wait for room.
	PendingBytes int64
	// WholeBytes is how large a transaction may be, encoded, that travels in one piece,
	// 2 MiB when zero; PartBytes the size of the pieces of a larger one, 1 MiB when zero
	// and command.MaxPart at most. Tests want small ones.
	WholeBytes, PartBytes int
}

func (c *Config) setDefaults() {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.HeartbeatTimeout, 300*time.Millisecond)
	setDefault(&c.ElectionTimeout, c.HeartbeatTimeout)
	setDefault(&c.SnapshotThreshold, 8192)
	setDefault(&c.SnapshotInterval, 2*time.Minute)
	setDefault(&c.TrailingLogs, 4096)
	setDefault(&c.HistoryEvents, 100_000)
	setDefault(&c.HistoryBytes, 32<<20)
	setDefault(&c.PendingBytes, 64<<20)
	setDefault(&c.Format, command.Newest)
	setDefault(&c.WholeBytes, 2<<20)
	setDefault(&c.PartBytes, 1<<20)
	c.PendingBytes = max(c.PendingBytes, command.MaxEntry+proposalOverhead)
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Store is one server of the cluster. All methods are safe for concurrent use.
type Store struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	identity *identity
	storage  Storage
	vault    *seal.Vault // nil with a Storage of the caller's
	raft     *raft.Raft
	overlap  *overlapLog
	fsm      *fsm
	hub      *hub

	room    *semaphore.Weighted // bytes of waiting proposals
	mu      sync.Mutex
	waiting []*proposal
	wake    chan struct{} // capacity 1: waiting is not empty
	flights chan flight   // entries handed to raft, in order

	nextRound    *round        // the reads that the next question to the quorum answers
	readers      chan struct{} // capacity 1: nextRound is not nil
	leaderChange chan struct{} // closed and replaced when who leads has changed

	// readTerm is the term in which this server, as leader, has applied everything
	// that earlier leaders acknowledged; zero before that.
	readTerm  atomic.Uint64
	handover  handover
	asking    sync.WaitGroup // questions that raft has not answered yet
	stopRaft  func() error   // stops raft once, and waits for it
	ready     chan struct{}
	closing   chan struct{}
	landed    chan struct{} // closed when every proposal is answered, after closing
	stopped   chan struct{} // closed when raft has stopped
	closeOnce sync.Once
	closeErr  error
	running   sync.WaitGroup

	formats formats
}

// Open opens or creates the store in cfg.Dir and starts it. It returns before the
// server is of use: wait for [Store.Ready]. It fails if another process holds the
// folder, or if the folder belongs to another server or cluster.
func Open(cfg Config) (_ *Store, err error) {
	if cfg.Dir == "" || cfg.NodeID == "" {
		return nil, errors.New("open store: Dir and NodeID are required")
	}
	if cfg.Bootstrap != nil {
		settings := *cfg.Bootstrap
		if settings.ClusterID == "" {
			settings.ClusterID = newClusterID()
		}
		if err := state.CheckBootstrap(&settings); err != nil {
			return nil, fmt.Errorf("open store: settings of the cluster: %w", err)
		}
	}
	cfg.setDefaults()
	s := &Store{
		cfg:     cfg,
		log:     cfg.Logger,
		room:    semaphore.NewWeighted(cfg.PendingBytes),
		wake:    make(chan struct{}, 1),
		flights: make(chan flight, 1),
		readers: make(chan struct{}, 1), leaderChange: make(chan struct{}),
		ready:   make(chan struct{}),
		closing: make(chan struct{}),
		landed:  make(chan struct{}),
		stopped: make(chan struct{}),
		formats: formats{now: command.Oldest, joining: map[string]int{}},
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open store in %s: %w", cfg.Dir, err)
			s.release()
		}
	}()
	if s.identity, err = claim(cfg.Dir, cfg.NodeID, cfg.Bootstrap); err != nil {
		return nil, err
	}
	s.metrics = newMetrics(s)
	s.hub = newHub(cfg.HistoryEvents, cfg.HistoryBytes, s.metrics)
	s.fsm = newFSM(s.hub, s.metrics, cfg.Format, s.formats.note, s.stop)
	if err := s.startRaft(); err != nil {
		return nil, err
	}
	if err := s.checkCluster(); err != nil {
		return nil, err
	}
	if err := s.metrics.register(cfg.Metrics); err != nil {
		return nil, err
	}
	s.running.Go(s.lead)
	s.running.Go(s.batch)
	s.running.Go(s.land)
	s.running.Go(s.answerReads)
	s.running.Go(s.watchDisk)
	return s, nil
}

// startRaft opens the log, makes a new cluster if there is none, and starts raft.
func (s *Store) startRaft() error {
	logger := RaftLogger(s.log)
	if err := s.openStorage(); err != nil {
		return err
	}
	if err := syncDir(s.cfg.Dir); err != nil {
		return err
	}
	if s.cfg.Transport == nil {
		s.cfg.Transport = loopback(raft.ServerAddress(s.cfg.NodeID))
	}
	cfg := s.raftConfig()
	cfg.Logger = logger
	if s.cfg.Bootstrap != nil {
		if err := s.bootstrapRaft(cfg); err != nil {
			return err
		}
	}
	var err error
	var running atomic.Pointer[raft.Raft]
	s.overlap = newOverlapLog(s.storage.Log, func() bool { return leadsOthers(running.Load()) })
	if s.raft, err = raft.NewRaft(cfg, s.fsm, s.overlap, s.storage.Stable, onlyNewer{s.storage.Snapshots}, overlapping(onlyTrueVotes(s.cfg.Transport), s.overlap)); err != nil {
		return fmt.Errorf("start raft: %w", err)
	}
	running.Store(s.raft)
	s.stopRaft = sync.OnceValue(s.shutdownRaft)
	s.campaignIfAlone()
	return nil
}

// loopback is a transport that reaches its own server only.
func loopback(address raft.ServerAddress) raft.Transport {
	_, t := raft.NewInmemTransport(address)
	t.Connect(address, t)
	return t
}

func (s *Store) raftConfig() *raft.Config {
	cfg := raft.DefaultConfig()
	cfg.LocalID = raft.ServerID(s.cfg.NodeID)
	cfg.HeartbeatTimeout = s.cfg.HeartbeatTimeout
	cfg.ElectionTimeout = s.cfg.ElectionTimeout
	cfg.LeaderLeaseTimeout = max(5*time.Millisecond, s.cfg.HeartbeatTimeout*4/5)
	cfg.CommitTimeout = min(cfg.CommitTimeout, max(time.Millisecond, s.cfg.HeartbeatTimeout/10))
	cfg.SnapshotThreshold = s.cfg.SnapshotThreshold
	cfg.SnapshotInterval = s.cfg.SnapshotInterval
	cfg.TrailingLogs = s.cfg.TrailingLogs
	// A leader that loses its vote or is removed follows from then on. Who runs the
	// server decides whether it ends.
	cfg.ShutdownOnRemove = false
	return cfg
}

// bootstrapRaft writes the first configuration, unless the folder has one.
func (s *Store) bootstrapRaft(cfg *raft.Config) error {
	exists, err := raft.HasExistingState(s.storage.Log, s.storage.Stable, s.storage.Snapshots)
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	if exists {
		return nil
	}
	servers := s.cfg.Servers
	if servers == nil {
		servers = []raft.Server{{ID: cfg.LocalID, Address: s.cfg.Transport.LocalAddr()}}
	}
	if err := raft.BootstrapCluster(cfg, s.storage.Log, s.storage.Stable, s.storage.Snapshots, s.cfg.Transport, raft.Configuration{Servers: servers}); err != nil {
		return fmt.Errorf("make a new cluster: %w", err)
	}
	return nil
}

// checkCluster compares the snapshot's cluster with the folder's.
func (s *Store) checkCluster() error {
	settings := s.View().Settings()
	if settings == nil || s.identity.ClusterID == "" || settings.ClusterID == s.identity.ClusterID {
		return nil
	}
	return fmt.Errorf("the folder belongs to cluster %s, its snapshot to %s: restore the folder from one backup", s.identity.ClusterID, settings.ClusterID)
}

// stop is called by the state machine when it must not go on.
func (s *Store) stop(err error) {
	s.log.Error("the store stops", "error", err)
	go func() {
		if s.cfg.Fatal != nil {
			s.cfg.Fatal(err)
		}
	}()
}

// Ready is closed once the server knows the cluster's settings and its leader, and,
// if it leads, has applied everything that was acknowledged before.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// WaitReady waits for [Store.Ready].
func (s *Store) WaitReady(ctx context.Context) error {
	if fatal := s.fsm.fatal.Load(); fatal != nil {
		return *fatal
	}
	select {
	case <-s.ready:
		return nil
	case <-s.closing:
		return ErrClosed
	case <-s.fsm.stopped:
		return *s.fsm.fatal.Load()
	case <-ctx.Done():
		return fmt.Errorf("waiting for the store to have a leader: %w", context.Cause(ctx))
	}
}

// View returns the state as this server knows it; on a follower, or on a leader
// that was just deposed without knowing it, newer ones may exist.
func (s *Store) View() *state.State { return s.fsm.state.Load() }

// Leader returns the id and address of the leader, empty if none is known.
func (s *Store) Leader() (id, address string) {
	a, i := s.raft.LeaderWithID()
	return string(i), string(a)
}

// IsLeader reports whether this server leads, as far as it knows.
func (s *Store) IsLeader() bool { return s.raft.State() == raft.Leader }

// ClusterID is the id of the cluster, empty before Ready.
func (s *Store) ClusterID() string {
	if settings := s.View().Settings(); settings != nil {
		return settings.ClusterID
	}
	return ""
}

// Snapshot writes a snapshot now instead of when it is due.
func (s *Store) Snapshot() error {
	err := s.raft.Snapshot().Error()
	switch {
	case err == nil, errors.Is(err, raft.ErrNothingNewToSnapshot):
		return nil
	case errors.Is(err, raft.ErrRaftShutdown):
		err = ErrClosed
	}
	return fmt.Errorf("write snapshot: %w", err)
}

// closeTimeout is how long Close waits for entries that raft is working on.
const closeTimeout = 2 * time.Second

// Close stops the server and releases the folder. Proposals that wait get
// ErrClosed, watches end with it. Close is idempotent.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.HandOver()
		s.mu.Lock() // who passed refusal before has been counted
		close(s.closing)
		s.mu.Unlock()
		s.hub.close()
		s.awaitEnd(s.landed) // entries under way may still be acknowledged
		s.closeErr = s.release()
	})
	return s.closeErr
}

// awaitEnd waits for done, but not longer than closeTimeout or raft last.
func (s *Store) awaitEnd(done <-chan struct{}) {
	timer := time.NewTimer(closeTimeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-s.stopped:
	case <-timer.C:
	}
}

// shutdownRaft stops raft and waits for it. Raft forgets questions that are open when
// it stops, so they are waited for; new ones are refused already.
func (s *Store) shutdownRaft() error {
	defer close(s.stopped)
	s.mu.Lock() // who passed refusal before has been counted
	answered := make(chan struct{})
	s.mu.Unlock()
	go func() { s.asking.Wait(); close(answered) }()
	s.awaitEnd(answered)
	s.overlap.close()
	if err := s.raft.Shutdown().Error(); err != nil {
		return fmt.Errorf("stop raft: %w", err)
	}
	return nil
}

// release gives back, in reverse order, whatever Open got hold of.
func (s *Store) release() error {
	var errs []error
	if s.raft != nil {
		errs = append(errs, s.stopRaft())
	} else if c, ok := s.cfg.Transport.(io.Closer); ok {
		errs = append(errs, c.Close())
	}
	if s.overlap != nil {
		s.overlap.close()
	}
	s.running.Wait()
	if s.metrics != nil {
		s.metrics.unregister(s.cfg.Metrics)
	}
	if s.storage.Close != nil {
		errs = append(errs, s.storage.Close())
	}
	if s.identity != nil {
		errs = append(errs, s.identity.release())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close store in %s: %w", s.cfg.Dir, err)
	}
	return nil
}

// syncDir makes the names in a folder durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}
