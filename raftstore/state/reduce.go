package state

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"

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
//
// A part of a transaction changes nothing that anybody sees, until the last one comes:
// then the whole transaction happens at once, here. If that is rejected, the state has
// forgotten its parts, and nothing else has happened.
func Reduce(s *State, index uint64, t command.Txn) (*State, command.Result, []Event) {
	d := newDraft(s, index, 0)
	result, events := d.apply(&t)
	return d.state(), result, events
}

// ReduceEntry does what Reduce does for each of txns, one after another, and returns
// the state after the last one: what they have in common is copied once.
func ReduceEntry(s *State, index uint64, txns []command.Txn) (*State, []command.Result, [][]Event) {
	d := newDraft(s, index, len(txns))
	results, events := make([]command.Result, len(txns)), make([][]Event, len(txns))
	for i := range txns {
		results[i], events[i] = d.apply(&txns[i])
	}
	return d.state(), results, events
}

func (d *draft) apply(t *command.Txn) (command.Result, []Event) {
	if revision, ok := d.next.history.find(t.Key); ok {
		return command.Result{Revision: revision}, nil
	}
	if t.Part != nil {
		return d.applyPart(t)
	}
	d.begin(t)
	rejection := d.run()
	if rejection != nil || len(d.events) == d.first && t.Key == "" && t.Bootstrap == nil {
		d.undo()
		return command.Result{Revision: d.next.revision, Rejected: rejection}, nil
	}
	d.keep()
	if t.Key != "" {
		d.next.history.add(d.edit, t.Key, d.next.revision)
	}
	return command.Result{Revision: d.next.revision}, d.events[d.first:len(d.events):len(d.events)]
}

func (d *draft) run() *command.Rejection {
	if rejection := d.bootstrap(); rejection != nil {
		return rejection
	}
	if rejection := d.checkCommit(); rejection != nil {
		return rejection
	}
	var seen map[api.Key]struct{}
	if len(d.txn.Mutations) > 1 {
		seen = make(map[api.Key]struct{}, len(d.txn.Mutations))
	}
	for i := range d.txn.Mutations {
		m := &d.txn.Mutations[i]
		if _, twice := seen[m.Key]; twice {
			return invalid(m.Key, "occurs twice in one transaction")
		}
		if seen != nil {
			seen[m.Key] = struct{}{}
		}
		if rejection := d.mutate(m); rejection != nil {
			return rejection
		}
	}
	return d.recordCommit()
}

func (d *draft) bootstrap() *command.Rejection {
	b := d.txn.Bootstrap
	switch {
	case b == nil && d.next.settings == nil:
		return &command.Rejection{Code: command.Invalid, Message: "the cluster has no settings yet: its first transaction must bring them"}
	case b == nil:
		return nil
	case d.next.settings != nil:
		return &command.Rejection{Code: command.Exists, Message: fmt.Sprintf("the cluster has its settings already, its id is %s", d.next.settings.ClusterID)}
	}
	if err := CheckBootstrap(b); err != nil {
		return &command.Rejection{Code: command.Invalid, Message: err.Error()}
	}
	settings := *b
	d.next.settings = &settings
	d.next.revision = 1 // revision 0 means "any" to Kubernetes clients
	if b.Restored != nil {
		d.next.revision += b.Restored.Revision
	}
	return nil
}

func (d *draft) mutate(m *api.Mutation) *command.Rejection {
	kind, rejection := checkMutation(m)
	if rejection != nil {
		return rejection
	}
	if rejection := d.mayGovern(m, kind); rejection != nil {
		return rejection
	}
	at := slot{key: m.Key, kind: kind, at: tableKey(m.Key.Namespace, m.Key.Name)}
	old, exists := d.get(at)
	if m.Verb == api.Create {
		if exists {
			return d.createTaken(m, old)
		}
		return d.create(m, at)
	}
	if !exists {
		return &command.Rejection{Code: command.NotFound, Key: m.Key, Message: "does not exist"}
	}
	if rejection := checkPreconditions(m, old); rejection != nil {
		return rejection
	}
	switch {
	case m.Verb == api.Delete:
		return d.delete(m, at, old)
	case m.Verb == api.UpdateStatus && kind.status >= 0:
		return d.updateStatus(m, at, old)
	}
	return d.update(m, at, old)
}

func (d *draft) create(m *api.Mutation, at slot) *command.Rejection {
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
	o.SetCreationTimestamp(seconds(d.now))
	o.SetDeletionTimestamp(nil)
	o.SetDeletionGracePeriodSeconds(nil)
	o.SetGeneration(0)
	if at.kind.spec >= 0 {
		o.SetGeneration(1)
	}
	d.put(at, nil, o)
	return nil
}

func (d *draft) update(m *api.Mutation, at slot, old api.Object) *command.Rejection {
	o := shallow(m.Object)
	keepIdentity(o, old)
	at.kind.copyStatus(o, old)
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
	if d.equal(o, old) {
		return nil
	}
	if at.kind.spec >= 0 && !d.sameSpec(at.kind, o, old) {
		o.SetGeneration(old.GetGeneration() + 1)
	}
	d.put(at, old, o)
	return nil
}

func (d *draft) updateStatus(m *api.Mutation, at slot, old api.Object) *command.Rejection {
	o := shallow(old)
	at.kind.copyStatus(o, m.Object)
	if !d.equal(o, old) {
		d.put(at, old, o)
	}
	return nil
}

// delete removes an object, or marks a Pod that a node may be running.
func (d *draft) delete(m *api.Mutation, at slot, old api.Object) *command.Rejection {
	if rejection := d.mayDelete(m, old); rejection != nil {
		return rejection
	}
	if m.Grace != nil && *m.Grace < 0 {
		return invalid(m.Key, "grace of %d seconds", *m.Grace)
	}
	pod, ok := old.(*corev1.Pod)
	if !ok || pod.Spec.NodeName == "" {
		d.remove(at, old)
		return nil
	}
	grace := podGrace(m, pod)
	if grace <= 0 {
		d.remove(at, old)
		return nil
	}
	deadline := seconds(d.now + min(grace, maxGrace)*1000)
	if before := pod.DeletionTimestamp; before != nil && (m.Grace == nil || !deadline.Before(before)) {
		return nil // it is on its way, and this does not make it faster
	}
	o := shallow(old)
	o.SetDeletionTimestamp(&deadline)
	o.SetDeletionGracePeriodSeconds(&grace)
	d.put(at, old, o)
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
