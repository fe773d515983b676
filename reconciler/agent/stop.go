package agent

import (
	"time"

	corev1 "k8s.io/api/core/v1"
)

const (
	defaultGrace = 30 * time.Second
	// afterTerm is the least a container gets between SIGTERM and SIGKILL when a
	// pre-stop hook or another container has used up the grace, as in Kubernetes.
	afterTerm = 2 * time.Second
	// killAgain is how long after a SIGKILL the next one is sent: one may be lost
	// with the connection to the runtime.
	killAgain = 10 * time.Second
	// withdrawTimeout is the most a stop waits for services to leave the pod alone.
	withdrawTimeout = 5 * time.Second
)

// stopOrder is how one container is to be stopped.
type stopOrder struct {
	reason   string
	deadline time.Time // SIGKILL from then on
	grace    time.Duration
	hook     bool // has a pre-stop hook
}

// stopOf is the order for a container that is stopped on its own account. grace,
// in seconds, overrides the pod's.
func (p *planner) stopOf(c Container, reason string, grace *int64) stopOrder {
	g := graceOf(p.pod)
	if grace != nil {
		g = time.Duration(*grace) * time.Second
	}
	since := p.now
	if s, ok := p.local.Stops[c.ID]; ok {
		since = s.Since
	}
	return stopOrder{reason: reason, deadline: since.Add(g), grace: g, hook: p.hasPreStop(c.Name)}
}

func (p *planner) hasPreStop(name string) bool {
	c := containerSpec(p.pod, name)
	return c != nil && c.Lifecycle != nil && c.Lifecycle.PreStop != nil
}

// stop takes the next step to stop a running container: pre-stop hook, SIGTERM,
// and SIGKILL at the deadline.
func (p *planner) stop(c Container, o stopOrder) bool {
	s := p.local.Stops[c.ID]
	step := Step{Container: c.Name, ID: c.ID, Attempt: c.Attempt, Init: c.Init, Reason: o.reason, Grace: max(o.deadline.Sub(p.now), 0)}
	deadline := o.deadline
	if o.grace > 0 && !s.TermAt.IsZero() && deadline.Before(s.TermAt.Add(afterTerm)) {
		deadline = s.TermAt.Add(afterTerm)
	}
	switch {
	case o.grace > 0 && o.hook && !s.PreStopped && p.now.Before(o.deadline):
		step.Action = PreStop
	case o.grace > 0 && s.TermAt.IsZero():
		step.Action = Terminate
	case p.now.Before(deadline):
		p.wakeIn(deadline.Sub(p.now))
		return false
	case s.KilledAt.IsZero() || p.now.Sub(s.KilledAt) >= killAgain:
		step.Action = Kill
	default:
		p.wakeIn(killAgain - p.now.Sub(s.KilledAt))
		return false
	}
	if p.emit(step) {
		return true
	}
	p.wakeIn(o.deadline.Sub(p.now))
	return false
}

// stopAll stops every container: the ordinary ones in parallel, then the sidecars
// in reverse order of their start. It reports whether a step was taken.
func (p *planner) stopAll(reason string) bool {
	since, grace := p.local.StopSince, graceOf(p.pod)
	if since.IsZero() {
		since = p.now
	}
	order := stopOrder{reason: reason, deadline: since.Add(grace), grace: grace}
	alive := p.stopMatching(order, func(c Container) bool { return !p.sidecar(c.Name) })
	if alive || p.step.Action != Nothing {
		return p.step.Action != Nothing
	}
	for i := len(p.pod.Spec.InitContainers) - 1; i >= 0; i-- {
		name := p.pod.Spec.InitContainers[i].Name
		if p.stopMatching(order, func(c Container) bool { return c.Name == name }) || p.step.Action != Nothing {
			break
		}
	}
	return p.step.Action != Nothing
}

// stopMatching stops the matching containers in parallel. It reports whether any
// is still alive.
func (p *planner) stopMatching(order stopOrder, match func(Container) bool) (alive bool) {
	if p.sandbox == nil {
		return false
	}
	for _, c := range p.sandbox.Containers {
		if c.State == Exited || !match(c) {
			continue
		}
		alive = true
		if c.State == Created {
			p.emit(Step{Action: RemoveContainer, Container: c.Name, ID: c.ID, Attempt: c.Attempt, Init: c.Init})
		} else {
			o := order
			o.hook = p.hasPreStop(c.Name)
			p.stop(c, o)
		}
		if p.step.Action != Nothing {
			return true
		}
	}
	return alive
}

func (p *planner) sidecar(name string) bool {
	for i := range p.pod.Spec.InitContainers {
		if p.pod.Spec.InitContainers[i].Name == name {
			return isSidecar(&p.pod.Spec.InitContainers[i])
		}
	}
	return false
}

func (p *planner) anyAlive() bool {
	if p.sandbox == nil {
		return false
	}
	for _, c := range p.sandbox.Containers {
		if c.State != Exited {
			return true
		}
	}
	return false
}

// stopPod stops the containers and then removes everything of the pod, and says so
// to the control plane.
func (p *planner) stopPod() {
	if !p.withdrawn() {
		return
	}
	if p.stopAll(p.stopReason()) || p.anyAlive() {
		return
	}
	if len(p.local.InFlight) > 0 {
		return // a container may still be in the making
	}
	if p.sandbox != nil && len(p.sandbox.Containers) > 0 {
		p.removeAll()
		return
	}
	if !p.local.Detached {
		p.emit(Step{Action: DetachNetwork})
		return
	}
	if p.sandbox != nil {
		p.emit(Step{Action: RemoveSandbox})
		return
	}
	if !p.local.Cleaned {
		p.emit(Step{Action: Cleanup})
		return
	}
	if p.pod.DeletionTimestamp != nil && !p.local.Removed && !p.local.Draining && !p.local.GoneReported {
		p.emit(Step{Action: ReportGone})
	}
}

// withdrawn makes sure that services no longer send new connections to a pod before
// its containers are told to end: a server that ends refuses them. Half of the grace
// stays for the containers, whatever happens. A node that is shut down has nobody
// left to take its pods out of services.
func (p *planner) withdrawn() bool {
	most := min(graceOf(p.pod)/2, withdrawTimeout)
	if p.local.Withdrawn || p.local.Draining || most == 0 || !p.anyAlive() {
		return true
	}
	p.emit(Step{Action: Withdraw, Grace: most, Reason: p.stopReason()})
	return false
}

func (p *planner) stopReason() string {
	switch {
	case p.local.Draining:
		return "the node is being shut down"
	case p.pod.DeletionTimestamp != nil:
		return "the pod is being deleted"
	}
	return "the pod is no longer bound to this node"
}

// graceOf is the pod's termination grace; a deletion may have shortened it.
func graceOf(pod *corev1.Pod) time.Duration {
	if g := pod.DeletionGracePeriodSeconds; g != nil && pod.DeletionTimestamp != nil {
		return time.Duration(max(*g, 0)) * time.Second
	}
	if g := pod.Spec.TerminationGracePeriodSeconds; g != nil {
		return time.Duration(max(*g, 0)) * time.Second
	}
	return defaultGrace
}
