package raftstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore/command"
)

// identity is what a data folder says about itself, in identity.json. The folder
// stays locked while an identity is held.
type identity struct {
	Format    int    `json:"format"`
	NodeID    string `json:"nodeID"`
	ClusterID string `json:"clusterID,omitempty"` // empty until the cluster is known

	dir  string
	lock *os.File
}

const identityFile = "identity.json"

// Identity returns to which server and cluster the data folder dir belongs, without
// opening it; both are empty if it does not exist.
func Identity(dir string) (nodeID, clusterID string, err error) {
	data, err := os.ReadFile(filepath.Join(dir, identityFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	var id identity
	if err == nil {
		err = json.Unmarshal(data, &id)
	}
	if err != nil {
		return "", "", fmt.Errorf("read identity of %s: %w (restore the folder from a backup)", dir, err)
	}
	return id.NodeID, id.ClusterID, nil
}

// claim locks dir for this process and makes sure that it belongs to this server
// and cluster.
func claim(dir, nodeID string, bootstrap *command.Bootstrap) (_ *identity, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the data folder: %w", err)
	}
	id := &identity{dir: dir}
	if id.lock, err = lockFolder(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			id.release()
		}
	}()
	data, err := os.ReadFile(filepath.Join(dir, identityFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return id, id.settle(nodeID)
	case err != nil:
		return nil, fmt.Errorf("read the folder's identity: %w", err)
	}
	if err := json.Unmarshal(data, id); err != nil {
		return nil, fmt.Errorf("read %s: %w (restore the folder from a backup)", identityFile, err)
	}
	return id, id.check(nodeID, bootstrap)
}

// lockFolder takes a lock that ends with the process, however it ends.
func lockFolder(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.New("another process uses this data folder: stop it first, or choose another folder")
		}
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	return f, nil
}

// settle makes a new folder this server's.
func (id *identity) settle(nodeID string) error {
	for _, name := range []string{"raft.db", "snapshots"} {
		if _, err := os.Lstat(filepath.Join(id.dir, name)); err == nil {
			return fmt.Errorf("the folder has a %s but no %s: it was not made by decree, or is incomplete (choose another folder, or restore it from a backup)", name, identityFile)
		}
	}
	id.Format, id.NodeID = 1, nodeID
	return id.write()
}

func (id *identity) check(nodeID string, bootstrap *command.Bootstrap) error {
	if id.Format != 1 {
		return fmt.Errorf("the folder has format %d, this version of decree knows format 1", id.Format)
	}
	if id.NodeID != nodeID {
		return fmt.Errorf("the folder belongs to node %q, this is node %q: choose another folder or start with the former name", id.NodeID, nodeID)
	}
	if bootstrap != nil && bootstrap.ClusterID != "" && id.ClusterID != "" && bootstrap.ClusterID != id.ClusterID {
		return fmt.Errorf("the folder belongs to cluster %s, not to %s", id.ClusterID, bootstrap.ClusterID)
	}
	return nil
}

// join writes down which cluster the folder belongs to.
func (id *identity) join(clusterID string) error {
	if id.ClusterID == clusterID {
		return nil
	}
	if id.ClusterID != "" {
		return fmt.Errorf("the folder belongs to cluster %s, its log to %s: restore the folder from one backup", id.ClusterID, clusterID)
	}
	id.ClusterID = clusterID
	return id.write()
}

// write replaces the identity file durably: old or new, never half.
func (id *identity) write() error {
	data, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return fmt.Errorf("write the folder's identity: %w", err)
	}
	path := filepath.Join(id.dir, identityFile)
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write the folder's identity: %w", err)
	}
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("write the folder's identity: %w", err)
	}
	return syncDir(id.dir)
}

func (id *identity) release() error {
	if err := id.lock.Close(); err != nil { // closing unlocks
		return fmt.Errorf("unlock the data folder: %w", err)
	}
	return nil
}
