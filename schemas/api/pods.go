package api

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// PodCondition returns the condition of this type, nil if the pod has none.
func PodCondition(p *corev1.Pod, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == t {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

// SetPodCondition writes c into p, which must not be shared. The transition time
// moves to now only when the condition's status changes. It reports whether status,
// reason or message differ from before.
func SetPodCondition(p *corev1.Pod, c corev1.PodCondition, now time.Time) bool {
	c.LastTransitionTime = metav1.NewTime(now)
	old := PodCondition(p, c.Type)
	if old == nil {
		p.Status.Conditions = append(p.Status.Conditions, c)
		return true
	}
	if old.Status == c.Status {
		c.LastTransitionTime = old.LastTransitionTime
	}
	changed := old.Status != c.Status || old.Reason != c.Reason || old.Message != c.Message
	if changed {
		*old = c
	}
	return changed
}

// PodFinished reports whether all containers of the pod have ended for good.
func PodFinished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// PodActive reports whether the pod counts as a replica: neither finished nor on
// its way out.
func PodActive(p *corev1.Pod) bool { return !PodFinished(p) && p.DeletionTimestamp == nil }

// PodReady reports whether the pod says it may receive traffic.
func PodReady(p *corev1.Pod) bool {
	c := PodCondition(p, corev1.PodReady)
	return c != nil && c.Status == corev1.ConditionTrue
}

// PodAvailableAt returns the moment from which the pod is available: it has been
// ready for minReady without a break. ok is false if the pod is not ready.
func PodAvailableAt(p *corev1.Pod, minReady time.Duration) (at time.Time, ok bool) {
	c := PodCondition(p, corev1.PodReady)
	if c == nil || c.Status != corev1.ConditionTrue {
		return time.Time{}, false
	}
	return c.LastTransitionTime.Add(minReady), true
}

// PodAvailable reports whether the pod has been ready for minReady at time now.
func PodAvailable(p *corev1.Pod, minReady time.Duration, now time.Time) bool {
	at, ok := PodAvailableAt(p, minReady)
	return ok && (minReady == 0 || !at.After(now))
}
