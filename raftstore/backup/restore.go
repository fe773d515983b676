package backup

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/state"
)

// RevisionJump is how far a restored cluster's revision is ahead of its archive's. The
// old cluster went on after the snapshot and told clients of revisions that the new
// one must not give to something else. A year of 30,000 changes a second is less, and a
// cluster can be restored 8,000 times before revisions are more than numbers in JSON can
// say (2^53).
const RevisionJump = 1 << 40

// Transform makes of a restored state the first one of another cluster: state.Restore.
type Transform func(old *state.State, clusterID string, nowMs int64, jump uint64) (*state.State, error)

// ImportRepository reads an exported repository to its end and makes it below dir.
type ImportRepository func(ctx context.Context, s *state.State, dir, name string, r io.Reader) error

// RestoreConfig says what [Restore] makes. Dir, Node, Address and Transform are required.
type RestoreConfig struct {
	// Dir is the data folder. It must not exist, or be empty.
	Dir string
	// Node is the id of the only server of the new cluster, Address its host:port.
	Node, Address string
	Transform     Transform
	// Storage opens what raft keeps on disk; nil: as raftstore does by default.
	Storage func(dir string) (raftstore.Storage, error)
	// Import makes the repository name below the folder dir from what an export wrote,
	// for a cluster that begins with s. Nil: archives with repositories are refused.
	Import ImportRepository
	// Finish, when not nil, adds to the unfinished data folder what else it needs.
	Finish func(dir string) error
	Now    time.Time
	Logger *slog.Logger // may be nil
}

// Restored is what [Restore] made, and of what.
type Restored struct {
	From      Manifest `json:"from"`
	ClusterID string   `json:"clusterID"` // new
	Revision  uint64   `json:"revision"`
	Dir       string   `json:"dir"`
	// Leftovers are folders of restores that were interrupted; they can be removed.
	Leftovers []string `json:"leftovers,omitempty"`
}

// The folders in a data folder.
const (
	raftDir = "raft"
	gitDir  = "git"
)

// Restore founds a new cluster of one server from an archive. The data folder appears
// complete or not at all: it is built beside its place and renamed once the whole
// archive has been read and checked and everything is on disk.
//
// The new cluster has another id, so that no server, agent or snapshot of the old one
// takes it for its own, and a revision that the old one cannot have reached.
func Restore(ctx context.Context, r io.Reader, keys Keys, cfg RestoreConfig) (_ Restored, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore snapshot into %s: %w", cfg.Dir, err)
		}
	}()
	if cfg.Dir == "" || cfg.Node == "" || cfg.Address == "" || cfg.Transform == nil {
		return Restored{}, errors.New("folder, node, address and transform are required")
	}
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return Restored{}, err
	}
	if real, err := filepath.EvalSymlinks(cfg.Dir); err == nil { // a link itself cannot become a folder
		cfg.Dir = real
	}
	if err := free(cfg.Dir); err != nil {
		return Restored{}, err
	}
	plain, _, err := unlock(r, keys)
	if err != nil {
		return Restored{}, err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Dir), 0o700); err != nil {
		return Restored{}, err
	}
	b := &building{cfg: cfg, out: Restored{Dir: cfg.Dir}}
	b.out.Leftovers, _ = filepath.Glob(globQuote(cfg.Dir) + ".restoring-*") // the pattern is good
	if b.dir, err = os.MkdirTemp(filepath.Dir(cfg.Dir), filepath.Base(cfg.Dir)+".restoring-"); err != nil {
		return Restored{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(b.dir))
		}
	}()
	if err := b.build(ctx, plain); err != nil {
		return Restored{}, err
	}
	if err := syncTree(b.dir); err != nil {
		return Restored{}, err
	}
	// The kernel replaces an empty folder, and refuses one that has been filled since.
	if err := unix.Rename(b.dir, cfg.Dir); err != nil {
		return Restored{}, &os.LinkError{Op: "rename", Old: b.dir, New: cfg.Dir, Err: err}
	}
	return b.out, syncDir(filepath.Dir(cfg.Dir))
}

// free says why dir cannot become a data folder.
func free(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var here, above unix.Stat_t
	if err := errors.Join(unix.Stat(dir, &here), unix.Stat(filepath.Dir(dir), &above)); err != nil {
		return err
	}
	if here.Dev != above.Dev { // it cannot be renamed over
		return fmt.Errorf("the folder is the root of a file system: restore into a folder below it, such as %s", filepath.Join(dir, "decree"))
	}
	if len(entries) > 0 {
		return errors.New("the folder is not empty: restore makes a new one, and touches none that exists (move it away, or choose another)")
	}
	return nil
}

// globQuote makes a path match itself only.
func globQuote(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// building is a data folder that is not complete yet.
type building struct {
	cfg RestoreConfig
	dir string
	// state is what the new cluster begins with.
	state *state.State
	out   Restored
}

func (b *building) build(ctx context.Context, plain io.Reader) error {
	if err := walk(ctx, plain, visitor{
		manifest: func(m *Manifest) error {
			b.out.From = *m
			if names := m.Repositories(); len(names) > 0 && b.cfg.Import == nil {
				return fmt.Errorf("the snapshot has repositories, and there is nothing to import them with: %s", strings.Join(names, ", "))
			}
			return nil
		},
		state: b.found,
		repository: func(name string, r io.Reader) error {
			if err := os.MkdirAll(filepath.Join(b.dir, gitDir), 0o700); err != nil {
				return err
			}
			if err := b.cfg.Import(ctx, b.state, filepath.Join(b.dir, gitDir), name, r); err != nil {
				return fmt.Errorf("repository %s: %w", name, err)
			}
			return nil
		},
	}); err != nil {
		return err
	}
	if b.cfg.Finish != nil {
		return b.cfg.Finish(b.dir)
	}
	return nil
}

// found makes the store's folder from the restored state.
func (b *building) found(old *state.State) error {
	var id [16]byte
	rand.Read(id[:]) // never fails
	b.out.ClusterID = hex.EncodeToString(id[:])
	next, err := b.cfg.Transform(old, b.out.ClusterID, b.cfg.Now.UnixMilli(), RevisionJump)
	if err != nil {
		return err
	}
	if next.Settings() == nil || next.Settings().ClusterID != b.out.ClusterID || next.Revision() < old.Revision()+RevisionJump {
		return errors.New("the restored state could be confused with that of the old cluster: this is a bug")
	}
	b.state, b.out.Revision = next, next.Revision()
	return raftstore.Found(raftstore.Founding{
		Dir: filepath.Join(b.dir, raftDir), NodeID: b.cfg.Node, Address: b.cfg.Address, State: next,
		Open: b.cfg.Storage, Logger: b.cfg.Logger,
	})
}

// syncTree makes everything below dir durable.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && !d.Type().IsRegular() {
			return nil
		}
		return syncDir(path)
	})
}

// syncDir makes a folder or a file durable.
func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return nil
}
