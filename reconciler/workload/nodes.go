package workload

import (
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

const (
	// nodeGrace is how long a node may be silent before it counts as unreachable.
	nodeGrace = 40 * time.Second
	// evictAfter is how long pods stay on an unreachable or unready node unless they
	// say otherwise (tolerationSeconds), as the Kubernetes admission would write it
	// into every pod.
	evictAfter = 5 * time.Minute
)

// Nodes returns what follows from nodes going silent and coming back: the Ready
// condition of silent nodes becomes Unknown and their pods become unready, so that
// services stop using them; nodes are tainted accordingly; and pods that do not
// tolerate a NoExecute taint (any longer) are deleted, for their owners to replace.
// wait is the time after which it should be called again, zero for never.
//
// lastContact is when each node's agent was last heard of, from the memory of the
// leader. A new leader must enter its own time for every node it knows: a node that
// is not in the map is not judged.
func Nodes(now time.Time, r api.Reader, lastContact map[string]time.Time) (ms []api.Mutation, wait time.Duration) {
	evicting := map[string][]corev1.Taint{}
	for node := range api.List[*corev1.Node](r, "") {
		contact, known := lastContact[node.Name]
		if known {
			if left := contact.Add(nodeGrace).Sub(now); left > 0 {
				wait = earliest(wait, left)
			}
		}
		silent := known && now.Sub(contact) >= nodeGrace
		if silent && nodeReady(node).Status != corev1.ConditionUnknown {
			ms = silenceNode(ms, now, r, node, contact)
		} else if taints, changed := healthTaints(now, node); changed {
			n := api.Clone(node)
			n.Spec.Taints = taints
			ms = append(ms, api.Guarded(api.Update, n))
		}
		if nodeReady(node).Status == corev1.ConditionUnknown {
			evicting[node.Name] = nil // its pods count as unready
		}
		for _, t := range node.Spec.Taints {
			if t.Effect == corev1.TaintEffectNoExecute {
				evicting[node.Name] = append(evicting[node.Name], t)
			}
		}
	}
	if len(evicting) == 0 {
		return ms, wait
	}
	more, next := judgePods(now, r, evicting)
	return append(ms, more...), earliest(wait, next)
}

// nodeReady returns the Ready condition; its status is empty for a node that never
// reported one (such a node gets no pods, and needs no taint for that).
func nodeReady(n *corev1.Node) corev1.NodeCondition {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c
		}
	}
	return corev1.NodeCondition{Type: corev1.NodeReady}
}

func silenceNode(ms []api.Mutation, now time.Time, r api.Reader, node *corev1.Node, contact time.Time) []api.Mutation {
	n := api.Clone(node)
	message := fmt.Sprintf("no word from the node's agent since %s", contact.UTC().Format(time.RFC3339))
	c := corev1.NodeCondition{
		Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Reason: "NodeStatusUnknown", Message: message,
		LastHeartbeatTime: metav1.NewTime(contact), LastTransitionTime: metav1.NewTime(now),
	}
	i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == corev1.NodeReady })
	if i < 0 {
		n.Status.Conditions = append(n.Status.Conditions, c)
	} else {
		n.Status.Conditions[i] = c
	}
	ms = append(ms, api.Guarded(api.UpdateStatus, n))
	return note(ms, now, r, api.Note{
		About: node, Type: corev1.EventTypeWarning, Reason: "NodeNotReady", Component: "node-controller", Message: message,
	})
}

// healthTaints returns the node's taints as its Ready condition asks for them: both
// NoSchedule and NoExecute, unreachable for Unknown and not-ready for False.
func healthTaints(now time.Time, node *corev1.Node) (taints []corev1.Taint, changed bool) {
	key := ""
	switch nodeReady(node).Status {
	case corev1.ConditionUnknown:
		key = corev1.TaintNodeUnreachable
	case corev1.ConditionFalse:
		key = corev1.TaintNodeNotReady
	}
	have := map[corev1.TaintEffect]bool{}
	for _, t := range node.Spec.Taints {
		if t.Key == corev1.TaintNodeUnreachable || t.Key == corev1.TaintNodeNotReady {
			if t.Key != key {
				changed = true
				continue
			}
			have[t.Effect] = true
		}
		taints = append(taints, t)
	}
	for _, effect := range []corev1.TaintEffect{corev1.TaintEffectNoSchedule, corev1.TaintEffectNoExecute} {
		if key != "" && !have[effect] {
			at := metav1.NewTime(now)
			taints = append(taints, corev1.Taint{Key: key, Effect: effect, TimeAdded: &at})
			changed = true
		}
	}
	return taints, changed
}

// judgePods marks pods on unreachable nodes as unready and deletes those whose time
// on a tainted node is over.
func judgePods(now time.Time, r api.Reader, nodes map[string][]corev1.Taint) (ms []api.Mutation, wait time.Duration) {
	for pod := range api.List[*corev1.Pod](r, "") {
		taints, affected := nodes[pod.Spec.NodeName]
		if !affected || !api.PodActive(pod) {
			continue
		}
		at, evict := evictionTime(pod, taints)
		_, fromGit := api.OriginOf(pod)
		if evict && !fromGit && !at.After(now) {
			ms = append(ms, remove(pod))
			ms = note(ms, now, r, api.Note{
				About: pod, Type: corev1.EventTypeWarning, Reason: "TaintManagerEviction", Component: "node-controller",
				Message: fmt.Sprintf("Deleted: node %s has a taint that the pod does not tolerate any longer", pod.Spec.NodeName),
			})
			continue
		}
		if evict && !fromGit {
			wait = earliest(wait, at.Sub(now))
		}
		if node, ok := api.Get[*corev1.Node](r, "", pod.Spec.NodeName); ok && api.PodReady(pod) && nodeReady(node).Status == corev1.ConditionUnknown {
			unready := api.Clone(pod)
			api.SetPodCondition(unready, corev1.PodCondition{
				Type: corev1.PodReady, Status: corev1.ConditionFalse, Reason: "NodeUnreachable", Message: "no word from the agent of node " + node.Name,
			}, now)
			ms = append(ms, api.Guarded(api.UpdateStatus, unready))
		}
	}
	return ms, wait
}

// evictionTime is when pod must leave a node with these NoExecute taints; ok is
// false if it may stay.
func evictionTime(pod *corev1.Pod, taints []corev1.Taint) (at time.Time, ok bool) {
	for _, t := range taints {
		added := time.Time{}
		if t.TimeAdded != nil {
			added = t.TimeAdded.Time
		}
		stay, forever := toleratedFor(pod, &t)
		if forever {
			continue
		}
		if end := added.Add(stay); !ok || end.Before(at) {
			at, ok = end, true
		}
	}
	return at, ok
}

// toleratedFor is how long pod tolerates t: the shortest of its tolerations that
// match, or the default for unhealthy nodes, or not at all.
func toleratedFor(pod *corev1.Pod, t *corev1.Taint) (stay time.Duration, forever bool) {
	matched := false
	for i := range pod.Spec.Tolerations {
		tol := &pod.Spec.Tolerations[i]
		if !api.Tolerates(tol, t) {
			continue
		}
		if tol.TolerationSeconds == nil {
			if !matched {
				forever = true
			}
			matched = true
			continue
		}
		d := max(0, time.Duration(*tol.TolerationSeconds)*time.Second)
		if !matched || forever || d < stay {
			stay, forever = d, false
		}
		matched = true
	}
	if matched {
		return stay, forever
	}
	if t.Key == corev1.TaintNodeUnreachable || t.Key == corev1.TaintNodeNotReady {
		return evictAfter, false
	}
	return 0, false
}
