package agent

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

// model is a runtime reduced to what the planner can see, under a planner that is
// killed between any two steps.
type model struct {
	t       *rapid.T
	now     time.Time
	pod     *corev1.Pod
	sandbox *Sandbox
	local   LocalState
	gone    bool
	starts  map[string]int // by container ID
}

func newModel(t *rapid.T) *model {
	m := &model{t: t, now: time.Unix(1e9, 0), starts: map[string]int{}, pod: &corev1.Pod{}}
	m.pod.Name, m.pod.UID = "p", "u"
	m.pod.Spec.RestartPolicy = rapid.SampledFrom([]corev1.RestartPolicy{"Always", "OnFailure", "Never"}).Draw(t, "policy")
	always := corev1.ContainerRestartPolicyAlways
	for i := range rapid.IntRange(0, 2).Draw(t, "inits") {
		c := corev1.Container{Name: fmt.Sprintf("i%d", i), Image: "x"}
		if rapid.Bool().Draw(t, "sidecar") {
			c.RestartPolicy = &always
		}
		m.pod.Spec.InitContainers = append(m.pod.Spec.InitContainers, c)
	}
	for i := range rapid.IntRange(1, 3).Draw(t, "containers") {
		m.pod.Spec.Containers = append(m.pod.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", i), Image: "x"})
	}
	m.restartAgent()
	return m
}

// restartAgent loses everything that only the agent knew.
func (m *model) restartAgent() {
	m.local = newLocalState()
	m.local.VolumesWant = "1"
	for _, c := range allContainers(m.pod) {
		m.local.Hashes[c.Name] = HashContainer(c.Container)
	}
	if m.sandbox != nil {
		m.local.adopt(m.pod, m.sandbox)
	}
}

// report keeps the pod's status, which survives the agent.
func (m *model) report() {
	if m.pod.DeletionTimestamp == nil {
		m.pod.Status = Status(m.now, m.pod, m.sandbox, m.local, nil)
	}
}

// settle does what probes do: containers without any are ready once they run.
func (m *model) settle() {
	if m.sandbox == nil {
		return
	}
	for _, c := range m.sandbox.Containers {
		if c.State == Running {
			m.local.Probes[c.ID] = ProbeState{Started: true, Ready: true}
		}
	}
}

func (m *model) next() (Step, time.Duration) {
	if m.local.StopSince.IsZero() && m.pod.DeletionTimestamp != nil {
		m.local.StopSince = m.now
	}
	m.settle()
	return Next(m.now, m.pod, m.sandbox, m.local)
}

// apply has the effect of a step on the runtime.
func (m *model) apply(s Step) (r stepResult) {
	r = stepResult{step: s}
	switch s.Action {
	case CreateSandbox:
		m.createSandbox()
		r.sandbox = m.sandbox
	case PullImage:
		r.image, r.ref = "x", "x@1"
	case SyncVolumes:
		r.version = m.local.VolumesWant
	case CreateContainer:
		r.id = fmt.Sprintf("%s-%d", s.Container, s.Attempt)
		r.hash = m.local.Hashes[s.Container]
		if m.find(r.id) != nil {
			m.t.Fatalf("attempt %s was created twice", r.id)
		}
		m.sandbox.Containers = append(m.sandbox.Containers, Container{ID: r.id, Name: s.Container, Attempt: s.Attempt, Init: s.Init,
			State: Created, CreatedAt: m.now, Hash: r.hash})
	case StartContainer:
		m.start(s.ID)
	case Terminate, Kill:
		if c := m.find(s.ID); c.State == Running {
			c.State, c.ExitCode, c.FinishedAt = Exited, 143, m.now
		}
	case RemoveContainer:
		for i, c := range m.sandbox.Containers {
			if c.ID == s.ID {
				m.sandbox.Containers = append(m.sandbox.Containers[:i:i], m.sandbox.Containers[i+1:]...)
				break
			}
		}
	case RemoveSandbox:
		if len(m.sandbox.Containers) > 0 {
			m.t.Fatalf("sandbox removed with %d containers", len(m.sandbox.Containers))
		}
		m.sandbox = nil
	case ReportGone:
		if m.sandbox != nil {
			m.t.Fatal("reported gone with a sandbox")
		}
		m.gone = true
	}
	return r
}

func (m *model) createSandbox() {
	s := &Sandbox{UID: m.pod.UID, NetNS: "/n", CreatedAt: m.now}
	if m.sandbox != nil {
		if !m.sandbox.Lost {
			m.t.Fatal("a second sandbox")
		}
		s.Containers = m.sandbox.Containers
	}
	m.sandbox = s
}

func (m *model) find(id string) *Container {
	for i := range m.sandbox.Containers {
		if m.sandbox.Containers[i].ID == id {
			return &m.sandbox.Containers[i]
		}
	}
	return nil
}

// start checks what must never happen.
func (m *model) start(id string) {
	c := m.find(id)
	if c == nil || c.State != Created {
		m.t.Fatalf("start of %s, which is %+v", id, c)
	}
	if m.pod.DeletionTimestamp != nil {
		m.t.Fatalf("%s started in a pod that is being deleted", id)
	}
	for _, o := range m.sandbox.Containers {
		if o.Name == c.Name && o.State == Running {
			m.t.Fatalf("%s started while %s runs", id, o.ID)
		}
	}
	for i := range m.pod.Spec.InitContainers {
		in := &m.pod.Spec.InitContainers[i]
		if in.Name == c.Name {
			break
		}
		ok := false
		for _, o := range m.sandbox.Containers {
			done := o.State == Exited && o.ExitCode == 0 && !o.CreatedAt.Before(m.sandbox.CreatedAt)
			ok = ok || (o.Name == in.Name && (done || isSidecar(in)))
		}
		if !ok {
			m.t.Fatalf("%s started before init container %s was done", id, in.Name)
		}
	}
	if m.starts[id]++; m.starts[id] > 1 {
		m.t.Fatalf("%s started twice", id)
	}
	c.State, c.StartedAt = Running, m.now
}

// step does one step, and is killed before, after or not at all; or the step fails.
func (m *model) step() (idle bool) {
	s, wait := m.next()
	if s.Action == Nothing {
		m.report()
		m.now = m.now.Add(max(wait, time.Second))
		return true
	}
	m.local.begin(s, m.now)
	switch rapid.SampledFrom([]string{"ok", "ok", "ok", "ok", "fail", "die before", "die after"}).Draw(m.t, "fate") {
	case "ok":
		m.local.done(m.apply(s), m.now)
	case "fail":
		m.local.done(stepResult{step: s, err: fmt.Errorf("no")}, m.now)
	case "die after":
		m.apply(s)
		fallthrough
	case "die before":
		m.restartAgent()
	}
	m.now = m.now.Add(time.Millisecond)
	m.report()
	return false
}

// disturb lets the world happen.
func (m *model) disturb() {
	if m.sandbox == nil {
		return
	}
	switch rapid.SampledFrom([]string{"exit", "exit", "nothing", "nothing", "reboot"}).Draw(m.t, "event") {
	case "exit":
		for i := range m.sandbox.Containers {
			if c := &m.sandbox.Containers[i]; c.State == Running && rapid.Bool().Draw(m.t, "this") {
				c.State, c.FinishedAt = Exited, m.now
				c.ExitCode = rapid.SampledFrom([]int32{0, 1}).Draw(m.t, "code")
			}
		}
	case "reboot":
		m.sandbox.Lost = true
		for i := range m.sandbox.Containers {
			if c := &m.sandbox.Containers[i]; c.State == Running {
				c.State, c.ExitCode = Exited, 255
			}
		}
		m.restartAgent()
		m.now = m.now.Add(time.Second)
	}
}

// calm lets the planner work without failures; init containers succeed at once.
func (m *model) calm(until func() bool) {
	for range 3000 {
		if until() {
			return
		}
		s, wait := m.next()
		if s.Action == Nothing {
			m.finishInits()
			m.now = m.now.Add(max(wait, time.Second))
			continue
		}
		m.local.begin(s, m.now)
		m.local.done(m.apply(s), m.now)
		m.report()
	}
	m.t.Fatalf("did not converge: sandbox %+v local %+v status %+v", m.sandbox, m.local, m.pod.Status)
}

func (m *model) finishInits() {
	if m.sandbox == nil {
		return
	}
	for i := range m.sandbox.Containers {
		c := &m.sandbox.Containers[i]
		if c.Init && c.State == Running && !isSidecar(containerSpec(m.pod, c.Name)) {
			c.State, c.ExitCode, c.FinishedAt = Exited, 0, m.now
		}
	}
}

func (m *model) settled() bool {
	byName := attemptsByName(m.pod, m.sandbox)
	if _, done := outcome(m.now, m.pod, byName, m.local); done {
		return true
	}
	for i := range m.pod.Spec.Containers {
		a := byName[m.pod.Spec.Containers[i].Name]
		if a.current == nil || (a.current.State != Running && restarts(m.pod, &m.pod.Spec.Containers[i], false, a.current, a.stale)) {
			return false
		}
	}
	return true
}

func TestPlannerConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			if m.step() {
				m.disturb()
			}
		}
		m.calm(m.settled)
		now := metav1.NewTime(m.now)
		m.pod.DeletionTimestamp = &now
		for range rapid.IntRange(0, 10).Draw(t, "stopping") {
			m.step()
		}
		m.calm(func() bool { return m.gone })
	})
}
