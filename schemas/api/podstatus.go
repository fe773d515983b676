package api

import (
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// PodReason is the one word that says how a pod is doing, as kubectl shows it in
// the column STATUS: the reason of the container that is in the way, or the phase.
func PodReason(p *corev1.Pod) string {
	reason := string(p.Status.Phase)
	if p.Status.Reason != "" {
		reason = p.Status.Reason
	}
	if reason == "" {
		reason = string(corev1.PodPending)
	}
	if r, waiting := initReason(p); waiting {
		reason = r
	} else {
		reason = containerReason(p, reason)
	}
	if p.DeletionTimestamp != nil {
		if p.Status.Reason == "NodeLost" {
			return "Unknown"
		}
		return "Terminating"
	}
	return reason
}

// initReason describes the first init container that is not done.
func initReason(p *corev1.Pod) (string, bool) {
	for i := range p.Status.InitContainerStatuses {
		c := &p.Status.InitContainerStatuses[i]
		switch s := c.State; {
		case s.Terminated != nil && s.Terminated.ExitCode == 0:
			continue
		case c.Started != nil && *c.Started && sidecar(p, c.Name):
			continue
		case s.Terminated != nil:
			return "Init:" + terminatedReason(s.Terminated), true
		case s.Waiting != nil && s.Waiting.Reason != "" && s.Waiting.Reason != "PodInitializing":
			return "Init:" + s.Waiting.Reason, true
		default:
			return fmt.Sprintf("Init:%d/%d", i, len(p.Spec.InitContainers)), true
		}
	}
	return "", false
}

func containerReason(p *corev1.Pod, reason string) string {
	running := false
	for i := len(p.Status.ContainerStatuses) - 1; i >= 0; i-- {
		c := &p.Status.ContainerStatuses[i]
		switch s := c.State; {
		case s.Waiting != nil && s.Waiting.Reason != "":
			reason = s.Waiting.Reason
		case s.Terminated != nil:
			reason = terminatedReason(s.Terminated)
		case s.Running != nil && c.Ready:
			running = true
		}
	}
	if reason == "Completed" && running {
		if PodReady(p) {
			return "Running"
		}
		return "NotReady"
	}
	return reason
}

func terminatedReason(t *corev1.ContainerStateTerminated) string {
	switch {
	case t.Reason != "":
		return t.Reason
	case t.Signal != 0:
		return fmt.Sprintf("Signal:%d", t.Signal)
	}
	return fmt.Sprintf("ExitCode:%d", t.ExitCode)
}

// sidecar reports whether name is an init container that keeps running.
func sidecar(p *corev1.Pod, name string) bool {
	for i := range p.Spec.InitContainers {
		if c := &p.Spec.InitContainers[i]; c.Name == name {
			return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
		}
	}
	return false
}

// readyContainers counts the containers that serve; sidecars count like containers.
func readyContainers(p *corev1.Pod) (ready, total int) {
	total = len(p.Spec.Containers)
	for i := range p.Spec.InitContainers {
		if sidecar(p, p.Spec.InitContainers[i].Name) {
			total++
		}
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.Ready && c.State.Running != nil {
			ready++
		}
	}
	for _, c := range p.Status.InitContainerStatuses {
		if c.Ready && c.State.Running != nil && sidecar(p, c.Name) {
			ready++
		}
	}
	return ready, total
}

// podRestarts is the number of restarts and when the last one was: "3 (5m ago)".
func podRestarts(p *corev1.Pod, now time.Time) string {
	var count int32
	var last time.Time
	for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, c := range list {
			count += c.RestartCount
			if t := c.LastTerminationState.Terminated; t != nil && t.FinishedAt.After(last) {
				last = t.FinishedAt.Time
			}
		}
	}
	if count == 0 || last.IsZero() {
		return fmt.Sprint(count)
	}
	return fmt.Sprintf("%d (%s ago)", count, age(last, now))
}

// RedactURL returns a repository URL without user name and password, fit for tables
// and logs. The user of an ssh address is a part of it and stays.
func RedactURL(s string) string {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok || !strings.HasPrefix(scheme, "http") {
		return s
	}
	host, path, slash := strings.Cut(rest, "/")
	if i := strings.LastIndexByte(host, '@'); i >= 0 {
		host = host[i+1:]
	}
	if slash {
		path = "/" + path
	}
	return scheme + "://" + host + path
}
