package apiserver

import (
	"reflect"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// PeersParameter is the query parameter that makes a watch of pods, if it is "true", one of
// all pods as their peers see them: every node may know those, because network policies
// speak about them. What runs in a pod, and with which settings, is not shown.
const PeersParameter = "peers"

// peerOf is what others may know of a pod: who and where it is, what its ports are called.
func peerOf(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{
		TypeMeta: p.TypeMeta,
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion, Labels: p.Labels, CreationTimestamp: p.CreationTimestamp,
		},
		Spec:   corev1.PodSpec{NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork, InitContainers: portsOf(p.Spec.InitContainers), Containers: portsOf(p.Spec.Containers)},
		Status: corev1.PodStatus{Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs},
	}
	return out
}

func portsOf(cs []corev1.Container) (out []corev1.Container) {
	for i := range cs {
		if len(cs[i].Ports) > 0 {
			out = append(out, corev1.Container{Name: cs[i].Name, Ports: cs[i].Ports})
		}
	}
	return out
}

// applyPeer tells of a change unless peers see none.
func (f *watchFilter) applyPeer(e *raftstore.Event, send func(watch.EventType, api.Object)) {
	if before, ok := e.Previous.(*corev1.Pod); ok && before != nil && e.Type != raftstore.Deleted {
		if after, ok := e.Object.(*corev1.Pod); ok && f.sel.matches(before) == f.sel.matches(after) {
			old, now := peerOf(before), peerOf(after)
			old.ResourceVersion = now.ResourceVersion
			if reflect.DeepEqual(old, now) {
				return
			}
		}
	}
	f.applySelected(e, send)
}
