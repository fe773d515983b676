package workload

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"decree.dev/decree/schemas/api"
)

const (
	// burst is the most pods that one pass creates or deletes for a ReplicaSet.
	burst = 500
	// keepFinished is how many failed or evicted pods of a ReplicaSet stay to be
	// looked at after they were replaced.
	keepFinished = 3
	// replaceDelay is the least age of a pod that ended before it is replaced: a pod
	// that every node turns away must not be made again in every pass.
	replaceDelay = 10 * time.Second
)

// ReplicaSet returns what brings the pods of rs to their number, and its status.
// wait is the time after which it should be called again without any change, zero
// for never.
func ReplicaSet(now time.Time, r api.Reader, rs *appsv1.ReplicaSet) (ms []api.Mutation, wait time.Duration) {
	if rs.DeletionTimestamp != nil || !selectorOf(rs.Spec.Selector).Matches(labels.Set(rs.Spec.Template.Labels)) {
		return nil, 0
	}
	pods := slices.Collect(api.Owned[*corev1.Pod](r, rs.UID))
	minReady := seconds(rs.Spec.MinReadySeconds)
	t := count(pods, minReady, now)
	switch diff := int(deref(rs.Spec.Replicas, 1) - t.active); {
	case diff > 0:
		if wait = replaceWait(now, pods); wait == 0 {
			ms = createPods(now, r, rs, min(diff, burst))
		}
	case diff < 0:
		ms = deletePods(now, r, rs, pods, min(-diff, burst))
	}
	ms = append(ms, sweepFinished(pods)...)
	status := replicaSetStatus(rs, pods, t)
	if !equality.Semantic.DeepEqual(status, rs.Status) {
		changed := api.Clone(rs)
		changed.Status = status
		ms = append(ms, api.Guarded(api.UpdateStatus, changed))
	}
	return ms, earliest(wait, t.wait)
}

func replicaSetStatus(rs *appsv1.ReplicaSet, pods []*corev1.Pod, t tally) appsv1.ReplicaSetStatus {
	status := *rs.Status.DeepCopy()
	status.Replicas, status.ReadyReplicas, status.AvailableReplicas = t.active, t.ready, t.available
	status.ObservedGeneration = rs.Generation
	template := labels.Set(rs.Spec.Template.Labels).AsSelectorPreValidated()
	status.FullyLabeledReplicas = 0
	for _, p := range pods {
		if api.PodActive(p) && template.Matches(labels.Set(p.Labels)) {
			status.FullyLabeledReplicas++
		}
	}
	return status
}

// replaceWait is how long replacements must wait because a pod ended young.
func replaceWait(now time.Time, pods []*corev1.Pod) time.Duration {
	var wait time.Duration
	for _, p := range pods {
		if p.Status.Phase == corev1.PodFailed && p.DeletionTimestamp == nil {
			wait = max(wait, p.CreationTimestamp.Add(replaceDelay).Sub(now))
		}
	}
	return wait
}

func createPods(now time.Time, r api.Reader, rs *appsv1.ReplicaSet, n int) []api.Mutation {
	ms := make([]api.Mutation, 0, n+2)
	names := make([]string, 0, n)
	for i := 0; len(names) < n; i++ {
		// The ReplicaSet's revision makes the names of a later pass new ones, and
		// those of a pass over an outdated view collide with what is there.
		name := named(rs.Name, suffix(5, string(rs.UID), rs.ResourceVersion, strconv.Itoa(i)))
		if _, taken := r.Get(api.Key{Resource: api.Pods, Namespace: rs.Namespace, Name: name}); taken || slices.Contains(names, name) {
			continue
		}
		names = append(names, name)
		ms = append(ms, create(podOf(rs, name)))
	}
	return note(ms, now, r, api.Note{
		About: rs, Reason: "SuccessfulCreate", Component: "replicaset-controller", Message: "Created " + listed("pod", names),
	})
}

// podOf makes a pod from the template of rs.
func podOf(rs *appsv1.ReplicaSet, name string) *corev1.Pod {
	t := rs.Spec.Template.DeepCopy()
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: rs.Namespace, Name: name, GenerateName: rs.Name + "-",
			Labels: t.Labels, Annotations: withoutReserved(t.Annotations), Finalizers: t.Finalizers,
			OwnerReferences: []metav1.OwnerReference{controllerRef(rs)},
		},
		Spec:   t.Spec,
		Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
}

// withoutReserved copies annotations without Decree's own: an object with an
// origin comes from Git, and what is derived from it does not.
func withoutReserved(in map[string]string) map[string]string {
	if in == nil {
		return nil
	}
	out := maps.Clone(in)
	maps.DeleteFunc(out, func(name, _ string) bool { return strings.HasPrefix(name, "decree.dev/") })
	return out
}

func deletePods(now time.Time, r api.Reader, rs *appsv1.ReplicaSet, pods []*corev1.Pod, n int) []api.Mutation {
	victims := Victims(now, seconds(rs.Spec.MinReadySeconds), pods)[:n]
	ms := make([]api.Mutation, 0, n+2)
	names := make([]string, 0, n)
	for _, p := range victims {
		ms = append(ms, remove(p))
		names = append(names, p.Name)
	}
	return note(ms, now, r, api.Note{
		About: rs, Reason: "SuccessfulDelete", Component: "replicaset-controller", Message: "Deleted " + listed("pod", names),
	})
}

// listed is "pod: a", or "12 pods: a, b, c, d, e and 7 more".
func listed(noun string, names []string) string {
	const shown = 5
	if len(names) == 1 {
		return noun + ": " + names[0]
	}
	text := fmt.Sprintf("%d %ss: %s", len(names), noun, strings.Join(names[:min(len(names), shown)], ", "))
	if more := len(names) - shown; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// sweepFinished deletes all but the newest few pods that ended.
func sweepFinished(pods []*corev1.Pod) []api.Mutation {
	var finished []*corev1.Pod
	for _, p := range pods {
		if api.PodFinished(p) && p.DeletionTimestamp == nil {
			finished = append(finished, p)
		}
	}
	if len(finished) <= keepFinished {
		return nil
	}
	slices.SortStableFunc(finished, newestFirst)
	var ms []api.Mutation
	for _, p := range finished[keepFinished:] {
		ms = append(ms, remove(p))
	}
	return ms
}

func newestFirst(a, b *corev1.Pod) int {
	return cmp.Or(b.CreationTimestamp.Compare(a.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
}

// Victims orders the active pods by how little is lost with them, the first to be
// deleted first. The order is that of Kubernetes (ActivePodsWithRanks): without a
// node, not running, not ready, lower pod-deletion-cost, several on one node, ready
// for a shorter time, more restarts, younger. In addition, a pod that is not yet
// available goes before an available one, so that scaling down never costs
// availability that another pod could pay.
func Victims(now time.Time, minReady time.Duration, pods []*corev1.Pod) []*corev1.Pod {
	onNode := map[string]int{}
	candidates := make([]candidate, 0, len(pods))
	for _, p := range pods {
		if api.PodActive(p) {
			candidates = append(candidates, rate(p, now, minReady))
			onNode[p.Spec.NodeName]++
		}
	}
	slices.SortStableFunc(candidates, func(a, b candidate) int {
		return cmp.Or(
			slices.Compare(a.rank[:], b.rank[:]),
			cmp.Compare(onNode[b.pod.Spec.NodeName], onNode[a.pod.Spec.NodeName]),
			b.readySince.Compare(a.readySince),
			cmp.Compare(b.restarts, a.restarts),
			newestFirst(a.pod, b.pod),
		)
	})
	out := make([]*corev1.Pod, len(candidates))
	for i, c := range candidates {
		out[i] = c.pod
	}
	return out
}

type candidate struct {
	pod        *corev1.Pod
	rank       [5]int // bound, phase, ready, available, deletion cost
	readySince time.Time
	restarts   int32
}

func rate(p *corev1.Pod, now time.Time, minReady time.Duration) candidate {
	c := candidate{pod: p}
	if p.Spec.NodeName != "" {
		c.rank[0] = 1
	}
	switch p.Status.Phase {
	case corev1.PodRunning:
		c.rank[1] = 2
	case corev1.PodUnknown:
		c.rank[1] = 1
	}
	if since, ready := api.PodAvailableAt(p, 0); ready {
		c.rank[2], c.readySince = 1, since
	}
	if api.PodAvailable(p, minReady, now) {
		c.rank[3] = 1
	}
	if cost, err := strconv.ParseInt(p.Annotations[corev1.PodDeletionCost], 10, 32); err == nil {
		c.rank[4] = int(cost)
	}
	for _, s := range p.Status.ContainerStatuses {
		c.restarts += s.RestartCount
	}
	return c
}
