package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Status computes the whole status of a pod from what the runtime holds and what
// the agent knows. It keeps from pod.Status what others wrote (the scheduler's
// condition, transition times). Pure; times are cut to seconds, as JSON does.
func Status(now time.Time, pod *corev1.Pod, sandbox *Sandbox, local LocalState, hostIPs []netip.Addr) corev1.PodStatus {
	s := statusWriter{now: now, pod: pod, local: local, byName: attemptsByName(pod, sandbox)}
	old := &pod.Status
	out := corev1.PodStatus{
		ObservedGeneration: pod.Generation, NominatedNodeName: old.NominatedNodeName,
		StartTime: old.StartTime, QOSClass: QOSClass(pod),
	}
	if out.StartTime == nil {
		out.StartTime = seconds(now)
	}
	for _, ip := range hostIPs {
		out.HostIPs = append(out.HostIPs, corev1.HostIP{IP: ip.String()})
	}
	if len(hostIPs) > 0 {
		out.HostIP = hostIPs[0].String()
	}
	out.PodIP, out.PodIPs = old.PodIP, slices.Clone(old.PodIPs)
	if local.Attached {
		out.PodIP, out.PodIPs = "", nil
		for _, ip := range local.IPs {
			out.PodIPs = append(out.PodIPs, corev1.PodIP{IP: ip.String()})
		}
		if len(local.IPs) > 0 {
			out.PodIP = local.IPs[0].String()
		}
	}
	initialized := s.initialized()
	for i := range pod.Spec.InitContainers {
		out.InitContainerStatuses = append(out.InitContainerStatuses, s.container(&pod.Spec.InitContainers[i], true, i == 0))
	}
	for i := range pod.Spec.Containers {
		out.ContainerStatuses = append(out.ContainerStatuses, s.container(&pod.Spec.Containers[i], false, initialized))
	}
	out.Phase, out.Reason, out.Message = s.phase(out.ContainerStatuses, initialized)
	out.Conditions = s.conditions(&out, initialized)
	return out
}

type statusWriter struct {
	now    time.Time
	pod    *corev1.Pod
	local  LocalState
	byName map[string]attempts
}

// initialized reports that the ordinary containers may run or have run.
func (s *statusWriter) initialized() bool { return len(s.uninitialized()) == 0 }

// uninitialized lists the init containers that still have to complete or start.
func (s *statusWriter) uninitialized() (names []string) {
	for i := range s.pod.Spec.Containers {
		if a := s.byName[s.pod.Spec.Containers[i].Name]; a.current != nil && !a.stale {
			return nil
		}
	}
	for i := range s.pod.Spec.InitContainers {
		c := &s.pod.Spec.InitContainers[i]
		a := s.byName[c.Name]
		switch {
		case isSidecar(c) && a.current != nil && s.local.Probes[a.current.ID].Started:
		case !isSidecar(c) && a.current != nil && !a.stale && a.current.State == Exited && a.current.ExitCode == 0:
		default:
			names = append(names, c.Name)
		}
	}
	return names
}

// container is the status of one container. turn says that nothing before it holds
// it up.
func (s *statusWriter) container(c *corev1.Container, init, turn bool) corev1.ContainerStatus {
	a := s.byName[c.Name]
	st := corev1.ContainerStatus{Name: c.Name, Image: c.Image}
	no := false
	st.Started = &no
	if i, ok := s.local.Images[c.Name]; ok {
		st.ImageID = i.Ref
	}
	cur := a.current
	if cur == nil {
		st.State.Waiting = s.waiting(c, init, turn)
		return st
	}
	st.RestartCount, st.ContainerID = int32(cur.Attempt), idPrefix+cur.ID
	st.ImageID = firstNonEmpty(cur.ImageRef, st.ImageID)
	if a.previous != nil {
		st.LastTerminationState.Terminated = s.terminated(a.previous)
	} else if old := statusOf(s.pod, c.Name); old != nil && !a.stale && old.RestartCount == st.RestartCount {
		st.LastTerminationState = old.LastTerminationState
	} else if old != nil && !a.stale && old.ContainerID != "" {
		st.LastTerminationState.Terminated = s.terminated(ghostOf(s.pod, c.Name))
	}
	switch cur.State {
	case Running:
		pr := s.local.Probes[cur.ID]
		st.State.Running = &corev1.ContainerStateRunning{StartedAt: *seconds(cur.StartedAt)}
		started := pr.Started
		st.Started, st.Ready = &started, pr.Started && pr.Ready
		if init && !isSidecar(c) {
			st.Ready = false
		}
	case Exited:
		s.exited(&st, c, init, a, turn)
	default:
		st.State.Waiting = s.waiting(c, init, turn)
	}
	return st
}

// exited fills the state of a container whose last attempt is over: terminated, or
// waiting for the next attempt.
func (s *statusWriter) exited(st *corev1.ContainerStatus, c *corev1.Container, init bool, a attempts, turn bool) {
	term := s.terminated(a.current)
	r := restartOf(s.now, s.pod, c, init, a, s.local)
	_, over := outcome(s.now, s.pod, s.byName, s.local)
	wait := s.waiting(c, init, turn)
	switch {
	case over || s.stopping() || !r.again:
		st.State.Terminated = term
		st.Ready = init && a.current.ExitCode == 0
	case a.stale && init:
		st.State.Waiting, st.LastTerminationState.Terminated = wait, term
	case r.delay > 0:
		st.LastTerminationState.Terminated = term
		st.State.Waiting = &corev1.ContainerStateWaiting{Reason: reasonCrashLoop,
			Message: fmt.Sprintf("back-off %s restarting failed container=%s pod=%s_%s(%s)", r.whole, c.Name, s.pod.Name, s.pod.Namespace, s.pod.UID)}
	case a.stale || (wait.Reason != reasonContainerCreating && wait.Reason != reasonPodInitializing):
		st.State.Waiting, st.LastTerminationState.Terminated = wait, term
	default:
		st.State.Terminated = term
	}
}

func (s *statusWriter) stopping() bool {
	return s.pod.DeletionTimestamp != nil || s.local.Removed || s.local.Draining
}

// waiting says why a container does not run yet.
func (s *statusWriter) waiting(c *corev1.Container, init, turn bool) *corev1.ContainerStateWaiting {
	for _, a := range []Action{PullImage, CreateContainer, StartContainer} {
		if r, ok := s.local.Retry[RetryKey{c.Name, a}]; ok && r.Reason != "" {
			w := &corev1.ContainerStateWaiting{Reason: r.Reason, Message: r.Message}
			if a == PullImage && r.Reason == reasonErrImagePull && r.Failures > 1 {
				w.Reason = reasonImagePullBackOff
				w.Message = fmt.Sprintf("Back-off pulling image %q: %s", c.Image, r.Message)
			}
			return w
		}
	}
	if r, ok := s.local.Retry[RetryKey{"", SyncVolumes}]; ok && r.Reason != "" {
		return &corev1.ContainerStateWaiting{Reason: r.Reason, Message: r.Message}
	}
	if len(s.pod.Spec.InitContainers) > 0 && !turn {
		return &corev1.ContainerStateWaiting{Reason: reasonPodInitializing}
	}
	return &corev1.ContainerStateWaiting{Reason: reasonContainerCreating}
}

// terminated is the end of one attempt.
func (s *statusWriter) terminated(c *Container) *corev1.ContainerStateTerminated {
	t := &corev1.ContainerStateTerminated{ExitCode: c.ExitCode, Signal: c.Signal, StartedAt: *seconds(c.StartedAt),
		FinishedAt: *seconds(c.FinishedAt), ContainerID: idPrefix + c.ID, Message: s.local.Messages[c.ID]}
	if old := statusOf(s.pod, c.Name); t.Message == "" && old != nil {
		for _, st := range []corev1.ContainerState{old.State, old.LastTerminationState} {
			if st.Terminated != nil && st.Terminated.ContainerID == t.ContainerID {
				t.Message = st.Terminated.Message
			}
		}
	}
	switch {
	case c.OOMKilled:
		t.Reason = reasonOOMKilled
	case c.FinishedAt.IsZero():
		t.Reason, t.Message = "ContainerStatusUnknown", "The container could not be located; the node may have restarted"
	case c.ExitCode == 0:
		t.Reason = "Completed"
	default:
		t.Reason = "Error"
	}
	return t
}

// phase sums the containers up.
func (s *statusWriter) phase(list []corev1.ContainerStatus, initialized bool) (phase corev1.PodPhase, reason, message string) {
	if ph, done := outcome(s.now, s.pod, s.byName, s.local); done {
		if old := s.pod.Status; old.Phase == ph {
			return ph, old.Reason, old.Message
		}
		if deadlineExceeded(s.now, s.pod) && ph == corev1.PodFailed {
			return ph, "DeadlineExceeded", "Pod was active on the node longer than the specified deadline"
		}
		return ph, "", ""
	}
	if s.stopping() && s.pod.Status.Phase != "" {
		return s.pod.Status.Phase, s.pod.Status.Reason, s.pod.Status.Message
	}
	if !initialized {
		return corev1.PodPending, "", ""
	}
	for i := range list {
		c := &list[i]
		if c.State.Waiting != nil && c.LastTerminationState.Terminated == nil {
			return corev1.PodPending, "", ""
		}
	}
	return corev1.PodRunning, "", ""
}

// seconds is t as the API carries it. The zero time stays zero.
func seconds(t time.Time) *metav1.Time {
	if t.IsZero() {
		return &metav1.Time{}
	}
	return &metav1.Time{Time: t.UTC().Truncate(time.Second)}
}

func firstNonEmpty(list ...string) string {
	for _, s := range list {
		if s != "" {
			return s
		}
	}
	return ""
}

// exitText says how a container ended and what follows, for people.
func exitText(now time.Time, pod *corev1.Pod, c Container, a attempts, local LocalState) string {
	how := fmt.Sprintf("Container %s exited with %d", c.Name, c.ExitCode)
	switch {
	case c.OOMKilled:
		how += " (out of memory, killed by the kernel)"
	case signalOf(c) != 0:
		how += fmt.Sprintf(" (%s)", signalName(signalOf(c)))
	}
	spec := containerSpec(pod, c.Name)
	if spec == nil || a.current == nil || a.current.ID != c.ID {
		return how
	}
	init := c.Init
	r := restartOf(now, pod, spec, init, a, local)
	switch {
	case !r.again && c.ExitCode == 0 && init:
		return how
	case !r.again:
		return how + fmt.Sprintf(", not restarted (restart policy %s)", firstNonEmpty(string(pod.Spec.RestartPolicy), "Always"))
	case r.delay <= 0:
		return how + ", restarting at once"
	}
	return how + fmt.Sprintf(", restarting in %s", r.whole)
}

func signalOf(c Container) int32 {
	if c.Signal == 0 && c.ExitCode > 128 && c.ExitCode < 128+65 {
		return c.ExitCode - 128
	}
	return c.Signal
}

func signalName(n int32) string {
	if s := unix.SignalName(syscall.Signal(n)); s != "" {
		return s
	}
	return fmt.Sprintf("signal %d", n)
}

// quoteList is "[a b]", as conditions name containers.
func quoteList(names []string) string { return "[" + strings.Join(names, " ") + "]" }
