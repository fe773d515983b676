package control

import (
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"decree.dev/decree/reconciler"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// controller is one kind's planner with its place in the flow of changes.
type controller struct {
	name string
	// owns is the resource whose objects are planned.
	owns api.Resource
	// concerns maps a changed object of any kind to the keys to look at.
	concerns func(view api.Reader, o api.Object) []api.Key
	// plan returns what to change for one key; after is when to look again even
	// without a change, zero for never.
	plan  func(now time.Time, view api.Reader, k api.Key) (ms []api.Mutation, after time.Duration)
	queue *reconciler.Keyed[api.Key]
}

// controllers lists the keyed controllers.
func controllers() []*controller {
	return []*controller{
		{
			name: "deployment", owns: api.Deployments,
			concerns: func(view api.Reader, o api.Object) []api.Key {
				switch o := o.(type) {
				case *appsv1.Deployment:
					return []api.Key{api.KeyOf(o)}
				case *appsv1.ReplicaSet:
					return owner(o, "Deployment", api.Deployments)
				case *corev1.Pod:
					for _, k := range owner(o, "ReplicaSet", api.ReplicaSets) {
						if rs, ok := view.Get(k); ok {
							return owner(rs, "Deployment", api.Deployments)
						}
					}
				}
				return nil
			},
			plan: planner(workload.Deployment),
		},
		{
			name: "replicaset", owns: api.ReplicaSets,
			concerns: func(_ api.Reader, o api.Object) []api.Key {
				if rs, ok := o.(*appsv1.ReplicaSet); ok {
					return []api.Key{api.KeyOf(rs)}
				}
				return owner(o, "ReplicaSet", api.ReplicaSets)
			},
			plan: planner(workload.ReplicaSet),
		},
		{
			name: "endpoints", owns: api.Services,
			concerns: func(view api.Reader, o api.Object) []api.Key {
				switch o := o.(type) {
				case *corev1.Service:
					return []api.Key{api.KeyOf(o)}
				case *corev1.Pod:
					return selecting(view, o)
				case *corev1.Node:
					return preferringNear(view)
				}
				return owner(o, "Service", api.Services)
			},
			plan: planner(func(now time.Time, view api.Reader, s *corev1.Service) ([]api.Mutation, time.Duration) {
				return workload.Endpoints(now, view, s), 0
			}),
		},
	}
}

// planner looks the object up and plans nothing for one that is gone.
func planner[T api.Object](plan func(time.Time, api.Reader, T) ([]api.Mutation, time.Duration)) func(time.Time, api.Reader, api.Key) ([]api.Mutation, time.Duration) {
	return func(now time.Time, view api.Reader, k api.Key) ([]api.Mutation, time.Duration) {
		o, ok := api.Get[T](view, k.Namespace, k.Name)
		if !ok {
			return nil, 0
		}
		return plan(now, view, o)
	}
}

// owner is the key of the controlling owner of o, if that is of this kind.
func owner(o api.Object, kind string, r api.Resource) []api.Key {
	ref := metav1.GetControllerOf(o)
	if ref == nil || ref.Kind != kind {
		return nil
	}
	return []api.Key{{Resource: r, Namespace: o.GetNamespace(), Name: ref.Name}}
}

// preferringNear lists the services whose endpoints have hints that depend on nodes: on their
// zones, CPUs and health.
func preferringNear(view api.Reader) []api.Key {
	var keys []api.Key
	for s := range api.List[*corev1.Service](view, "") {
		if workload.PrefersNear(s) {
			keys = append(keys, api.KeyOf(s))
		}
	}
	return keys
}

// selecting lists the services whose selector matches the pod.
func selecting(view api.Reader, p *corev1.Pod) []api.Key {
	var keys []api.Key
	for s := range api.List[*corev1.Service](view, p.Namespace) {
		if len(s.Spec.Selector) > 0 && labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(p.Labels)) {
			keys = append(keys, api.KeyOf(s))
		}
	}
	return keys
}
