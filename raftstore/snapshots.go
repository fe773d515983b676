package raftstore

import (
	"fmt"

	"github.com/hashicorp/raft"
)

// onlyNewer is a SnapshotStore that takes no snapshot older than the newest one it has.
//
// A leader that takes this server for further behind than it is may send one:
// hashicorp/raft would go back to it, and then find that the log in between was cut
// after the newer one. It panics.
type onlyNewer struct{ raft.SnapshotStore }

// Create implements raft.SnapshotStore.
func (o onlyNewer) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, t raft.Transport) (raft.SnapshotSink, error) {
	list, err := o.List()
	if err != nil {
		return nil, fmt.Errorf("look for newer snapshots: %w", err)
	}
	if len(list) > 0 && index < list[0].Index {
		return nil, fmt.Errorf("take a snapshot of index %d: there is one of %d", index, list[0].Index)
	}
	return o.SnapshotStore.Create(version, index, term, c, cIndex, t)
}
