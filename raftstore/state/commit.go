package state

import (
	"fmt"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// KeepRevisions is how many Revision objects of one source are kept. It is part of
// the state machine: replicas with different values diverge.
const KeepRevisions = 1000

// checkCommit refuses a commit that does not continue what is in force.
func (d *draft) checkCommit() *command.Rejection {
	c := d.txn.Commit
	if c == nil {
		return nil
	}
	key := api.Key{Resource: api.Sources, Name: c.Source}
	if c.Revision == nil {
		return invalid(key, "a commit without the Revision to keep")
	}
	spec := &c.Revision.Spec
	if spec.Source != c.Source {
		return invalid(key, "the commit's Revision is of source %q", spec.Source)
	}
	o, ok := d.get(slotOf(key))
	if !ok {
		return &command.Rejection{Code: command.NotFound, Key: key, Message: "does not exist, so no commit of it can come into force"}
	}
	switch spec.Result {
	case api.RevisionRefused:
		if len(d.txn.Mutations) > 0 {
			return invalid(key, "a refused commit carries %d mutations", len(d.txn.Mutations))
		}
	case api.RevisionApplied:
		if spec.Commit == "" {
			return invalid(key, "the commit has no hash")
		}
		if applied := o.(*api.Source).Status.Applied; applied != c.Parent {
			return &command.Rejection{Code: command.Conflict, Key: key, Message: fmt.Sprintf("another commit came first: %s is in force, this one follows %s", orNone(applied), orNone(c.Parent))}
		}
	default:
		return invalid(key, "the result of a commit is %q or %q, not %q", api.RevisionApplied, api.RevisionRefused, spec.Result)
	}
	return nil
}

func orNone(hash string) string {
	if hash == "" {
		return "no commit"
	}
	return fmt.Sprintf("%.7s", hash)
}

// recordCommit writes the Revision and the Source's status, after the mutations.
func (d *draft) recordCommit() *command.Rejection {
	c := d.txn.Commit
	if c == nil {
		return nil
	}
	record, _ := d.next.sources.get(c.Source)
	record.sequence++
	d.next.sources.set(d.edit, c.Source, record)

	key := revisionKey(c.Source, record.sequence)
	at := slotOf(key)
	revision := shallow(c.Revision).(*api.Revision)
	revision.Name, revision.Namespace, revision.GenerateName = key.Name, "", ""
	revision.Spec.Parent = c.Parent
	if rejection := checkName(key, api.KindOf(revision)); rejection != nil {
		return rejection
	}
	if old, exists := d.get(at); exists {
		return &command.Rejection{Code: command.Exists, Key: key, Message: "exists already, at revision " + old.GetResourceVersion()}
	}
	revision.UID = newUID(d.next.settings.ClusterID, d.next.revision+1)
	revision.CreationTimestamp = seconds(d.now)
	revision.DeletionTimestamp, revision.DeletionGracePeriodSeconds, revision.Generation = nil, nil, 1
	d.put(at, nil, revision)
	if record.sequence > KeepRevisions {
		oldest := slotOf(revisionKey(c.Source, record.sequence-KeepRevisions))
		if old, ok := d.get(oldest); ok {
			d.remove(oldest, old)
		}
	}
	if revision.Spec.Result == api.RevisionApplied {
		d.advanceSource(c, record.objects)
	}
	return nil
}

func revisionKey(source string, sequence uint64) api.Key {
	return api.Key{Resource: api.Revisions, Name: fmt.Sprintf("%s-%06d", source, sequence)}
}

// advanceSource writes into the Source which commit is in force, unless the commit
// deleted it.
func (d *draft) advanceSource(c *command.Commit, objects int64) {
	at := slotOf(api.Key{Resource: api.Sources, Name: c.Source})
	old, ok := d.get(at)
	if !ok {
		return
	}
	o := shallow(old).(*api.Source)
	now := seconds(d.now)
	o.Status.Applied, o.Status.Fetched = c.Revision.Spec.Commit, c.Revision.Spec.Commit
	o.Status.AppliedAt = &now
	o.Status.Objects = objects
	if !d.equal(o, old) {
		d.put(at, old, o)
	}
}
