package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

const (
	backoffFirst = 10 * time.Second
	backoffMost  = 5 * time.Minute
	// backoffReset is how long a container must run for its restarts to be
	// forgotten.
	backoffReset = 10 * time.Minute
	// exitUnknown is reported for a container that vanished while it ran, as in
	// Kubernetes.
	exitUnknown = 137

	idPrefix = "containerd://"
)

// attempts are the runs of one container that matter: the newest and the one
// before. They are stale when the current one ended with an earlier sandbox (a
// restart of the machine), or is known from the pod's status only.
type attempts struct {
	current, previous *Container
	stale             bool
}

// nextAttempt is the number of the attempt after the current one.
func (a attempts) nextAttempt() int {
	if a.current == nil {
		return 0
	}
	return a.current.Attempt + 1
}

// attemptsByName has an entry for every container of the pod's spec.
func attemptsByName(pod *corev1.Pod, sandbox *Sandbox) map[string]attempts {
	byName := make(map[string]attempts, len(pod.Spec.Containers)+len(pod.Spec.InitContainers))
	for _, c := range allContainers(pod) {
		byName[c.Name] = attempts{}
	}
	if sandbox != nil {
		for i := range sandbox.Containers {
			c := &sandbox.Containers[i]
			a, known := byName[c.Name]
			if !known {
				continue
			}
			switch {
			case a.current == nil || c.Attempt > a.current.Attempt:
				a.current, a.previous = c, a.current
				a.stale = isStale(sandbox, c)
			case a.previous == nil || c.Attempt > a.previous.Attempt:
				a.previous = c
			}
			byName[c.Name] = a
		}
	}
	for name, a := range byName {
		if a.current == nil {
			if g := ghostOf(pod, name); g != nil {
				byName[name] = attempts{current: g, stale: true}
			}
		}
	}
	return byName
}

// ghostOf rebuilds the last attempt of a container from the pod's status.
func ghostOf(pod *corev1.Pod, name string) *Container {
	s := statusOf(pod, name)
	if s == nil || s.ContainerID == "" {
		return nil
	}
	c := &Container{ID: strings.TrimPrefix(s.ContainerID, idPrefix), Name: name, Attempt: int(s.RestartCount), State: Exited,
		Image: s.Image, ImageRef: s.ImageID, ExitCode: exitUnknown}
	t := s.State.Terminated
	if t == nil && s.State.Running == nil {
		t = s.LastTerminationState.Terminated
	}
	if t != nil {
		c.ExitCode, c.Signal, c.OOMKilled = t.ExitCode, t.Signal, t.Reason == reasonOOMKilled
		c.StartedAt, c.FinishedAt = t.StartedAt.Time, t.FinishedAt.Time
	} else if r := s.State.Running; r != nil {
		c.StartedAt = r.StartedAt.Time
	}
	return c
}

// restart is the decision about a container that has exited.
type restart struct {
	again  bool
	delay  time.Duration // what is left of the backoff
	whole  time.Duration // all of it
	streak int           // restarts in a row, with the one to come
}

// restartOf decides whether and when a dead container runs again. The first
// restart comes at once, the second after 10 s, doubling up to 5 min; a run of 10
// min or a changed definition starts over.
func restartOf(now time.Time, pod *corev1.Pod, c *corev1.Container, init bool, a attempts, local LocalState) restart {
	dead := a.current
	if !restarts(pod, c, init, dead, a.stale) {
		return restart{}
	}
	ran := dead.FinishedAt.Sub(dead.StartedAt)
	if a.stale || dead.Hash != local.Hashes[c.Name] || ran >= backoffReset {
		return restart{again: true, streak: 1}
	}
	streak, known := local.Streaks[dead.ID]
	if !known {
		streak = dead.Attempt
	}
	whole := crashDelay(streak)
	return restart{again: true, whole: whole, delay: max(dead.FinishedAt.Add(whole).Sub(now), 0), streak: streak + 1}
}

// crashDelay is the wait before a restart when streak restarts came just before.
func crashDelay(streak int) time.Duration {
	if streak <= 0 {
		return 0
	}
	d := backoffFirst
	for range streak - 1 {
		if d *= 2; d >= backoffMost {
			return backoffMost
		}
	}
	return d
}

// restarts applies the restart policy.
func restarts(pod *corev1.Pod, c *corev1.Container, init bool, dead *Container, stale bool) bool {
	if stale && init {
		return true // a new sandbox is initialized anew
	}
	if isSidecar(c) && init {
		return true
	}
	policy := pod.Spec.RestartPolicy
	if c.RestartPolicy != nil {
		policy = corev1.RestartPolicy(*c.RestartPolicy)
	}
	switch policy {
	case corev1.RestartPolicyNever:
		return false
	case corev1.RestartPolicyOnFailure:
		return dead.ExitCode != 0
	}
	return !init || dead.ExitCode != 0
}

// outcome is the pod's final phase, once there is one.
func outcome(now time.Time, pod *corev1.Pod, byName map[string]attempts, local LocalState) (phase corev1.PodPhase, done bool) {
	if ph := pod.Status.Phase; ph == corev1.PodSucceeded || ph == corev1.PodFailed {
		return ph, true
	}
	if deadlineExceeded(now, pod) {
		return corev1.PodFailed, true
	}
	exited := func(c *corev1.Container, init bool) (final, ok bool) {
		a := byName[c.Name]
		if a.current == nil || a.current.State != Exited || restarts(pod, c, init, a.current, a.stale) {
			return false, false
		}
		if _, spec := local.Hashes[c.Name]; spec && !a.stale && !init && a.current.Hash != local.Hashes[c.Name] {
			return false, false // a changed definition is a new chance
		}
		return true, a.current.ExitCode == 0
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; !isSidecar(c) {
			if final, ok := exited(c, true); final && !ok {
				return corev1.PodFailed, true
			}
		}
	}
	phase = corev1.PodSucceeded
	for i := range pod.Spec.Containers {
		final, ok := exited(&pod.Spec.Containers[i], false)
		if !final {
			return "", false
		}
		if !ok {
			phase = corev1.PodFailed
		}
	}
	return phase, len(pod.Spec.Containers) > 0
}

// deadlineExceeded reports that the pod has been active for longer than it may.
func deadlineExceeded(now time.Time, pod *corev1.Pod) bool {
	d, start := pod.Spec.ActiveDeadlineSeconds, pod.Status.StartTime
	return d != nil && start != nil && now.Sub(start.Time) >= time.Duration(*d)*time.Second
}

// isStale reports that a container belongs to namespaces that are no more.
func isStale(s *Sandbox, c *Container) bool { return s.Lost || c.CreatedAt.Before(s.CreatedAt) }

func isSidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// podContainer is a container of the spec and whether it is an init container.
type podContainer struct {
	*corev1.Container
	Init bool
}

// allContainers lists init containers, then the others, in the spec's order.
func allContainers(pod *corev1.Pod) []podContainer {
	list := make([]podContainer, 0, len(pod.Spec.InitContainers)+len(pod.Spec.Containers))
	for i := range pod.Spec.InitContainers {
		list = append(list, podContainer{&pod.Spec.InitContainers[i], true})
	}
	for i := range pod.Spec.Containers {
		list = append(list, podContainer{&pod.Spec.Containers[i], false})
	}
	return list
}

func containerSpec(pod *corev1.Pod, name string) *corev1.Container {
	for _, c := range allContainers(pod) {
		if c.Name == name {
			return c.Container
		}
	}
	return nil
}

// statusOf is the reported status of a container, or nil.
func statusOf(pod *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// HashContainer identifies what a running container was made from. Fields that
// take effect without a restart (probes, hooks, ports, pull policy) are left out.
func HashContainer(c *corev1.Container) string {
	k := *c
	k.LivenessProbe, k.ReadinessProbe, k.StartupProbe, k.Lifecycle = nil, nil, nil, nil
	k.Ports, k.ImagePullPolicy, k.RestartPolicy, k.RestartPolicyRules = nil, "", nil, nil
	data, err := json.Marshal(&k)
	if err != nil {
		panic(fmt.Sprintf("agent: marshal container %s: %v", c.Name, err)) // plain data always marshals
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}
