package agent

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent/volume"
	"decree.dev/decree/schemas/api"
)

// worker takes care of one pod: a goroutine that owns all of the pod's state, and
// short-lived ones for steps and probes, which hand their results to its mailbox.
type worker struct {
	agent  *Agent
	uid    types.UID
	log    *slog.Logger
	signal chan struct{}
	gone   atomic.Bool // nothing is left of the pod on this node

	mu      sync.Mutex // guards what follows
	next    inputs
	changed bool
	mail    []func()

	// Owned by run.
	in       inputs
	local    LocalState
	sandbox  *Sandbox
	minList  uint64 // older lists do not show what we have done
	steps    map[string]runningStep
	probes   map[probeKey]*runningProbe
	group    sync.WaitGroup
	reported *corev1.PodStatus
	resend   time.Time // not before, after a refusal
	frozen   bool      // teardown has begun: the status stays as it is
	adopted  bool
	objects  string    // versions of the objects that the pod refers to
	sent     time.Time // when the status was last reported
	recheck  time.Time // when to see whether the view shows it
}

// resendAfter is how long the view may show another status than the one reported
// before it is reported again: somebody else may have written it.
const resendAfter = 5 * time.Second

// inputs are what a worker is told from outside.
type inputs struct {
	pod               *corev1.Pod
	view              api.Reader
	removed, draining bool
}

type runningStep struct {
	action Action
	id     string
	cancel context.CancelFunc
}

func newWorker(a *Agent, pod *corev1.Pod) *worker {
	w := &worker{
		agent: a, uid: pod.UID, signal: make(chan struct{}, 1), local: newLocalState(),
		steps: map[string]runningStep{}, probes: map[probeKey]*runningProbe{},
		log: a.log.With("pod", pod.Namespace+"/"+pod.Name, "uid", string(pod.UID)),
	}
	w.next.pod = pod
	return w
}

// update tells the worker about the newest view; pod nil keeps the last one.
func (w *worker) update(pod *corev1.Pod, view api.Reader, removed, draining bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := inputs{pod: pod, view: view, removed: removed || w.next.removed, draining: draining}
	if pod == nil {
		n.pod = w.next.pod
	}
	if n.pod == w.next.pod && n.removed == w.next.removed && n.draining == w.next.draining && !w.changed &&
		w.next.view != nil && !usesObjects(n.pod) {
		w.next.view = view
		return
	}
	w.next, w.changed = n, true
	w.wake()
}

// usesObjects reports that a pod depends on other objects beyond its start.
func usesObjects(pod *corev1.Pod) bool {
	uses := func(c podContainer) bool {
		return len(c.EnvFrom) > 0 || slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.ValueFrom != nil })
	}
	return len(pod.Spec.ImagePullSecrets) > 0 || slices.ContainsFunc(allContainers(pod), uses) ||
		slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
			return v.ConfigMap != nil || v.Secret != nil || v.Projected != nil || v.DownwardAPI != nil
		})
}

func (w *worker) wake() {
	select {
	case w.signal <- struct{}{}:
	default:
	}
}

// post runs f in the worker's goroutine.
func (w *worker) post(f func()) {
	w.mu.Lock()
	w.mail = append(w.mail, f)
	w.mu.Unlock()
	w.wake()
}

// run is the pod's loop: observe, plan, execute, report.
func (w *worker) run(ctx context.Context) {
	defer func() {
		for _, p := range w.probes {
			p.cancel()
		}
		w.group.Wait()
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.signal:
		case <-timer.C:
		}
		w.observe()
		wait := w.plan(ctx)
		w.keepProbes(ctx)
		w.reportStatus()
		if w.finished() {
			return
		}
		for _, at := range []time.Time{w.resend, w.recheck} {
			if until := time.Until(at); !at.IsZero() && (wait == 0 || until < wait) {
				wait = max(until, time.Millisecond)
			}
		}
		timer.Stop()
		if wait > 0 {
			timer.Reset(wait)
		}
	}
}

// observe takes in what has happened since the last turn.
func (w *worker) observe() {
	w.mu.Lock()
	mail, changed := w.mail, w.changed
	w.mail, w.changed = nil, false
	w.in = w.next
	w.mu.Unlock()
	for _, f := range mail {
		f()
	}
	if changed {
		w.takeInputs()
	}
	if s, n := w.agent.obs.get(w.uid); n >= w.minList && n > 0 {
		w.setSandbox(w.unfinished(s))
	}
	if !w.adopted {
		w.adopted = true
		w.local.adopt(w.in.pod, w.sandbox)
	}
	if stopping := w.stopping(); !stopping {
		w.local.StopSince = time.Time{}
	} else if w.local.StopSince.IsZero() {
		w.local.StopSince = time.Now()
		w.cancelSteps(PullImage, PostStart)
	}
}

func (w *worker) stopping() bool {
	_, done := outcome(time.Now(), w.in.pod, attemptsByName(w.in.pod, w.sandbox), w.local)
	return done || w.in.pod.DeletionTimestamp != nil || w.in.removed || w.in.draining
}

func (w *worker) takeInputs() {
	pod := w.in.pod
	w.local.Removed, w.local.Draining = w.in.removed, w.in.draining
	w.local.Hashes = make(map[string]string, len(pod.Spec.Containers))
	for _, c := range allContainers(pod) {
		w.local.Hashes[c.Name] = HashContainer(c.Container)
	}
	if w.in.view != nil {
		w.local.VolumesWant = volume.Version(pod, w.in.view)
	}
	if v := w.local.VolumesWant + environmentVersion(pod, w.in.view); v != w.objects {
		w.objects = v // what was missing may be there now
		for key, r := range w.local.Retry {
			if r.Reason == reasonConfigError {
				r.At = time.Time{}
				w.local.Retry[key] = r
			}
		}
	}
}

// environmentVersion changes when an object changes that the pod's environment
// refers to.
func environmentVersion(pod *corev1.Pod, view api.Reader) string {
	if view == nil {
		return ""
	}
	var b strings.Builder
	add := func(r api.Resource, name string) {
		o, ok := view.Get(api.Key{Resource: r, Namespace: pod.Namespace, Name: name})
		if ok {
			b.WriteString("/" + o.GetResourceVersion())
		} else {
			b.WriteString("/-")
		}
	}
	for _, c := range allContainers(pod) {
		for _, f := range c.EnvFrom {
			if f.ConfigMapRef != nil {
				add(api.ConfigMaps, f.ConfigMapRef.Name)
			}
			if f.SecretRef != nil {
				add(api.Secrets, f.SecretRef.Name)
			}
		}
		for _, e := range c.Env {
			switch from := e.ValueFrom; {
			case from == nil:
			case from.ConfigMapKeyRef != nil:
				add(api.ConfigMaps, from.ConfigMapKeyRef.Name)
			case from.SecretKeyRef != nil:
				add(api.Secrets, from.SecretKeyRef.Name)
			}
		}
	}
	return b.String()
}

// unfinished shows containers that are just being started as not started yet: what
// a list says of them meanwhile may be any stage of the start, and must not be
// taken for an end. The list after the start counts.
func (w *worker) unfinished(s *Sandbox) *Sandbox {
	if s == nil || w.sandbox == nil {
		return s
	}
	out := s
	for i, c := range s.Containers {
		if w.local.InFlight[c.Name] != StartContainer || w.steps[c.Name].id != c.ID || c.State == Created {
			continue
		}
		if out == s {
			clone := *s
			clone.Containers = slices.Clone(s.Containers)
			out = &clone
		}
		out.Containers[i].State, out.Containers[i].ExitCode = Created, 0
		out.Containers[i].StartedAt, out.Containers[i].FinishedAt = time.Time{}, time.Time{}
	}
	return out
}

// setSandbox takes over what the runtime holds, and says what became of containers.
func (w *worker) setSandbox(s *Sandbox) {
	if s == w.sandbox {
		return
	}
	old := w.sandbox
	w.sandbox = s
	w.noteExits(old, s)
	w.local.forgetGone(s)
}

// plan starts steps until the planner has no more. It returns when to ask again.
func (w *worker) plan(ctx context.Context) time.Duration {
	for {
		now := time.Now()
		step, wait := Next(now, w.in.pod, w.sandbox, w.local)
		if step.Action == Nothing {
			return wait
		}
		w.start(ctx, step, now)
	}
}

// start carries a step out in a goroutine of its own.
func (w *worker) start(ctx context.Context, step Step, now time.Time) {
	w.local.begin(step, now)
	w.announce(step)
	if w.stopping() && (step.Action == RemoveContainer || step.Action >= DetachNetwork) && w.local.Terminating(w.in.pod) {
		w.frozen = true
	}
	ctx, cancel := context.WithCancel(ctx)
	w.steps[step.Lane()] = runningStep{step.Action, step.ID, cancel}
	job := w.job(step)
	w.group.Go(func() {
		defer cancel()
		r := job.do(ctx)
		r.step, r.took = step, time.Since(now)
		cancelled := ctx.Err() != nil
		w.post(func() { w.finish(r, cancelled) })
	})
}

// Terminating reports that the pod is to be stopped and removed from the node.
func (l *LocalState) Terminating(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp != nil || l.Removed || l.Draining
}

// finish takes over the result of a step.
func (w *worker) finish(r stepResult, cancelled bool) {
	now := time.Now()
	delete(w.steps, r.step.Lane())
	w.agent.metrics.step(r)
	w.minList = w.agent.obs.fresh(w.uid)
	if cancelled && r.err != nil {
		delete(w.local.InFlight, r.step.Lane())
		return
	}
	w.local.done(r, now)
	if r.err != nil {
		w.complain(r)
		return
	}
	w.applaud(r)
	w.setSandbox(predict(w.sandbox, w.in.pod, r, now))
}

// predict is what the runtime will list after a step that has succeeded. It saves
// waiting for the list; the list that comes replaces it.
func predict(old *Sandbox, pod *corev1.Pod, r stepResult, now time.Time) *Sandbox {
	if r.step.Action == CreateSandbox {
		s := *r.sandbox
		if old != nil {
			s.Containers = old.Containers
		}
		return &s
	}
	if old == nil || r.step.Action == RemoveSandbox {
		return nil
	}
	s := *old
	s.Containers = slices.Clone(old.Containers)
	i := slices.IndexFunc(s.Containers, func(c Container) bool { return c.ID == r.step.ID || c.ID == r.id })
	switch {
	case r.step.Action == CreateContainer && i < 0:
		c := Container{ID: r.id, Name: r.step.Container, Attempt: r.step.Attempt, Init: r.step.Init, State: Created, CreatedAt: now, Hash: r.hash, ImageRef: r.ref}
		if spec := containerSpec(pod, c.Name); spec != nil {
			c.Image = spec.Image
		}
		s.Containers = append(s.Containers, c)
	case i < 0:
		return old
	case r.step.Action == StartContainer && s.Containers[i].State == Created:
		s.Containers[i].State, s.Containers[i].StartedAt = Running, now
	case r.step.Action == RemoveContainer:
		s.Containers = slices.Delete(s.Containers, i, i+1)
	default:
		return old
	}
	return &s
}

// cancelSteps ends steps in flight that no longer make sense.
func (w *worker) cancelSteps(actions ...Action) {
	for _, s := range w.steps {
		if slices.Contains(actions, s.action) {
			s.cancel()
		}
	}
}

// reportStatus reports the status when it differs from the last one reported.
func (w *worker) reportStatus() {
	now := time.Now()
	if w.frozen || w.in.removed || w.in.draining || now.Before(w.resend) {
		return
	}
	w.resend, w.recheck = time.Time{}, time.Time{}
	pod := w.in.pod
	if w.reported == nil {
		w.reported = &pod.Status
	}
	base := *pod
	base.Status = *w.reported // transition times continue from what was said last
	base.Status.Conditions = mergeConditions(pod.Status.Conditions, w.reported.Conditions)
	status := Status(now, &base, w.sandbox, w.local, w.agent.cfg.HostIPs)
	if equality.Semantic.DeepEqual(&status, w.reported) {
		if since := now.Sub(w.sent); equality.Semantic.DeepEqual(&status, &pod.Status) {
			return
		} else if since < resendAfter {
			w.recheck = w.sent.Add(resendAfter)
			return
		}
	}
	w.sent = now
	w.reported = &status
	out := api.Clone(pod)
	out.Status = status
	w.agent.report.put(api.Mutation{Verb: api.UpdateStatus, Key: api.KeyOf(out), Object: out, UID: pod.UID}, func(error) {
		w.post(func() {
			if w.reported == &status {
				w.reported, w.resend = nil, time.Now().Add(time.Second)
			}
		})
	})
}

// mergeConditions takes ours from mine and everybody else's from theirs.
func mergeConditions(theirs, mine []corev1.PodCondition) []corev1.PodCondition {
	own := func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodInitialized || c.Type == corev1.ContainersReady || c.Type == corev1.PodReady
	}
	var out []corev1.PodCondition
	for _, c := range theirs {
		if !own(c) || !slices.ContainsFunc(mine, func(m corev1.PodCondition) bool { return m.Type == c.Type }) {
			out = append(out, c)
		}
	}
	for _, c := range mine {
		if own(c) || !slices.ContainsFunc(out, func(o corev1.PodCondition) bool { return o.Type == c.Type }) {
			out = append(out, c)
		}
	}
	return out
}

// finished reports that the worker may end: nothing of the pod is left here and
// nobody wants it.
func (w *worker) finished() bool {
	clean := w.sandbox == nil && w.local.Cleaned && len(w.local.InFlight) == 0
	w.gone.Store(clean)
	return clean && w.in.removed
}
