package raftstore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/seal"
	"decree.dev/decree/raftstore/state"
)

// Storage is what raft keeps on disk.
type Storage struct {
	Log       raft.LogStore
	Stable    raft.StableStore
	Snapshots raft.SnapshotStore
	// Disk is watched, so that a server with a full disk does not lead. Nil: it is
	// taken to be well.
	Disk DiskHealth
	// Close releases everything.
	Close func() error
}

// DiskHealth tells how a disk is doing. [seal.Disk] is one, and says what its methods
// do.
type DiskHealth interface {
	Run(ctx context.Context) error
	Changed() <-chan struct{}
	Healthy() error
	Slow() bool
}

// Founding says how a cluster begins with a state that exists already.
type Founding struct {
	// Dir is the data folder. It must not hold a server's data.
	Dir string
	// NodeID is the only server, Address its host:port.
	NodeID, Address string
	// State is what the cluster begins with. Its cluster id must be a new one.
	State *state.State
	// Open opens the storage of a folder. Nil: as [Open] does by default.
	Open func(dir string) (Storage, error)
	// Logger may be nil.
	Logger *slog.Logger
}

// foundingTerm is the term of the first snapshot: the first election comes after it.
const foundingTerm = 1

// Found makes the folder of a cluster of one server that begins with f.State, and
// leaves it closed: [Open] then finds a cluster. After an error the folder is of no
// use.
func Found(f Founding) (err error) {
	settings := f.State.Settings()
	if f.Dir == "" || f.NodeID == "" || f.Address == "" || settings == nil {
		return errors.New("found a cluster: folder, node, address and the state of a cluster are required")
	}
	id, err := claim(f.Dir, f.NodeID, settings)
	if err != nil {
		return fmt.Errorf("found a cluster in %s: %w", f.Dir, err)
	}
	defer func() {
		if err = errors.Join(err, id.release()); err != nil {
			err = fmt.Errorf("found a cluster in %s: %w", f.Dir, err)
		}
	}()
	if f.Logger == nil {
		f.Logger = slog.New(slog.DiscardHandler)
	}
	if f.Open == nil {
		f.Open = func(dir string) (Storage, error) { return OpenStorage(dir, "") }
	}
	storage, err := f.Open(f.Dir)
	if err != nil {
		return err
	}
	if err := errors.Join(f.write(storage), storage.Close()); err != nil {
		return err
	}
	return id.join(settings.ClusterID)
}

// OpenStorage opens what [Open] would: sealed, with the master key in a file or, when
// that is empty, in the folder.
func OpenStorage(dir, masterKey string) (Storage, error) {
	v, err := seal.Open(seal.Config{Dir: dir, MasterKey: masterKey})
	if err != nil {
		return Storage{}, fmt.Errorf("open the log: %w", err)
	}
	return Storage{Log: v.Log, Stable: v.Stable, Snapshots: v.Snapshots, Disk: v.Disk, Close: v.Close}, nil
}

// write makes raft begin with one snapshot and an empty log. The configuration with
// which raft bootstraps goes into the snapshot, and its log entry away again.
func (f *Founding) write(s Storage) error {
	exists, err := raft.HasExistingState(s.Log, s.Stable, s.Snapshots)
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	if exists {
		return errors.New("it holds a cluster already: choose another folder")
	}
	address := raft.ServerAddress(f.Address)
	transport := loopback(address)
	defer transport.(*raft.InmemTransport).Close()
	cfg := raft.DefaultConfig()
	cfg.LocalID, cfg.Logger = raft.ServerID(f.NodeID), RaftLogger(f.Logger)
	servers := raft.Configuration{Servers: []raft.Server{{ID: cfg.LocalID, Address: address}}}
	if err := raft.BootstrapCluster(cfg, s.Log, s.Stable, s.Snapshots, transport, servers); err != nil {
		return fmt.Errorf("make a new cluster: %w", err)
	}
	last, err := s.Log.LastIndex()
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	if err := f.writeSnapshot(s.Snapshots, transport, servers, last); err != nil {
		return fmt.Errorf("write the first snapshot: %w", err)
	}
	first, err := s.Log.FirstIndex()
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	if err := s.Log.DeleteRange(first, last); err != nil {
		return fmt.Errorf("empty the log: %w", err)
	}
	return nil
}

// writeSnapshot writes the state as of the index after last, with the servers as they
// were at last.
func (f *Founding) writeSnapshot(store raft.SnapshotStore, transport raft.Transport, servers raft.Configuration, last uint64) error {
	// The state names the log index of its last change: the log goes on behind it.
	index := max(f.State.Index(), last+1)
	sink, err := store.Create(raft.SnapshotVersionMax, index, foundingTerm, servers, last, transport)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(sink, 256<<10)
	_, err = f.State.WriteTo(w)
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}
