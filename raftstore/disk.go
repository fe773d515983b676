package raftstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"decree.dev/decree/raftstore/seal"
)

// ErrCorrupt is matched by the error of Open about a folder whose log or snapshot is
// damaged. Nothing of it was used: see [Abandon].
var ErrCorrupt = seal.ErrCorrupt

// openStorage opens what raft stores.
func (s *Store) openStorage() (err error) {
	if s.cfg.Storage == nil {
		return s.openVault()
	}
	if s.storage, err = s.cfg.Storage(s.cfg.Dir); err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	return nil
}

// openVault opens the sealed storage, and reads all of it: what is damaged must be known
// before this server takes part in anything.
func (s *Store) openVault() (err error) {
	s.vault, err = seal.Open(seal.Config{
		Dir: s.cfg.Dir, MasterKey: s.cfg.MasterKey, Logger: s.log,
		Disk: seal.DiskConfig{Observe: func(what string, took time.Duration) {
			s.metrics.diskSeconds.WithLabelValues(what).Observe(took.Seconds())
		}},
	})
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	v := s.vault
	s.storage = Storage{Log: v.Log, Stable: v.Stable, Snapshots: v.Snapshots, Disk: v.Disk, Close: v.Close}
	begun := time.Now()
	report, err := s.vault.Verify(context.Background())
	if err != nil {
		return fmt.Errorf("verify the log: %w", err)
	}
	s.log.Debug("log verified", "entries", report.Entries, "first", report.First, "last", report.Last, "took", time.Since(begun))
	return nil
}

// Abandon sets the damaged log and snapshots of a closed store's folder aside, and the
// server's identity with them: a server that lost a part of its log must not vote as if
// it had it. It can join the cluster again under a new id. Abandon returns where the
// damaged files are.
func Abandon(dir string) (string, error) {
	aside, err := seal.SetAside(dir)
	if err != nil {
		return aside, err
	}
	if err := os.Rename(filepath.Join(dir, identityFile), filepath.Join(aside, identityFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return aside, fmt.Errorf("set the identity aside: %w", err)
	}
	return aside, syncDir(dir)
}

// watchDisk keeps a server with a full disk from leading: it could not write, and the
// others can. It leads again when there is room. A broken disk stops the store.
func (s *Store) watchDisk() {
	disk := s.storage.Disk
	if disk == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	probing := make(chan struct{})
	go func() {
		defer close(probing)
		if err := disk.Run(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("watching the disk", "error", err)
		}
	}()
	defer func() { cancel(); <-probing }()
	full := false
	for {
		changed := disk.Changed()
		err := disk.Healthy()
		switch {
		case errors.Is(err, seal.ErrDisk):
			s.fsm.fail(fmt.Errorf("%w: the disk is broken: %w", ErrFatal, err))
		case err != nil && !full:
			s.log.Error("the disk is full: this server does not lead until there is room", "error", err)
			full = true
			s.standAside(ctx, true)
		case err == nil && full:
			s.log.Info("there is room on the disk again")
			full = false
			s.standAside(ctx, false)
		}
		select {
		case <-changed:
		case <-s.closing:
			return
		case <-s.fsm.stopped:
			return
		}
	}
}

// never is longer than any leader is silent.
const never = 24 * time.Hour

// standAside keeps this server from standing for election, and hands over the lead if it
// has it; or lets it stand again.
func (s *Store) standAside(ctx context.Context, aside bool) {
	cfg := s.raft.ReloadableConfig()
	cfg.HeartbeatTimeout, cfg.ElectionTimeout = s.cfg.HeartbeatTimeout, s.cfg.ElectionTimeout
	if aside && !s.alone() {
		cfg.HeartbeatTimeout, cfg.ElectionTimeout = never, never
	}
	if err := s.raft.ReloadConfig(cfg); err != nil {
		s.log.Warn("change the election timeouts", "error", err)
	}
	if aside && s.IsLeader() && !s.alone() {
		ctx, cancel := context.WithTimeout(ctx, 5*s.cfg.ElectionTimeout)
		defer cancel()
		if err := s.TransferLeadership(ctx, ""); err != nil && !errors.Is(err, ErrNotLeader) {
			s.log.Warn("hand over the lead of a server whose disk is full", "error", err)
		}
	}
}

// alone reports whether this server is the only voter.
func (s *Store) alone() bool {
	for _, m := range s.Members() {
		if m.Voter && m.ID != s.cfg.NodeID {
			return false
		}
	}
	return true
}

// Trouble says what is wrong with this server's disk; empty if nothing is.
func (s *Store) Trouble() string {
	disk := s.storage.Disk
	if disk == nil {
		return ""
	}
	if err := disk.Healthy(); err != nil {
		return err.Error()
	}
	if disk.Slow() {
		return "slow disk"
	}
	return ""
}

// KeyEpoch is the epoch of the key that new entries and snapshots are encrypted with.
func (s *Store) KeyEpoch() int64 {
	if s.vault == nil {
		return 0
	}
	return int64(s.vault.Keys.Epoch())
}

var errNoKeys = errors.New("the storage was not opened by the store and has no keys")

// RotateKeys encrypts everything that is written from now on with a key of an epoch,
// unless there is one already. A snapshot lets the old log go; keys that nothing needs
// any more are forgotten.
func (s *Store) RotateKeys(epoch int64) error {
	if s.vault == nil {
		return fmt.Errorf("rotate keys: %w", errNoKeys)
	}
	if s.KeyEpoch() < epoch {
		if err := s.vault.Rotate(uint64(epoch)); err != nil {
			return fmt.Errorf("rotate keys: %w", err)
		}
	}
	if err := s.Snapshot(); err != nil {
		return fmt.Errorf("rotate keys: %w", err)
	}
	return s.PruneKeys()
}

// PruneKeys forgets the keys that nothing on disk is encrypted with any more.
func (s *Store) PruneKeys() error {
	if s.vault == nil {
		return fmt.Errorf("prune keys: %w", errNoKeys)
	}
	n, err := s.vault.Prune()
	if n > 0 {
		s.log.Info("old keys forgotten", "keys", n)
	}
	return err
}
