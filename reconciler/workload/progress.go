package workload

import (
	"fmt"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// RolloutStatus tells how far a Deployment is from what its commit wants.
type RolloutStatus struct {
	// Done: every pod is of the newest template and available. Failed: nothing moved
	// for progressDeadlineSeconds; it may still become Done later.
	Done, Failed bool
	// Line describes it: `deployments.apps "default/hello": 3 of 4 updated, 2 ready`,
	// with the reasons when pods are not ready.
	Line string
	// Reasons say why pods are not ready, each once, at most five.
	Reasons []string
}

// Rollout describes the progress of d, for those who wait for it. It changes
// nothing.
func Rollout(r api.Reader, d *appsv1.Deployment) RolloutStatus {
	want, s := deref(d.Spec.Replicas, 1), d.Status
	head := api.KeyOf(d).String() + ": "
	switch {
	case s.ObservedGeneration < d.Generation:
		return RolloutStatus{Line: head + "waiting for the controller"}
	case d.Spec.Paused:
		return RolloutStatus{Done: true, Line: head + "paused, no pods are replaced"}
	case complete(want, &s):
		return RolloutStatus{Done: true, Line: fmt.Sprintf("%s%d of %d ready", head, s.ReadyReplicas, want)}
	}
	var out RolloutStatus
	out.Line = fmt.Sprintf("%s%d of %d updated, %d ready", head, s.UpdatedReplicas, want, s.ReadyReplicas)
	if s.ReadyReplicas > s.AvailableReplicas {
		out.Line += fmt.Sprintf(", %d available", s.AvailableReplicas)
	}
	if old := s.Replicas - s.UpdatedReplicas; old > 0 {
		out.Line += fmt.Sprintf(", %d old still running", old)
	}
	out.Reasons = currentReasons(r, d)
	if c := deploymentCondition(&s, appsv1.DeploymentProgressing); c != nil && c.Reason == reasonDeadline {
		out.Failed = true
		out.Line += fmt.Sprintf("; no progress for %d s", deref(d.Spec.ProgressDeadlineSeconds, 600))
	}
	if len(out.Reasons) > 0 {
		out.Line += "; " + strings.Join(out.Reasons, "; ")
	}
	return out
}

// currentReasons collects why the pods of d's template are not ready.
func currentReasons(r api.Reader, d *appsv1.Deployment) []string {
	const most = 5
	var reasons []string
	seen := map[string]bool{}
	for rs := range api.Owned[*appsv1.ReplicaSet](r, d.UID) {
		if !sameTemplate(&rs.Spec.Template, &d.Spec.Template) {
			continue
		}
		for pod := range api.Owned[*corev1.Pod](r, rs.UID) {
			why := WhyNotReady(pod)
			if why == "" || seen[why] || len(reasons) == most || pod.DeletionTimestamp != nil {
				continue
			}
			seen[why] = true
			reasons = append(reasons, "pod "+pod.Name+": "+why)
		}
	}
	return reasons
}

// starting are the waiting reasons of a container that is on its normal way.
var starting = map[string]bool{"": true, "ContainerCreating": true, "PodInitializing": true}

// WhyNotReady explains in a few words what keeps pod from being ready; "" if it is
// ready or on its normal way to it.
func WhyNotReady(pod *corev1.Pod) string {
	if api.PodReady(pod) || pod.Status.Phase == corev1.PodSucceeded {
		return ""
	}
	if pod.Status.Phase == corev1.PodFailed {
		return phrase(orText(pod.Status.Reason, "failed"), pod.Status.Message)
	}
	if c := api.PodCondition(pod, corev1.PodScheduled); c != nil && c.Status == corev1.ConditionFalse && pod.Spec.NodeName == "" {
		return "not placed: " + c.Message
	}
	probing := ""
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for i := range list {
			cs := &list[i]
			switch {
			case cs.State.Waiting != nil && !starting[cs.State.Waiting.Reason]:
				return "container " + cs.Name + ": " + phrase(cs.State.Waiting.Reason, cs.State.Waiting.Message) + lastExit(cs)
			case cs.State.Terminated != nil && cs.State.Terminated.ExitCode != 0:
				return "container " + cs.Name + ": " + exit(cs.State.Terminated)
			case cs.State.Running != nil && !cs.Ready && probing == "":
				probing = notReadyYet(pod, cs)
			}
		}
	}
	return probing
}

// notReadyYet says which probe a running container still has to pass.
func notReadyYet(pod *corev1.Pod, cs *corev1.ContainerStatus) string {
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		switch {
		case c.Name != cs.Name:
		case c.StartupProbe != nil && (cs.Started == nil || !*cs.Started):
			return "container " + c.Name + ": startup probe has not passed" + readyMessage(pod) + lastExit(cs)
		case c.ReadinessProbe != nil:
			return "container " + c.Name + ": readiness probe has not passed" + readyMessage(pod) + lastExit(cs)
		}
	}
	return ""
}

func readyMessage(pod *corev1.Pod) string {
	if c := api.PodCondition(pod, corev1.PodReady); c != nil && c.Message != "" {
		return " (" + c.Message + ")"
	}
	return ""
}

func lastExit(cs *corev1.ContainerStatus) string {
	if t := cs.LastTerminationState.Terminated; t != nil {
		return ", last run: " + exit(t)
	}
	return ""
}

func exit(t *corev1.ContainerStateTerminated) string {
	text := fmt.Sprintf("exit code %d", t.ExitCode)
	if t.Signal != 0 {
		text = fmt.Sprintf("killed by signal %d", t.Signal)
	}
	if t.Reason != "" && t.Reason != "Error" && t.Reason != "Completed" {
		text += " (" + t.Reason + ")"
	}
	return text
}

func phrase(reason, message string) string {
	if message == "" {
		return reason
	}
	return reason + ": " + message
}

func orText(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
