package state

import (
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// draft is the next state while the transactions of one entry are being applied, one
// after another.
type draft struct {
	base  *State
	next  State
	edit  *edit // owns what may be changed in place in next
	index uint64

	txn     *command.Txn
	now     int64 // the time of txn
	events  []Event
	first   int   // of the events that belong to txn
	saved   State // next as it was before txn, if undoable
	undoing bool  // saved is set
	changed bool  // next is another state than base

	scratch [2][]byte
}

func newDraft(s *State, index uint64, transactions int) *draft {
	d := &draft{base: s, next: *s, edit: &edit{keys: transactions}, index: index, events: make([]Event, 0, transactions)}
	d.next.tables = slices.Clone(s.tables)
	return d
}

// state is what has become of it: the base itself when nothing has happened.
func (d *draft) state() *State {
	if !d.changed {
		return d.base
	}
	next := d.next // so that the result does not keep the draft in memory
	return &next
}

// begin makes t the transaction that is being applied.
func (d *draft) begin(t *command.Txn) {
	d.txn, d.first, d.undoing = t, len(d.events), false
	d.now = max(d.next.time, t.Time)
	if !failsEarly(t) {
		d.saved, d.undoing = d.next, true
		d.saved.tables = slices.Clone(d.next.tables)
		d.edit = new(edit) // what saved consists of must stay as it is
	}
}

// failsEarly reports whether t is rejected before it changes anything, or not at all.
// That holds for one mutation of an object to which the state machine assigns nothing,
// which is what nearly all transactions consist of: they need no way back.
func failsEarly(t *command.Txn) bool {
	if t.Part != nil || t.Commit != nil || t.Bootstrap != nil || len(t.Mutations) > 1 {
		return false
	}
	if len(t.Mutations) == 0 {
		return true
	}
	kind, ok := kinds[t.Mutations[0].Key.Resource]
	return !ok || !kind.placed
}

// undo takes back what the transaction has done so far.
func (d *draft) undo() {
	switch {
	case d.undoing:
		d.next = d.saved
	case len(d.events) > d.first:
		panic("state: a transaction was rejected after a change that cannot be undone")
	}
	clear(d.events[d.first:])
	d.events = d.events[:d.first]
}

// keep makes what the transaction has done part of the next state.
func (d *draft) keep() {
	d.next.index, d.next.time = d.index, d.now
	d.expireParts()
	d.changed = true
}

// slot is the place of one object.
type slot struct {
	key  api.Key
	kind *kindInfo
	at   string // key in the table
}

// slot returns the place of k, whose resource is known.
func slotOf(k api.Key) slot {
	return slot{key: k, kind: kinds[k.Resource], at: tableKey(k.Namespace, k.Name)}
}

func (d *draft) get(at slot) (api.Object, bool) { return d.next.tables[at.kind.index].get(at.at) }

// put stores o, which the draft owns until now, under the next revision. old is
// what it replaces, nil for nothing.
func (d *draft) put(at slot, old, o api.Object) {
	d.next.revision++
	o.SetResourceVersion(strconv.FormatUint(d.next.revision, 10))
	d.next.tables[at.kind.index].set(d.edit, at.at, o)
	d.reindex(at.key, old, o)
	d.events = append(d.events, Event{Revision: d.next.revision, Key: at.key, Old: old, New: o})
}

func (d *draft) remove(at slot, old api.Object) {
	d.next.revision++
	d.next.tables[at.kind.index].delete(d.edit, at.at)
	d.reindex(at.key, old, nil)
	switch o := old.(type) {
	case *corev1.Service:
		d.releaseAddresses(o)
		d.releasePorts(portsOf(o))
	case *corev1.Node:
		d.releaseNode(o)
	}
	d.events = append(d.events, Event{Revision: d.next.revision, Key: at.key, Old: old})
}

// reindex keeps the owner index and the object counts of sources.
func (d *draft) reindex(k api.Key, old, o api.Object) {
	before, after := controllerOf(old), controllerOf(o)
	if before != nil && (after == nil || after.UID != before.UID) {
		d.next.owned.delete(d.edit, ownedKey(before.UID, k))
	}
	if after != nil {
		d.next.owned.set(d.edit, ownedKey(after.UID, k), o)
	}
	if from, to := sourceOf(old), sourceOf(o); from != to {
		d.count(from, -1)
		d.count(to, +1)
	}
}

func (d *draft) count(name string, by int64) {
	if name == "" {
		return
	}
	record, _ := d.next.sources.get(name)
	record.objects += by
	d.next.sources.set(d.edit, name, record)
}

func controllerOf(o api.Object) *metav1.OwnerReference {
	if o == nil {
		return nil
	}
	return metav1.GetControllerOfNoCopy(o)
}

func sourceOf(o api.Object) string {
	if o == nil {
		return ""
	}
	return o.GetAnnotations()[api.AnnotationSource]
}
