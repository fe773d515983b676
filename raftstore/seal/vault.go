// Package seal keeps what a server has on its disk unreadable for others and honest to
// itself: the log, the vote and the snapshots are encrypted and authenticated, what was
// damaged is noticed instead of used, and a disk that is full, slow or broken is told
// apart.
//
// It knows raft's interfaces for storage and nothing about what the entries mean. It
// touches one data folder, and the file with the master key. DESIGN.md beside this
// file says what is detected, how, and what is not.
package seal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// Config says where a [Vault] is. Dir is required.
type Config struct {
	// Dir is the server's data folder. No other process may use it.
	Dir string
	// MasterKey is the file with the master key, keys/master.key in Dir when empty.
	MasterKey string
	// Retain is how many snapshots are kept, 2 when zero.
	Retain int
	// Disk says how the disk is watched.
	Disk DiskConfig
	// Logger may be nil.
	Logger *slog.Logger
}

// Vault is all that raft stores in one data folder. Log, Stable and Snapshots are for
// raft.NewRaft; Disk is to be run and watched by who owns the server.
type Vault struct {
	Keys      *Keyring
	Disk      *Disk
	Log       *LogStore
	Stable    *StableStore
	Snapshots *SnapshotStore

	bolt  *raftboltdb.BoltStore
	keys  sync.Mutex // rotating and pruning
	close func() error
}

// The names in a data folder.
const (
	logFile      = "raft.db"
	markFile     = "raft.mark"
	snapshotsDir = "snapshots"
	keysDir      = "keys"
)

// Open opens or makes the vault in cfg.Dir. A folder that was written without seals is
// taken over as it is, see [OpenLog]. The error matches [ErrCorrupt] or [ErrMasterKey],
// or is the system's. Read everything with [Vault.Verify] before raft gets it.
func Open(cfg Config) (_ *Vault, err error) {
	v := &Vault{Disk: NewDisk(cfg.Dir, cfg.Disk)}
	v.close = sync.OnceValue(v.release)
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	if err := makeDir("data", cfg.Dir); err != nil {
		return nil, err
	}
	v.Disk.clean()
	if v.Keys, err = OpenKeyring(filepath.Join(cfg.Dir, keysDir), cfg.MasterKey); err != nil {
		return nil, err
	}
	if v.bolt, err = OpenBolt(filepath.Join(cfg.Dir, logFile)); err != nil {
		return nil, err
	}
	if v.Log, v.Stable, err = OpenLog(v.bolt, v.Keys, filepath.Join(cfg.Dir, markFile), v.Disk); err != nil {
		return nil, err
	}
	retain := cfg.Retain
	if retain == 0 {
		retain = 2
	}
	v.Snapshots, err = OpenSnapshots(filepath.Join(cfg.Dir, snapshotsDir), retain, v.Keys, v.Disk, cfg.Logger)
	return v, err
}

// Verify is [Verify] of the vault's log and snapshots.
func (v *Vault) Verify(ctx context.Context) (Report, error) {
	return Verify(ctx, v.Log, v.Snapshots)
}

// Rotate makes a new data key for what is written from now on, unless the current one
// has this epoch already. What was written before stays readable with the old key; a
// new snapshot replaces it in time, and then [Vault.Prune] forgets the key.
func (v *Vault) Rotate(epoch uint64) error {
	v.keys.Lock()
	defer v.keys.Unlock()
	if err := v.Keys.Rotate(epoch); err != nil {
		return err
	}
	keys := v.Keys.Keys()
	if v.Stable.sealedWith() == keys[len(keys)-1] {
		return nil
	}
	if err := v.Stable.reseal(); err != nil {
		return fmt.Errorf("rotate the data key to epoch %d: %w", epoch, err)
	}
	return v.Log.remark()
}

// Prune forgets the data keys that nothing on the disk needs, and returns how many those
// were. Call it after a snapshot.
func (v *Vault) Prune() (int, error) {
	v.keys.Lock()
	defer v.keys.Unlock()
	// The mark first: after it, no entry is on its way with a key from before.
	if err := v.Log.remark(); err != nil {
		return 0, fmt.Errorf("prune keys: %w", err)
	}
	used := []KeyID{v.Stable.sealedWith()}
	key, ok, err := v.Log.oldestKey()
	if err != nil {
		return 0, fmt.Errorf("prune keys: %w", err)
	}
	if ok {
		used = append(used, key)
	}
	keys, err := v.Snapshots.keys()
	if err != nil {
		return 0, fmt.Errorf("prune keys: %w", err)
	}
	return v.Keys.Prune(append(used, keys...))
}

// Close closes the log. It is idempotent; raft must have stopped.
func (v *Vault) Close() error { return v.close() }

func (v *Vault) release() error {
	var errs []error
	if v.Log != nil {
		errs = append(errs, v.Log.close())
	}
	if v.bolt != nil {
		errs = append(errs, v.bolt.Close())
	}
	return errors.Join(errs...)
}

// SetAside moves the log and the snapshots of a data folder, damaged as they are, into
// a new folder beside them, and returns its path. The server can then join again, under
// a new raft id. The keys stay, what was set aside can still be read with them. The
// vault must be closed. A crash in between is no harm: what is left makes the next
// [Open] or [Vault.Verify] fail, or is whole.
func SetAside(dir string) (string, error) {
	aside := filepath.Join(dir, "damaged-"+time.Now().UTC().Format("20060102T150405.000Z"))
	if err := os.Mkdir(aside, 0o700); err != nil {
		return "", fmt.Errorf("set damaged data aside: %w", err)
	}
	for _, name := range []string{snapshotsDir, logFile, markFile} {
		err := os.Rename(filepath.Join(dir, name), filepath.Join(aside, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("set damaged data aside: %w", err)
		}
	}
	if err := errors.Join(syncDir("aside", aside), syncDir("aside", dir)); err != nil {
		return "", fmt.Errorf("set damaged data aside: %w", err)
	}
	return aside, nil
}
