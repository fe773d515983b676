package workload

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"decree.dev/decree/schemas/api"
)

const (
	// eventAge is how long an Event is kept after it last happened.
	eventAge = time.Hour
	// garbageBatch is the most mutations of one pass; the next pass finds the rest.
	garbageBatch = 2000
)

// Garbage returns the removal of what nothing needs any more: objects whose
// controller is gone, objects in namespaces that are gone, pods on nodes that are
// gone, pods on their way out that no node runs, and old events.
//
// What comes from Git is never deleted here: only a commit does that. A pod from Git
// whose node is gone is marked as failed instead.
func Garbage(now time.Time, r api.Reader) []api.Mutation {
	var ms []api.Mutation
	for _, kind := range api.Kinds() {
		for o := range r.List(kind.Resource, "") {
			if len(ms) >= garbageBatch {
				return ms
			}
			if m, ok := garbage(now, r, o); ok {
				ms = append(ms, m)
			}
		}
	}
	return ms
}

// IsGarbage reports whether [Garbage] would deal with o, seen alone.
func IsGarbage(now time.Time, r api.Reader, o api.Object) bool {
	_, ok := garbage(now, r, o)
	return ok
}

func garbage(now time.Time, r api.Reader, o api.Object) (api.Mutation, bool) {
	if pod, ok := o.(*corev1.Pod); ok {
		if m, ok := lostPod(now, r, pod); ok {
			return m, true
		}
	}
	_, fromGit := api.OriginOf(o)
	if fromGit || o.GetDeletionTimestamp() != nil {
		return api.Mutation{}, false
	}
	if e, ok := o.(*corev1.Event); ok && now.Sub(eventTime(e)) > eventAge {
		return remove(o), true
	}
	return remove(o), orphaned(r, o) || homeless(r, o)
}

func eventTime(e *corev1.Event) time.Time {
	for _, t := range []time.Time{e.LastTimestamp.Time, e.EventTime.Time} {
		if !t.IsZero() {
			return t
		}
	}
	return e.CreationTimestamp.Time
}

// orphaned reports whether o has a controller that does not exist. A controller of
// a kind that is not served is left alone.
func orphaned(r api.Reader, o api.Object) bool {
	ref := metav1.GetControllerOf(o)
	if ref == nil {
		return false
	}
	kind, ok := api.KindForGVK(schema.FromAPIVersionAndKind(ref.APIVersion, ref.Kind))
	if !ok {
		return false
	}
	key := api.Key{Resource: kind.Resource, Name: ref.Name}
	if kind.Namespaced {
		key.Namespace = o.GetNamespace()
	}
	owner, exists := r.Get(key)
	return !exists || owner.GetUID() != ref.UID
}

// homeless reports whether o is in a namespace that does not exist.
func homeless(r api.Reader, o api.Object) bool {
	ns := o.GetNamespace()
	if ns == "" || ns == metav1.NamespaceDefault || ns == api.SystemNamespace {
		return false
	}
	_, exists := r.Get(api.Key{Resource: api.Namespaces, Name: ns})
	return !exists
}

// lostPod deals with pods that no node will ever report about again.
func lostPod(now time.Time, r api.Reader, pod *corev1.Pod) (api.Mutation, bool) {
	if pod.Spec.NodeName != "" {
		if _, exists := api.Get[*corev1.Node](r, "", pod.Spec.NodeName); exists {
			return api.Mutation{}, false
		}
	}
	m := remove(pod)
	m.Grace = new(int64)
	_, fromGit := api.OriginOf(pod)
	switch {
	case pod.DeletionTimestamp != nil:
		return m, true
	case pod.Spec.NodeName == "" || api.PodFinished(pod):
		return api.Mutation{}, false
	case !fromGit:
		return m, true
	case len(pod.Status.Conditions) == 0:
		return api.Mutation{}, false // waits for a node that was named in Git
	}
	failed := api.Clone(pod)
	failed.Status.Phase, failed.Status.Reason = corev1.PodFailed, "NodeLost"
	failed.Status.Message = "node " + pod.Spec.NodeName + " was removed from the cluster; rename the pod in Git to run it again, or use a Deployment"
	api.SetPodCondition(failed, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionFalse, Reason: "NodeLost"}, now)
	return api.Guarded(api.UpdateStatus, failed), true
}
