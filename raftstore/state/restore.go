package state

import (
	"fmt"
	"slices"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// Restore makes the first state of a new cluster from a backup of another one.
//
// What users and controllers wrote is kept: objects with their UIDs and revisions,
// the records of commits, the keys of transactions, and every allocation. What belongs
// to the servers and machines of the old cluster goes: its authority, its tokens, its
// servers, the machines it knew, and transactions of which parts are missing.
//
// jump is added to the revision, so that whoever knows a revision of the old cluster's
// later history does not mistake it for one of this; it should exceed what the old
// cluster can have written since the backup. now is in milliseconds since 1970. The
// index becomes zero, the new cluster's log begins there. Errors: the old state has no
// settings, or the id does not tell the clusters apart.
func Restore(old *State, clusterID string, now int64, jump uint64) (*State, error) {
	if old.settings == nil {
		return nil, fmt.Errorf("restore: the backup is of a cluster before its first transaction, there is nothing in it")
	}
	settings := *old.settings
	settings.ClusterID = clusterID
	settings.Restored = &command.Restored{ClusterID: old.settings.ClusterID, Revision: old.revision, Time: now}
	if err := CheckBootstrap(&settings); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	if old.revision+jump < old.revision {
		return nil, fmt.Errorf("restore: revision %d cannot be raised by %d", old.revision, jump)
	}
	next, e := *old, new(edit)
	next.settings, next.parts = &settings, nil
	next.index, next.revision, next.time = 0, old.revision+jump, max(old.time, now)
	next.tables = slices.Clone(old.tables)
	for _, kind := range kinds {
		if !kind.controlPlane {
			continue
		}
		for _, o := range old.tables[kind.index].all() {
			if owner := controllerOf(o); owner != nil {
				next.owned.delete(e, ownedKey(owner.UID, api.KeyOf(o)))
			}
		}
		next.tables[kind.index] = table{}
	}
	return &next, nil
}
