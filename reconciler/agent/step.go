package agent

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Action is what a [Step] does.
type Action uint8

// The actions. Those from PullImage to Kill and RemoveContainer concern one
// container; the rest the whole pod.
const (
	Nothing Action = iota
	PullImage
	CreateContainer
	StartContainer
	PostStart
	PreStop
	Terminate
	Kill
	RemoveContainer
	CreateSandbox
	AttachNetwork
	SyncVolumes
	Withdraw
	DetachNetwork
	RemoveSandbox
	Cleanup
	ReportGone
)

var actionNames = [...]string{"nothing", "pull image", "create container", "start container", "post-start hook",
	"pre-stop hook", "terminate", "kill", "remove container", "create sandbox", "attach network", "sync volumes",
	"withdraw from services", "detach network", "remove sandbox", "clean up", "report gone"}

// String names the action for people.
func (a Action) String() string { return actionNames[a] }

// Step is one thing to do for a pod. It is data: [Next] decides it, the executor
// carries it out.
type Step struct {
	Action Action
	// Container is the name of the container concerned; "" for steps of the pod.
	Container string
	ID        string // the attempt concerned, when it exists already
	Attempt   int    // CreateContainer and PullImage: the attempt to come
	Init      bool
	// Streak is how many restarts in a row came before the attempt to create.
	Streak int
	// Grace is how long the container has left, for PreStop, Terminate and Kill; for
	// Withdraw it is how long to wait at most.
	Grace time.Duration
	// Reason says why, for events; "" when the step needs no explanation.
	Reason string
}

// Lane names what may have one step in flight: a container, or the pod with "".
func (s Step) Lane() string { return s.Container }

// String is used in logs and test failures.
func (s Step) String() string {
	if s.Container == "" {
		return s.Action.String()
	}
	return fmt.Sprintf("%s %s/%d", s.Action, s.Container, s.Attempt)
}

// Next decides the one next step for a pod, given what the runtime holds of it
// (nil: nothing) and what the agent knows. With [Nothing], wait is when to ask
// again without an event; zero: only after an event.
//
// It is pure and level-triggered: it keeps nothing between calls, so that it may be
// killed between any two steps. Steps of different lanes may be in flight at once;
// a lane that has one in flight gets no other.
func Next(now time.Time, pod *corev1.Pod, sandbox *Sandbox, local LocalState) (step Step, wait time.Duration) {
	p := newPlanner(now, pod, sandbox, local)
	switch {
	case p.terminating():
		p.stopPod()
	case p.finished():
		p.finishPod()
	default:
		if d, start := pod.Spec.ActiveDeadlineSeconds, pod.Status.StartTime; d != nil && start != nil {
			p.wakeIn(start.Add(time.Duration(*d) * time.Second).Sub(now))
		}
		p.runPod()
	}
	if p.step.Action != Nothing {
		return p.step, 0
	}
	return Step{}, p.wait
}

// planner is the working memory of one call of Next.
type planner struct {
	now     time.Time
	pod     *corev1.Pod
	sandbox *Sandbox
	local   LocalState
	byName  map[string]attempts

	step Step
	wait time.Duration
}

func newPlanner(now time.Time, pod *corev1.Pod, sandbox *Sandbox, local LocalState) *planner {
	return &planner{now: now, pod: pod, sandbox: sandbox, local: local, byName: attemptsByName(pod, sandbox)}
}

// emit takes s as the step unless one was taken before, its lane is busy, or it is
// backing off. It reports whether planning should stop.
func (p *planner) emit(s Step) bool {
	if p.step.Action != Nothing {
		return true
	}
	if _, busy := p.local.InFlight[s.Lane()]; busy {
		return false
	}
	if r, ok := p.local.Retry[RetryKey{s.Lane(), s.Action}]; ok && p.now.Before(r.At) {
		p.wakeIn(r.At.Sub(p.now))
		return false
	}
	p.step = s
	return true
}

func (p *planner) wakeIn(d time.Duration) {
	if d > 0 && (p.wait == 0 || d < p.wait) {
		p.wait = d
	}
}

func (p *planner) terminating() bool {
	return p.pod.DeletionTimestamp != nil || p.local.Removed || p.local.Draining
}

// runPod brings a pod up and keeps it up.
func (p *planner) runPod() {
	if p.pullImages() {
		return
	}
	if !p.prepare() {
		return
	}
	if p.removeStale() || p.dropStrangers() {
		return
	}
	if !p.initialized() {
		p.pruneDead()
		return
	}
	for i := range p.pod.Spec.Containers {
		if p.keepRunning(&p.pod.Spec.Containers[i], false) {
			return
		}
	}
	p.pruneDead()
}

// pullImages starts the pulls of every container that has never run: they take
// long and need neither sandbox nor volumes.
func (p *planner) pullImages() bool {
	for _, c := range allContainers(p.pod) {
		a := p.byName[c.Name]
		if a.current == nil || a.stale {
			if p.pull(c.Container, a.nextAttempt(), c.Init) {
				return true
			}
		}
	}
	return false
}

// pull makes sure the image of the attempt to come is there. It reports whether a
// step was taken; ready() says whether the image is there.
func (p *planner) pull(c *corev1.Container, attempt int, init bool) bool {
	if p.imageReady(c, attempt) {
		return false
	}
	return p.emit(Step{Action: PullImage, Container: c.Name, Attempt: attempt, Init: init})
}

func (p *planner) imageReady(c *corev1.Container, attempt int) bool {
	i, ok := p.local.Images[c.Name]
	return ok && i.Image == c.Image && i.Attempt == attempt
}

// prepare makes sandbox, network and volumes; false means containers must wait.
func (p *planner) prepare() bool {
	if p.sandbox == nil || p.sandbox.Lost {
		if p.sandbox != nil && p.removeStale() {
			return false
		}
		p.emit(Step{Action: CreateSandbox})
		return false
	}
	if !p.local.Attached {
		p.emit(Step{Action: AttachNetwork})
		return false
	}
	if p.local.VolumesHave != p.local.VolumesWant {
		// Volumes that were prepared once and cannot be brought up to date do not
		// stop the containers that use them.
		if p.emit(Step{Action: SyncVolumes}) || p.local.VolumesHave == "" {
			return false
		}
	}
	return true
}

// removeStale removes what is left of an earlier sandbox, but for dead containers:
// they keep exit codes and logs. It reports whether something is left to remove.
func (p *planner) removeStale() (left bool) {
	for i := range p.sandbox.Containers {
		if c := &p.sandbox.Containers[i]; isStale(p.sandbox, c) && c.State != Exited {
			left = true
			if p.emit(Step{Action: RemoveContainer, Container: c.Name, ID: c.ID, Attempt: c.Attempt, Init: c.Init}) {
				return true
			}
		}
	}
	return left
}

// removeAll removes the containers and then the sandbox.
func (p *planner) removeAll() bool {
	for _, c := range p.sandbox.Containers {
		if p.emit(Step{Action: RemoveContainer, Container: c.Name, ID: c.ID, Attempt: c.Attempt, Init: c.Init}) {
			return true
		}
	}
	if len(p.sandbox.Containers) > 0 || len(p.local.InFlight) > 0 {
		return false
	}
	return p.emit(Step{Action: RemoveSandbox})
}

// dropStrangers stops containers that are no longer in the pod's spec and attempts
// that were overtaken by a later one.
func (p *planner) dropStrangers() bool {
	for _, c := range p.sandbox.Containers {
		a, known := p.byName[c.Name]
		switch {
		case !known && c.State == Running:
			if p.stop(c, p.stopOf(c, "it is no longer in the pod's spec", nil)) {
				return true
			}
		case !known, c.Attempt < a.current.Attempt && c.State != Exited:
			if p.emit(Step{Action: RemoveContainer, Container: c.Name, ID: c.ID, Attempt: c.Attempt, Init: c.Init}) {
				return true
			}
		}
	}
	return false
}

// initialized runs the init containers in order and keeps the sidecars running. It
// reports whether the pod's other containers may be run now.
func (p *planner) initialized() bool {
	past := p.mainContainerSeen()
	for i := range p.pod.Spec.InitContainers {
		c := &p.pod.Spec.InitContainers[i]
		if isSidecar(c) {
			if p.keepRunning(c, true) || (!past && !p.started(c.Name)) {
				return false
			}
			continue
		}
		if past {
			continue
		}
		if cur := p.byName[c.Name].current; cur != nil && !p.byName[c.Name].stale && cur.State == Exited && cur.ExitCode == 0 {
			continue
		}
		p.keepRunning(c, true)
		return false
	}
	return p.step.Action == Nothing
}

// mainContainerSeen reports that the runtime has a non-init container: then
// initialization has ended, whatever became of the init containers since.
func (p *planner) mainContainerSeen() bool {
	for i := range p.pod.Spec.Containers {
		a := p.byName[p.pod.Spec.Containers[i].Name]
		if a.current != nil && !a.stale {
			return true
		}
	}
	return false
}

// started reports that a container runs and its post-start hook and startup probe,
// if any, have succeeded.
func (p *planner) started(name string) bool {
	cur := p.byName[name].current
	return cur != nil && cur.State == Running && p.local.Probes[cur.ID].Started
}

// keepRunning is the life of one container. It reports whether a step was taken.
func (p *planner) keepRunning(c *corev1.Container, init bool) bool {
	a := p.byName[c.Name]
	want := p.local.Hashes[c.Name]
	switch cur := a.current; {
	case cur == nil:
		return p.create(c, 0, 0, init)
	case cur.State == Created && cur.Hash != want:
		return p.emit(Step{Action: RemoveContainer, Container: c.Name, ID: cur.ID, Attempt: cur.Attempt, Init: init})
	case cur.State == Created:
		return p.emit(Step{Action: StartContainer, Container: c.Name, ID: cur.ID, Attempt: cur.Attempt, Init: init})
	case cur.State == Running:
		return p.keepHealthy(c, cur, want, init)
	default:
		r := restartOf(p.now, p.pod, c, init, a, p.local)
		if !r.again {
			return false
		}
		if r.delay > 0 {
			p.wakeIn(r.delay)
			return false
		}
		return p.create(c, cur.Attempt+1, r.streak, init)
	}
}

func (p *planner) keepHealthy(c *corev1.Container, cur *Container, want string, init bool) bool {
	if v, bad := p.local.Unhealthy[cur.ID]; bad {
		return p.stop(*cur, p.stopOf(*cur, v.Reason, v.Grace))
	}
	if cur.Hash != want {
		return p.stop(*cur, p.stopOf(*cur, "its definition has changed", nil))
	}
	if c.Lifecycle != nil && c.Lifecycle.PostStart != nil && !p.local.PostStarted[cur.ID] {
		return p.emit(Step{Action: PostStart, Container: c.Name, ID: cur.ID, Attempt: cur.Attempt, Init: init})
	}
	return false
}

func (p *planner) create(c *corev1.Container, attempt, streak int, init bool) bool {
	if !p.imageReady(c, attempt) {
		return p.pull(c, attempt, init)
	}
	return p.emit(Step{Action: CreateContainer, Container: c.Name, Attempt: attempt, Streak: streak, Init: init})
}

// pruneDead removes dead attempts that neither state nor lastState of the status
// need: all but the newest attempt and the one before.
func (p *planner) pruneDead() bool {
	for _, c := range p.sandbox.Containers {
		a := p.byName[c.Name]
		if c.State == Exited && a.previous != nil && c.Attempt < a.previous.Attempt {
			if p.emit(Step{Action: RemoveContainer, Container: c.Name, ID: c.ID, Attempt: c.Attempt, Init: c.Init}) {
				return true
			}
		}
	}
	return false
}

// finished reports that no container of the pod will run again.
func (p *planner) finished() bool {
	_, done := outcome(p.now, p.pod, p.byName, p.local)
	return done
}

// finishPod stops what still runs (sidecars) and gives back the address. Dead
// containers stay, for their logs and exit codes, until the pod is deleted.
func (p *planner) finishPod() {
	if p.sandbox == nil {
		return
	}
	if p.stopAll("the pod has finished") {
		return
	}
	if p.anyAlive() {
		return
	}
	if !p.local.Detached && p.emit(Step{Action: DetachNetwork}) {
		return
	}
	p.pruneDead()
}
