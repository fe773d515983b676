// Package schedule decides on which node a pod runs, and says why when it runs on
// none. It is pure: a [Table] of nodes and what is on them goes in, bindings come
// out, and equal inputs give equal outputs whatever their order.
//
// A node must pass every filter: ready, not cordoned, matching node selector and
// required node affinity, tolerated taints, and enough of every requested resource.
// Among those that do, the one with the highest score wins: few pods of the same
// owner, much left of its CPU and memory. Equal scores go to the first name.
package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// Binding is the decision to run a pod on a node.
type Binding struct {
	Pod  *corev1.Pod
	Node string
}

// Unplaced is a pod that no node can run now, and why.
type Unplaced struct {
	Pod    *corev1.Pod
	Reason string
}

// Plan is the outcome of one pass, in the order in which the pods were looked at.
type Plan struct {
	Bindings []Binding
	Unplaced []Unplaced
}

// Pending lists the pods that wait for a node.
func Pending(r api.Reader) []*corev1.Pod {
	var pods []*corev1.Pod
	for p := range api.List[*corev1.Pod](r, "") {
		if IsPending(p) {
			pods = append(pods, p)
		}
	}
	return pods
}

// IsPending reports whether p waits for a node.
func IsPending(p *corev1.Pod) bool {
	return p.Spec.NodeName == "" && api.PodActive(p) && len(p.Spec.SchedulingGates) == 0
}

// Pass does it all from a view: build the table, schedule what is pending, return
// the mutations, events included. Large clusters keep a Table instead.
func Pass(now time.Time, r api.Reader) []api.Mutation {
	pending := Pending(r)
	if len(pending) == 0 {
		return nil
	}
	plan := Schedule(NewTable(r), pending)
	return append(plan.Mutations(now), plan.Notes(now, r)...)
}

// Schedule places pods, the higher priority first, then the older one. It assumes
// its bindings in t, so that the next call sees them before the state does;
// [Table.RemovePod] takes one back that was rejected. The pods are not modified.
//
// The cost of a pod is logarithmic in the number of nodes as long as pods come in
// groups of the same shape (same owner, requests, selectors, tolerations): each
// shape keeps the nodes that fit in a heap, and the score of a node can only fall
// while pods are being placed.
func Schedule(t *Table, pods []*corev1.Pod) Plan {
	queue := slices.Clone(pods)
	slices.SortStableFunc(queue, compareUrgency)
	shapes := make([]*shape, len(queue))
	byKey := map[string]*shape{}
	for i, p := range queue {
		s := shapeOf(p)
		if known := byKey[s.key]; known != nil {
			s = known
		} else {
			byKey[s.key] = s
		}
		s.left++
		shapes[i] = s
	}
	var plan Plan
	heaps := heapCache{}
	for i, p := range queue {
		s := shapes[i]
		s.left--
		if n := heaps.of(t, s).place(s); n != nil {
			t.assume(n, p, s)
			plan.Bindings = append(plan.Bindings, Binding{p, n.name})
		} else {
			plan.Unplaced = append(plan.Unplaced, Unplaced{p, s.explain(t)})
		}
		if s.left == 0 {
			heaps.drop(s)
		}
	}
	return plan
}

func compareUrgency(a, b *corev1.Pod) int {
	return cmp.Or(
		cmp.Compare(priority(b), priority(a)),
		a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
		cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name),
	)
}

func priority(p *corev1.Pod) int32 {
	if p.Spec.Priority == nil {
		return 0
	}
	return *p.Spec.Priority
}

const component = "scheduler"

// Mutations carries out the plan: one Update for every binding, one UpdateStatus
// for every pod whose reason for waiting is new.
func (p Plan) Mutations(now time.Time) []api.Mutation {
	ms := make([]api.Mutation, 0, len(p.Bindings))
	for _, b := range p.Bindings {
		pod := api.Clone(b.Pod)
		pod.Spec.NodeName = b.Node
		api.SetPodCondition(pod, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}, now)
		ms = append(ms, api.Guarded(api.Update, pod))
	}
	for _, u := range p.Unplaced {
		pod := api.Clone(u.Pod)
		if api.SetPodCondition(pod, corev1.PodCondition{
			Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable, Message: u.Reason,
		}, now) {
			ms = append(ms, api.Guarded(api.UpdateStatus, pod))
		}
	}
	return ms
}

// Notes returns the events of the plan: Scheduled, and FailedScheduling at most
// every five minutes for the same reason.
func (p Plan) Notes(now time.Time, r api.Reader) []api.Mutation {
	var ms []api.Mutation
	add := func(n api.Note) {
		n.Component = component
		if m, ok := n.Event(now, r); ok {
			ms = append(ms, m)
		}
	}
	for _, b := range p.Bindings {
		add(api.Note{About: b.Pod, Reason: "Scheduled", Message: fmt.Sprintf("Assigned %s/%s to %s", b.Pod.Namespace, b.Pod.Name, b.Node)})
	}
	for _, u := range p.Unplaced {
		add(api.Note{About: u.Pod, Type: corev1.EventTypeWarning, Reason: "FailedScheduling", Message: u.Reason, Every: 5 * time.Minute})
	}
	return ms
}
