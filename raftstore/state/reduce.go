package state

import (
	"fmt"
	"strconv"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// Reduce applies t, which stands at index of the log, to s. It returns the next
// state, the outcome, and one event per object change in order of revision.
//
// All of t happens or nothing: a rejected transaction returns s itself and no
// events. Every object change takes one revision, without gaps; a mutation that
// changes nothing takes none. Reduce is pure: neither s nor t is modified, though
// the new state may share objects with t.
func Reduce(s *State, index uint64, t command.Txn) (*State, command.Result, []Event) {
	if revision, ok := s.history.find(t.Key); ok {
		return s, command.Result{Revision: revision}, nil
	}
	d := newDraft(s, index, &t)
	if rejection := d.run(); rejection != nil {
		return s, command.Result{Revision: s.revision, Rejected: rejection}, nil
	}
	return d.finish()
}

// draft is the next state while a transaction is being applied. It is thrown away
// when the transaction is rejected.
type draft struct {
	txn    *command.Txn
	base   *State
	next   State
	tables []*iradix.Txn[api.Object] // nil where untouched
	owned  *iradix.Txn[api.Object]
	events []Event
}

func newDraft(s *State, index uint64, t *command.Txn) *draft {
	d := &draft{txn: t, base: s, next: *s, tables: make([]*iradix.Txn[api.Object], len(s.tables))}
	d.next.index = index
	d.next.time = max(s.time, t.Time)
	return d
}

func (d *draft) run() *command.Rejection {
	if rejection := d.bootstrap(); rejection != nil {
		return rejection
	}
	if rejection := d.checkCommit(); rejection != nil {
		return rejection
	}
	seen := make(map[api.Key]struct{}, len(d.txn.Mutations))
	for i := range d.txn.Mutations {
		m := &d.txn.Mutations[i]
		if _, twice := seen[m.Key]; twice {
			return invalid(m.Key, "occurs twice in one transaction")
		}
		seen[m.Key] = struct{}{}
		if rejection := d.mutate(m); rejection != nil {
			return rejection
		}
	}
	return d.recordCommit()
}

func (d *draft) bootstrap() *command.Rejection {
	b := d.txn.Bootstrap
	switch {
	case b == nil && d.base.settings == nil:
		return &command.Rejection{Code: command.Invalid, Message: "the cluster has no settings yet: its first transaction must bring them"}
	case b == nil:
		return nil
	case d.base.settings != nil:
		return &command.Rejection{Code: command.Exists, Message: fmt.Sprintf("the cluster has its settings already, its id is %s", d.base.settings.ClusterID)}
	}
	if err := CheckBootstrap(b); err != nil {
		return &command.Rejection{Code: command.Invalid, Message: err.Error()}
	}
	settings := *b
	d.next.settings = &settings
	d.next.revision = 1 // revision 0 means "any" to Kubernetes clients
	return nil
}

// finish turns the draft into a state.
func (d *draft) finish() (*State, command.Result, []Event) {
	if len(d.events) == 0 && d.txn.Key == "" && d.txn.Bootstrap == nil {
		return d.base, command.Result{Revision: d.base.revision}, nil
	}
	tables := append([]*table(nil), d.base.tables...)
	for i, t := range d.tables {
		if t != nil {
			tables[i] = t.CommitOnly()
		}
	}
	d.next.tables = tables
	if d.owned != nil {
		d.next.owned = d.owned.CommitOnly()
	}
	if d.txn.Key != "" {
		d.next.history = d.next.history.add(d.txn.Key, d.next.revision)
	}
	return &d.next, command.Result{Revision: d.next.revision}, d.events
}

func (d *draft) mutate(m *api.Mutation) *command.Rejection {
	kind, rejection := checkMutation(m)
	if rejection != nil {
		return rejection
	}
	old, exists := d.get(m.Key)
	if m.Verb == api.Create {
		if exists {
			return d.createTaken(m, old)
		}
		return d.create(m, kind)
	}
	if !exists {
		return &command.Rejection{Code: command.NotFound, Key: m.Key, Message: "does not exist"}
	}
	if rejection := checkPreconditions(m, old); rejection != nil {
		return rejection
	}
	switch {
	case m.Verb == api.Delete:
		return d.delete(m, old)
	case m.Verb == api.UpdateStatus && shapeOf(kind).status >= 0:
		return d.updateStatus(m, old, kind)
	}
	return d.update(m, old, kind)
}

func (d *draft) create(m *api.Mutation, kind *api.Kind) *command.Rejection {
	if rejection := d.mayCreate(m); rejection != nil {
		return rejection
	}
	o := shallow(m.Object)
	if p, ok := o.(*corev1.Pod); ok && p.Status.Phase == "" {
		p.Status.Phase = corev1.PodPending // until its node says more
	}
	if rejection := d.place(m.Key, nil, o); rejection != nil {
		return rejection
	}
	o.SetUID(newUID(d.next.settings.ClusterID, d.next.revision+1))
	o.SetCreationTimestamp(seconds(d.next.time))
	o.SetDeletionTimestamp(nil)
	o.SetDeletionGracePeriodSeconds(nil)
	o.SetGeneration(0)
	if shapeOf(kind).spec >= 0 {
		o.SetGeneration(1)
	}
	d.put(m.Key, nil, o)
	return nil
}

func (d *draft) update(m *api.Mutation, old api.Object, kind *api.Kind) *command.Rejection {
	o := shallow(m.Object)
	keepIdentity(o, old)
	shape := shapeOf(kind)
	shape.copyStatus(o, old)
	if rejection := d.bind(m, old, o); rejection != nil {
		return rejection
	}
	if rejection := d.mayUpdate(m, old, o); rejection != nil {
		return rejection
	}
	rejection := d.place(m.Key, old, o)
	if !d.keptFromGit(old, o) {
		return comesFromGit(m.Key, old)
	}
	if rejection != nil {
		return rejection
	}
	if equal(o, old) {
		return nil
	}
	if shape.spec >= 0 && !shape.sameSpec(o, old) {
		o.SetGeneration(old.GetGeneration() + 1)
	}
	d.put(m.Key, old, o)
	return nil
}

func (d *draft) updateStatus(m *api.Mutation, old api.Object, kind *api.Kind) *command.Rejection {
	o := shallow(old)
	shapeOf(kind).copyStatus(o, m.Object)
	if !equal(o, old) {
		d.put(m.Key, old, o)
	}
	return nil
}

// delete removes an object, or marks a Pod that a node may be running.
func (d *draft) delete(m *api.Mutation, old api.Object) *command.Rejection {
	if rejection := d.mayDelete(m, old); rejection != nil {
		return rejection
	}
	if m.Grace != nil && *m.Grace < 0 {
		return invalid(m.Key, "grace of %d seconds", *m.Grace)
	}
	pod, ok := old.(*corev1.Pod)
	if !ok || pod.Spec.NodeName == "" {
		d.remove(m.Key, old)
		return nil
	}
	grace := podGrace(m, pod)
	if grace <= 0 {
		d.remove(m.Key, old)
		return nil
	}
	deadline := seconds(d.next.time + min(grace, maxGrace)*1000)
	if before := pod.DeletionTimestamp; before != nil && (m.Grace == nil || !deadline.Before(before)) {
		return nil // it is on its way, and this does not make it faster
	}
	o := shallow(old)
	o.SetDeletionTimestamp(&deadline)
	o.SetDeletionGracePeriodSeconds(&grace)
	d.put(m.Key, old, o)
	return nil
}

// maxGrace, in seconds, keeps deadlines within what a timestamp can say.
const maxGrace = 10 * 365 * 24 * 3600

// podGrace is how many seconds a Pod gets: what the deletion says, what the Pod
// says, or the 30 that Kubernetes documents.
func podGrace(m *api.Mutation, pod *corev1.Pod) int64 {
	switch {
	case m.Grace != nil:
		return *m.Grace
	case pod.Spec.TerminationGracePeriodSeconds != nil:
		return *pod.Spec.TerminationGracePeriodSeconds
	}
	return corev1.DefaultTerminationGracePeriodSeconds
}

// bind keeps the node of a bound Pod: a Pod never moves. With the node, a binding
// brings the one condition that belongs to it, PodScheduled.
func (d *draft) bind(m *api.Mutation, old, o api.Object) *command.Rejection {
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return nil
	}
	had := old.(*corev1.Pod).Spec.NodeName
	if had != "" && pod.Spec.NodeName != "" && pod.Spec.NodeName != had {
		return &command.Rejection{Code: command.Conflict, Key: m.Key, Message: fmt.Sprintf("is bound to nodes %q already, a pod never moves", had)}
	}
	if had != "" {
		pod.Spec.NodeName = had
		return nil
	}
	if c := api.PodCondition(m.Object.(*corev1.Pod), corev1.PodScheduled); c != nil && pod.Spec.NodeName != "" {
		pod.Status = *pod.Status.DeepCopy()
		api.SetPodCondition(pod, *c, c.LastTransitionTime.Time)
	}
	return nil
}

// place settles what the state machine assigns to some kinds. old is nil on Create.
func (d *draft) place(key api.Key, old, o api.Object) *command.Rejection {
	switch o := o.(type) {
	case *corev1.Service:
		before, _ := old.(*corev1.Service)
		return d.placeService(key, before, o)
	case *corev1.Node:
		before, _ := old.(*corev1.Node)
		return d.placeNode(key, before, o)
	}
	return nil
}

func (d *draft) get(k api.Key) (api.Object, bool) {
	i := kindIndex[k.Resource]
	if t := d.tables[i]; t != nil {
		return t.Get(tableKey(k.Namespace, k.Name))
	}
	return d.base.tables[i].Get(tableKey(k.Namespace, k.Name))
}

func (d *draft) table(r api.Resource) *iradix.Txn[api.Object] {
	i := kindIndex[r]
	if d.tables[i] == nil {
		d.tables[i] = d.base.tables[i].Txn()
	}
	return d.tables[i]
}

// put stores o, which the draft owns until now, under the next revision. old is
// what it replaces, nil for nothing.
func (d *draft) put(k api.Key, old, o api.Object) {
	d.next.revision++
	o.SetResourceVersion(strconv.FormatUint(d.next.revision, 10))
	d.table(k.Resource).Insert(tableKey(k.Namespace, k.Name), o)
	d.index(k, old, o)
	d.events = append(d.events, Event{Revision: d.next.revision, Key: k, Old: old, New: o})
}

func (d *draft) remove(k api.Key, old api.Object) {
	d.next.revision++
	d.table(k.Resource).Delete(tableKey(k.Namespace, k.Name))
	d.index(k, old, nil)
	switch o := old.(type) {
	case *corev1.Service:
		d.releaseService(o)
	case *corev1.Node:
		d.releaseNode(o)
	}
	d.events = append(d.events, Event{Revision: d.next.revision, Key: k, Old: old})
}

// index keeps the owner index and the object counts of sources.
func (d *draft) index(k api.Key, old, o api.Object) {
	before, after := controllerOf(old), controllerOf(o)
	if d.owned == nil && (before != nil || after != nil) {
		d.owned = d.base.owned.Txn()
	}
	if before != nil && (after == nil || after.UID != before.UID) {
		d.owned.Delete(ownedKey(before.UID, k))
	}
	if after != nil {
		d.owned.Insert(ownedKey(after.UID, k), o)
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
	record, _ := d.next.sources.Get([]byte(name))
	record.objects += by
	d.next.sources, _, _ = d.next.sources.Insert([]byte(name), record)
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
