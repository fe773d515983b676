package agent

import (
	"errors"
	"maps"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// LocalState is what the agent knows of a pod beyond what the runtime holds. All
// of it can be lost at any time: it is rebuilt by doing idempotent steps again.
type LocalState struct {
	// Hashes are the wanted ContainerConfig.Hash by container name.
	Hashes map[string]string
	// Images are the images that are present, by container name.
	Images map[string]Image
	// InFlight are the steps being carried out, by lane.
	InFlight map[string]Action
	// Retry says which steps are backing off.
	Retry map[RetryKey]Retry
	// Streaks are the restarts in a row that led to an attempt, by container ID.
	Streaks map[string]int

	// Attached says that IPs are the pod's addresses, Detached that they were given
	// back.
	Attached, Detached bool
	IPs                []netip.Addr

	// VolumesWant identifies the content that the pod's volumes should have,
	// VolumesHave what they have; "" before they were made.
	VolumesWant, VolumesHave string

	// PostStarted has the IDs of the containers whose post-start hook has run.
	PostStarted map[string]bool
	// Unhealthy are the running containers that have to be stopped, by ID.
	Unhealthy map[string]Verdict
	// Stops are the containers being stopped, by ID.
	Stops map[string]Stop
	// Probes are the results of probes, by container ID.
	Probes map[string]ProbeState
	// Messages are the termination messages of dead containers, by ID.
	Messages map[string]string

	// StopSince is when the stop of the whole pod began.
	StopSince time.Time
	// Withdrawn: services no longer send new connections to the pod.
	Withdrawn bool
	// Removed: the control plane no longer has the pod. Draining: the node stops.
	Removed, Draining bool
	// Cleaned: folder and mounts are gone. GoneReported: the control plane knows.
	Cleaned, GoneReported bool
}

// Image is an image that was made present for one attempt.
type Image struct {
	Image, Ref string
	Attempt    int
}

// RetryKey names a step that may back off.
type RetryKey struct {
	Lane   string
	Action Action
}

// Retry is the backoff of a step that did not succeed.
type Retry struct {
	At       time.Time
	Failures int
	Reason   string // for the container's waiting state: ErrImagePull, …
	Message  string
}

// Verdict says why a running container must be stopped. Grace, in seconds,
// overrides the pod's.
type Verdict struct {
	Reason string
	Grace  *int64
}

// Stop is how far the stop of one container has come.
type Stop struct {
	Since            time.Time
	PreStopped       bool
	TermAt, KilledAt time.Time
}

// ProbeState is what the probes of a running container say. Without a probe, both
// are true once the container runs and its post-start hook has returned.
type ProbeState struct{ Started, Ready bool }

// newLocalState returns a state with empty maps.
func newLocalState() LocalState {
	return LocalState{
		Hashes: map[string]string{}, Images: map[string]Image{}, InFlight: map[string]Action{},
		Retry: map[RetryKey]Retry{}, Streaks: map[string]int{}, PostStarted: map[string]bool{},
		Unhealthy: map[string]Verdict{}, Stops: map[string]Stop{}, Probes: map[string]ProbeState{},
		Messages: map[string]string{},
	}
}

// begin notes that s is about to be carried out.
func (l *LocalState) begin(s Step, now time.Time) {
	l.InFlight[s.Lane()] = s.Action
	switch s.Action {
	case PreStop, Terminate, Kill:
		stop := l.Stops[s.ID]
		if stop.Since.IsZero() {
			stop.Since = now
		}
		if s.Action == Terminate {
			stop.TermAt = now
		}
		l.Stops[s.ID] = stop
	}
}

// outcomeOf is what a step has brought.
type stepResult struct {
	step    Step
	err     error
	ref     string       // PullImage
	ips     []netip.Addr // AttachNetwork
	version string       // SyncVolumes
	sandbox *Sandbox     // CreateSandbox
	id      string       // CreateContainer
	image   string       // PullImage
	hash    string       // CreateContainer
	took    time.Duration
}

// done notes the result of a step. Errors only ever lead to a later retry.
func (l *LocalState) done(r stepResult, now time.Time) {
	s := r.step
	delete(l.InFlight, s.Lane())
	key := RetryKey{s.Lane(), s.Action}
	if r.err != nil {
		l.failed(key, r, now)
		return
	}
	delete(l.Retry, key)
	stop := l.Stops[s.ID]
	switch s.Action {
	case PullImage:
		l.Images[s.Container] = Image{Image: r.image, Ref: r.ref, Attempt: s.Attempt}
	case CreateSandbox:
		l.Attached, l.Detached, l.IPs = false, false, nil
	case AttachNetwork:
		l.Attached, l.Detached, l.IPs = true, false, r.ips
	case SyncVolumes:
		l.VolumesHave = r.version
	case CreateContainer:
		l.Streaks[r.id] = s.Streak
	case PostStart:
		l.PostStarted[s.ID] = true
	case Withdraw:
		l.Withdrawn = true
	case PreStop:
		stop.PreStopped = true
		l.Stops[s.ID] = stop
	case Kill:
		stop.KilledAt = now
		l.Stops[s.ID] = stop
	case DetachNetwork:
		l.Attached, l.Detached = false, true
	case RemoveSandbox:
		l.Attached, l.Detached = false, true
	case RemoveContainer:
		l.forget(s.ID)
	case Cleanup:
		l.Cleaned, l.VolumesHave = true, ""
	case ReportGone:
		l.GoneReported = true
	}
}

func (l *LocalState) failed(key RetryKey, r stepResult, now time.Time) {
	stop := l.Stops[r.step.ID]
	switch r.step.Action {
	case PostStart: // a failed hook kills the container, as in Kubernetes
		l.PostStarted[r.step.ID] = true
		l.Unhealthy[r.step.ID] = Verdict{Reason: "its post-start hook did not succeed: " + oneLine(r.err.Error())}
		return
	case Withdraw: // services that cannot be told do not hold up the stop
		l.Withdrawn = true
		return
	case PreStop: // a failed hook does not hold up the stop
		stop.PreStopped = true
		l.Stops[r.step.ID] = stop
		return
	case Terminate:
		stop.TermAt = time.Time{}
		l.Stops[r.step.ID] = stop
	}
	retry := l.Retry[key]
	retry.Failures++
	retry.At = now.Add(retryDelay(r.step.Action, retry.Failures))
	retry.Reason, retry.Message = waitingReason(r.step.Action, r.err), oneLine(r.err.Error())
	l.Retry[key] = retry
}

// retryDelay is the backoff after failures errors in a row. Pulls and starts
// follow Kubernetes; other steps are cheap and are tried sooner.
func retryDelay(a Action, failures int) time.Duration {
	switch a {
	case PullImage, StartContainer:
		return crashDelay(failures)
	}
	d := 200 * time.Millisecond
	for range failures - 1 {
		if d *= 2; d >= 30*time.Second {
			return 30 * time.Second
		}
	}
	return d
}

func (l *LocalState) forget(id string) {
	delete(l.Streaks, id)
	delete(l.PostStarted, id)
	delete(l.Unhealthy, id)
	delete(l.Stops, id)
	delete(l.Probes, id)
	delete(l.Messages, id)
}

// forgetGone drops what is known of containers that the runtime no longer has.
func (l *LocalState) forgetGone(s *Sandbox) {
	have := map[string]bool{}
	if s != nil {
		for _, c := range s.Containers {
			have[c.ID] = true
		}
	}
	for _, ids := range []map[string]bool{l.PostStarted} {
		maps.DeleteFunc(ids, func(id string, _ bool) bool { return !have[id] })
	}
	maps.DeleteFunc(l.Streaks, func(id string, _ int) bool { return !have[id] })
	maps.DeleteFunc(l.Unhealthy, func(id string, _ Verdict) bool { return !have[id] })
	maps.DeleteFunc(l.Stops, func(id string, _ Stop) bool { return !have[id] })
	maps.DeleteFunc(l.Probes, func(id string, _ ProbeState) bool { return !have[id] })
	maps.DeleteFunc(l.Messages, func(id string, _ string) bool { return !have[id] })
}

// adopt takes over from the pod's reported status what a restarted agent cannot
// see: which running containers had passed their startup hooks and probes.
func (l *LocalState) adopt(pod *corev1.Pod, s *Sandbox) {
	if s == nil {
		return
	}
	for _, c := range s.Containers {
		st := statusOf(pod, c.Name)
		if st == nil || st.ContainerID != idPrefix+c.ID || c.State != Running {
			continue
		}
		if st.Started != nil && *st.Started {
			l.PostStarted[c.ID] = true
			l.Probes[c.ID] = ProbeState{Started: true, Ready: st.Ready}
		}
	}
}

// The reasons of a waiting container, as in Kubernetes.
const (
	reasonContainerCreating = "ContainerCreating"
	reasonPodInitializing   = "PodInitializing"
	reasonErrImagePull      = "ErrImagePull"
	reasonImagePullBackOff  = "ImagePullBackOff"
	reasonErrImageNeverPull = "ErrImageNeverPull"
	reasonInvalidImageName  = "InvalidImageName"
	reasonConfigError       = "CreateContainerConfigError"
	reasonCreateError       = "CreateContainerError"
	reasonRunError          = "RunContainerError"
	reasonCrashLoop         = "CrashLoopBackOff"
	reasonOOMKilled         = "OOMKilled"
)

// waitingError is an error with the reason that the container's status shows.
type waitingError struct {
	reason string
	err    error
}

func (e *waitingError) Error() string { return e.err.Error() }
func (e *waitingError) Unwrap() error { return e.err }

func waitingReason(a Action, err error) string {
	if w, ok := errors.AsType[*waitingError](err); ok {
		return w.reason
	}
	switch {
	case errors.Is(err, ErrImageInvalid):
		return reasonInvalidImageName
	case errors.Is(err, ErrImageNeverPull):
		return reasonErrImageNeverPull
	case errors.Is(err, ErrInvalidContainer), errors.Is(err, ErrRunAsRoot):
		return reasonConfigError
	}
	switch a {
	case PullImage:
		return reasonErrImagePull
	case CreateContainer:
		return reasonCreateError
	case StartContainer:
		return reasonRunError
	}
	return ""
}

// oneLine makes an error fit for a status message: one line, bounded.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 1024 {
		s = strings.ToValidUTF8(s[:1024], "") + "…"
	}
	return s
}
