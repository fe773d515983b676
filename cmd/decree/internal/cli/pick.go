package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

// onePod finds the pod that logs and exec mean: "web", "pod/web", or the first
// running one of "deployment/web", "replicaset/web-7d4b9c" or "service/web".
func (e *env) onePod(ctx context.Context, c *client.Client, arg string) (string, error) {
	word, name, ok := strings.Cut(arg, "/")
	if !ok {
		return arg, nil
	}
	k, err := kindNamed(word)
	if err != nil {
		return "", err
	}
	if name == "" {
		return "", usageError{fmt.Errorf("%q: expected KIND/NAME", arg)}
	}
	if k.Resource == api.Pods {
		return name, nil
	}
	selector, err := e.selectorOf(ctx, c, k, name)
	if err != nil {
		return "", err
	}
	pods, _, err := client.List[*corev1.Pod](ctx, c, client.ListOptions{Namespace: e.namespace, LabelSelector: selector})
	if err != nil {
		return "", err
	}
	if len(pods) == 0 {
		return "", fmt.Errorf("%s %q has no pods: see why with decree describe %s", k.Singular, name, arg)
	}
	best := slices.MinFunc(pods, func(a, b *corev1.Pod) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Name, b.Name))
	})
	if len(pods) > 1 {
		fmt.Fprintf(e.Err, "Found %d pods, using pod/%s\n", len(pods), best.Name)
	}
	return best.Name, nil
}

// selectorOf is the label selector of the pods behind an object.
func (e *env) selectorOf(ctx context.Context, c *client.Client, k *api.Kind, name string) (string, error) {
	if k.Resource != api.Deployments && k.Resource != api.ReplicaSets && k.Resource != api.Services {
		return "", usageError{fmt.Errorf("%s/%s: expected a pod, deployment, replicaset or service", k.Singular, name)}
	}
	o, err := c.GetObject(ctx, k, e.namespace, name)
	if err != nil {
		return "", err
	}
	switch o := o.(type) {
	case *appsv1.Deployment:
		return metav1.FormatLabelSelector(o.Spec.Selector), nil
	case *appsv1.ReplicaSet:
		return metav1.FormatLabelSelector(o.Spec.Selector), nil
	case *corev1.Service:
		if len(o.Spec.Selector) > 0 {
			return labels.FormatLabels(o.Spec.Selector), nil
		}
	}
	return "", fmt.Errorf("%s %q selects no pods", k.Singular, name)
}

// rank orders pods by how much there is to see: ready ones first.
func rank(p *corev1.Pod) int {
	ready := api.PodCondition(p, corev1.PodReady)
	switch {
	case p.DeletionTimestamp != nil:
		return 3
	case ready != nil && ready.Status == corev1.ConditionTrue:
		return 0
	case p.Status.Phase == corev1.PodRunning:
		return 1
	}
	return 2
}
