package workload

import (
	"encoding/json"
	"fmt"
	"maps"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// sameTemplate compares templates without the label that Decree adds.
func sameTemplate(a, b *corev1.PodTemplateSpec) bool {
	if len(a.Spec.Containers) != len(b.Spec.Containers) {
		return false
	}
	x, y := a.DeepCopy(), b.DeepCopy()
	delete(x.Labels, appsv1.DefaultDeploymentUniqueLabelKey)
	delete(y.Labels, appsv1.DefaultDeploymentUniqueLabelKey)
	return equality.Semantic.DeepEqual(x, y)
}

// templateHash names a template. The salt tells two templates apart whose hashes
// collide.
func templateHash(t *corev1.PodTemplateSpec, salt int) string {
	t = t.DeepCopy()
	delete(t.Labels, appsv1.DefaultDeploymentUniqueLabelKey)
	raw, err := json.Marshal(t)
	if err != nil {
		panic(fmt.Sprintf("workload: encode pod template: %v", err)) // registered types encode
	}
	return suffix(10, string(raw), strconv.Itoa(salt))
}

// createCurrent makes the ReplicaSet for d's template, with as many pods as the
// strategy allows at once.
func (w *rollout) createCurrent() {
	hash, name := "", ""
	for salt := 0; ; salt++ {
		hash = templateHash(&w.d.Spec.Template, salt)
		name = named(w.d.Name, hash)
		if _, taken := w.r.Get(api.Key{Resource: api.ReplicaSets, Namespace: w.d.Namespace, Name: name}); !taken {
			break
		}
	}
	t := w.d.Spec.Template.DeepCopy()
	t.Labels = withLabel(t.Labels, hash)
	selector := w.d.Spec.Selector.DeepCopy()
	selector.MatchLabels = withLabel(selector.MatchLabels, hash)
	rs := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: w.d.Namespace, Name: name, Labels: t.Labels,
			OwnerReferences: []metav1.OwnerReference{controllerRef(w.d)},
		},
		Spec: appsv1.ReplicaSetSpec{MinReadySeconds: w.d.Spec.MinReadySeconds, Selector: selector, Template: *t, Replicas: new(int32)},
	}
	w.current, w.created = &set{ReplicaSet: rs, minReady: rs.Spec.MinReadySeconds}, true
	if w.d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
		w.recreate()
	} else {
		w.roll()
	}
}

func withLabel(in map[string]string, hash string) map[string]string {
	out := maps.Clone(in)
	if out == nil {
		out = map[string]string{}
	}
	out[appsv1.DefaultDeploymentUniqueLabelKey] = hash
	return out
}
