package workload

import (
	"fmt"
	"math"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// The reasons of a Deployment's Progressing condition, as kubectl knows them.
const (
	reasonNewSet      = "NewReplicaSetCreated"
	reasonFoundSet    = "FoundNewReplicaSet"
	reasonUpdated     = "ReplicaSetUpdated"
	reasonComplete    = "NewReplicaSetAvailable"
	reasonDeadline    = "ProgressDeadlineExceeded"
	reasonPaused      = "DeploymentPaused"
	reasonResumed     = "DeploymentResumed"
	reasonAvailable   = "MinimumReplicasAvailable"
	reasonUnavailable = "MinimumReplicasUnavailable"
)

// updateStatus adds d's new status to the plan if it differs, and returns the time
// until the progress deadline.
func (w *rollout) updateStatus() time.Duration {
	status := w.d.Status.DeepCopy()
	status.ObservedGeneration = w.d.Generation
	status.Replicas, status.UpdatedReplicas = w.observedReplicas, w.updated
	status.ReadyReplicas, status.AvailableReplicas = w.ready, w.available
	status.UnavailableReplicas = max(0, max(w.want, w.observedReplicas)-w.available)
	w.setAvailable(status)
	wait := w.setProgress(status)
	if !equality.Semantic.DeepEqual(*status, w.d.Status) {
		d := api.Clone(w.d)
		d.Status = *status
		w.out = append(w.out, api.Guarded(api.UpdateStatus, d))
	}
	return wait
}

func (w *rollout) setAvailable(status *appsv1.DeploymentStatus) {
	c := appsv1.DeploymentCondition{Type: appsv1.DeploymentAvailable, Status: corev1.ConditionTrue, Reason: reasonAvailable,
		Message: "Deployment has minimum availability."}
	if w.available < w.want-w.unavailable {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, reasonUnavailable, "Deployment does not have minimum availability."
	}
	w.setCondition(status, c, false)
}

// setProgress keeps the Progressing condition: what moved last, and when. The
// deadline counts from the last time that anything moved.
func (w *rollout) setProgress(status *appsv1.DeploymentStatus) time.Duration {
	old := deploymentCondition(&w.d.Status, appsv1.DeploymentProgressing)
	c := appsv1.DeploymentCondition{Type: appsv1.DeploymentProgressing, Status: corev1.ConditionTrue}
	if w.d.Spec.Paused {
		c.Status, c.Reason, c.Message = corev1.ConditionUnknown, reasonPaused, "Deployment is paused"
		w.setCondition(status, c, false)
		return 0
	}
	name := w.current.Name
	restarted := old == nil || old.Reason == reasonPaused || w.created || w.found
	settled := !restarted && old.Reason == reasonComplete && status.Replicas == status.UpdatedReplicas
	switch {
	case w.created:
		c.Reason, c.Message = reasonNewSet, fmt.Sprintf("Created new replica set %q", name)
	case w.found:
		c.Reason, c.Message = reasonFoundSet, fmt.Sprintf("Found new replica set %q", name)
	case complete(w.want, status):
		c.Reason, c.Message = reasonComplete, fmt.Sprintf("ReplicaSet %q has successfully progressed.", name)
	case settled:
		return 0 // a finished rollout does not fail later, whatever its pods do
	case old != nil && old.Reason == reasonPaused:
		c.Reason, c.Message = reasonResumed, "Deployment is resumed"
	case old == nil || progressed(&w.d.Status, status):
		c.Reason, c.Message = reasonUpdated, fmt.Sprintf("ReplicaSet %q is progressing.", name)
		restarted = true
	default:
		return w.checkDeadline(status, old)
	}
	w.setCondition(status, c, restarted)
	if c.Reason == reasonComplete {
		return 0
	}
	return w.deadline()
}

// deadline is the time a rollout may stand still, zero for any.
func (w *rollout) deadline() time.Duration {
	n := deref(w.d.Spec.ProgressDeadlineSeconds, 600)
	if n <= 0 || n == math.MaxInt32 {
		return 0
	}
	return seconds(n)
}

func (w *rollout) checkDeadline(status *appsv1.DeploymentStatus, old *appsv1.DeploymentCondition) time.Duration {
	limit := w.deadline()
	if limit == 0 || old.Reason == reasonDeadline {
		return 0
	}
	if left := old.LastUpdateTime.Add(limit).Sub(w.now); left > 0 {
		return left
	}
	w.setCondition(status, appsv1.DeploymentCondition{
		Type: appsv1.DeploymentProgressing, Status: corev1.ConditionFalse, Reason: reasonDeadline,
		Message: fmt.Sprintf("ReplicaSet %q has timed out progressing.", w.current.Name),
	}, true)
	return 0
}

func complete(want int32, s *appsv1.DeploymentStatus) bool {
	return s.UpdatedReplicas == want && s.Replicas == want && s.AvailableReplicas == want
}

func progressed(old, new *appsv1.DeploymentStatus) bool {
	return new.UpdatedReplicas > old.UpdatedReplicas ||
		new.Replicas-new.UpdatedReplicas < old.Replicas-old.UpdatedReplicas ||
		new.ReadyReplicas > old.ReadyReplicas || new.AvailableReplicas > old.AvailableReplicas
}

func deploymentCondition(s *appsv1.DeploymentStatus, t appsv1.DeploymentConditionType) *appsv1.DeploymentCondition {
	for i := range s.Conditions {
		if s.Conditions[i].Type == t {
			return &s.Conditions[i]
		}
	}
	return nil
}

// setCondition writes c into status if it says something new, or if touch asks for
// a new update time.
func (w *rollout) setCondition(status *appsv1.DeploymentStatus, c appsv1.DeploymentCondition, touch bool) {
	c.LastUpdateTime, c.LastTransitionTime = metav1.NewTime(w.now), metav1.NewTime(w.now)
	old := deploymentCondition(status, c.Type)
	switch {
	case old == nil:
		status.Conditions = append(status.Conditions, c)
		return
	case !touch && old.Status == c.Status && old.Reason == c.Reason && old.Message == c.Message:
		return
	case old.Status == c.Status:
		c.LastTransitionTime = old.LastTransitionTime
	}
	*old = c
}
