package apiserver

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// TestPeers: what runs in a pod, and with which settings, is nobody's business, and what
// nobody sees is no change.
func TestPeers(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u", Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"a": "hunter2"}, ResourceVersion: "7"},
		Spec: corev1.PodSpec{NodeName: "n2", Containers: []corev1.Container{{
			Name: "web", Image: "hunter2", Env: []corev1.EnvVar{{Name: "PASSWORD", Value: "hunter2"}}, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}},
		}, {Name: "hunter2"}}},
		Status: corev1.PodStatus{PodIP: "10.98.1.2", PodIPs: []corev1.PodIP{{IP: "10.98.1.2"}}, Message: "hunter2"},
	}
	b, err := json.Marshal(peerOf(pod))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "hunter2") {
		t.Errorf("peers see %s", b)
	}
	for _, want := range []string{`"app":"web"`, `"podIP":"10.98.1.2"`, `"containerPort":80`, `"nodeName":"n2"`, `"resourceVersion":"7"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("peers do not see %s: %s", want, b)
		}
	}
	kind, _ := api.KindFor(api.Pods)
	sel, err := newSelector(target{kind: kind}, url.Values{})
	if err != nil {
		t.Fatal(err)
	}
	f := &watchFilter{sel: sel, peers: true}
	told := func(change func(p *corev1.Pod)) (n int) {
		after := pod.DeepCopy()
		after.ResourceVersion = "8"
		change(after)
		f.applyPeer(&raftstore.Event{Type: raftstore.Modified, Object: after, Previous: pod}, func(watch.EventType, api.Object) { n++ })
		return n
	}
	if n := told(func(p *corev1.Pod) { p.Status.Message = "new"; p.Spec.Containers[0].Image = "new" }); n != 0 {
		t.Error("told of what nobody sees")
	}
	if n := told(func(p *corev1.Pod) { p.Labels = nil }); n != 1 {
		t.Errorf("told of another label %d times", n)
	}
}
