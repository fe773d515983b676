package agent_test

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/agent/fakeruntime"
	"decree.dev/decree/schemas/api"
)

func TestPodRuns(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web", corev1.Container{Name: "a", Image: "app:1"}, corev1.Container{Name: "b", Image: "app:2"})
		pod.Spec.InitContainers = []corev1.Container{{Name: "setup", Image: "app:1"}}
		w := newWorld(t, pod)
		w.runtime.Program = func(c agent.ContainerConfig) fakeruntime.Program {
			if c.Init {
				return fakeruntime.Program{Runs: time.Second}
			}
			return fakeruntime.Program{}
		}
		w.run()
		defer w.stop()
		w.after(500 * time.Millisecond)
		if s := w.status("web", "setup"); s.State.Running == nil {
			t.Errorf("init container: %+v", s)
		}
		if s := w.status("web", "a"); s.State.Waiting == nil || s.State.Waiting.Reason != "PodInitializing" {
			t.Errorf("a waits for init: %+v", s)
		}
		if ph := w.plane.pod("web").Status.Phase; ph != corev1.PodPending {
			t.Errorf("phase %s while initializing", ph)
		}
		w.after(time.Second)
		p := w.plane.pod("web")
		if p.Status.Phase != corev1.PodRunning || !ready(p) || p.Status.PodIP != "10.98.0.1" || p.Status.HostIP != "192.0.2.1" {
			t.Errorf("status %+v", p.Status)
		}
		if s := w.status("web", "setup"); s.State.Terminated == nil || s.State.Terminated.Reason != "Completed" {
			t.Errorf("init container: %+v", s)
		}
		for _, name := range []string{"a", "b"} {
			if s := w.status("web", name); s.State.Running == nil || !s.Ready || s.RestartCount != 0 || s.ImageID == "" {
				t.Errorf("container: %+v", s)
			}
		}
	})
}

func TestRunningIsReportedAtOnce(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		w.run()
		defer w.stop()
		w.after(time.Second)
		w.plane.set(makePod("late"))
		w.after(time.Millisecond) // nothing between the push and the report waits for a clock
		if p := w.plane.pod("late"); p.Status.Phase != corev1.PodRunning || !ready(p) {
			t.Errorf("status %+v", p.Status)
		}
	})
}

func TestCrashLoop(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		w.runtime.Program = func(agent.ContainerConfig) fakeruntime.Program {
			return fakeruntime.Program{Runs: 100 * time.Millisecond, Exit: 3}
		}
		begin := time.Now()
		w.run()
		defer w.stop()
		w.after(150 * time.Millisecond) // first attempt 0 to 0.1 s, the second at once
		if s := w.status("web", "main"); s.RestartCount != 1 || s.State.Running == nil || s.LastTerminationState.Terminated.ExitCode != 3 {
			t.Errorf("after the first crash: %+v", s)
		}
		w.wantEvent("web", "Exited: Container main exited with 3, restarting at once")
		w.after(time.Second)
		s := w.status("web", "main")
		if s.State.Waiting == nil || s.State.Waiting.Reason != "CrashLoopBackOff" || s.RestartCount != 1 {
			t.Errorf("after the second crash: %+v", s)
		}
		w.wantEvent("web", "Exited: Container main exited with 3, restarting in 10s")
		var starts []time.Duration
		last := len(w.calls("StartContainer"))
		for time.Since(begin) < 25*time.Minute {
			w.after(100 * time.Millisecond)
			if n := len(w.calls("StartContainer")); n != last {
				last = n
				starts = append(starts, time.Since(begin).Round(time.Second))
			}
		}
		want := []time.Duration{10, 30, 70, 151, 311, 611, 911, 1211}
		if len(starts) != len(want) {
			t.Fatalf("starts %v, want about %v s", starts, want)
		}
		for i := range want {
			if d := starts[i] - want[i]*time.Second; d < -2*time.Second || d > 3*time.Second {
				t.Errorf("start %d after %s, want about %d s", i, starts[i], want[i])
			}
		}
		if n := len(w.calls("RemoveContainer")); n < 5 {
			t.Errorf("%d dead attempts removed", n)
		}
	})
}

func TestKilledContainerRestartsAtOnce(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		w.run()
		defer w.stop()
		w.after(time.Minute)
		if err := w.runtime.Crash("uid-web", "main", 9); err != nil {
			t.Fatal(err)
		}
		w.after(100 * time.Millisecond)
		s := w.status("web", "main")
		if s.RestartCount != 1 || s.State.Running == nil || s.LastTerminationState.Terminated == nil || s.LastTerminationState.Terminated.ExitCode != 137 {
			t.Errorf("status %+v", s)
		}
		w.wantEvent("web", "Exited: Container main exited with 137 (SIGKILL), restarting at once")
	})
}

func TestAdoption(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		pod.Spec.Containers[0].ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}}
		w := newWorld(t, pod)
		w.run()
		w.after(10 * time.Second)
		before := w.status("web", "main")
		w.stop()
		calls := len(w.runtime.Calls())
		mark := len(w.plane.history)
		w.run()
		defer w.stop()
		w.after(time.Minute)
		if got := w.runtime.Calls(); len(got) != calls {
			t.Errorf("the restarted agent did %v", got[calls:])
		}
		after := w.status("web", "main")
		if after.RestartCount != 0 || after.ContainerID != before.ContainerID || !after.Ready {
			t.Errorf("adopted as %+v", after)
		}
		for _, m := range w.plane.history[mark:] {
			if p, ok := m.Object.(*corev1.Pod); ok && !ready(p) {
				t.Errorf("not ready in between: %+v", p.Status)
			}
		}
	})
}

func TestExitWhileAgentIsDown(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		w.run()
		w.after(10 * time.Second)
		w.stop()
		if err := w.runtime.Crash("uid-web", "main", 15); err != nil {
			t.Fatal(err)
		}
		w.run()
		defer w.stop()
		w.after(time.Second)
		if s := w.status("web", "main"); s.RestartCount != 1 || s.State.Running == nil {
			t.Errorf("status %+v", s)
		}
		w.wantEvent("web", "exited with 143 (SIGTERM)")
	})
}

func TestDeletion(t *testing.T) {
	scenario(t, func(t *testing.T) {
		grace := int64(20)
		pod := makePod("web", corev1.Container{Name: "polite", Image: "app:1",
			Lifecycle: &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 3}}}},
			corev1.Container{Name: "stubborn", Image: "app:1"})
		pod.Spec.TerminationGracePeriodSeconds = &grace
		w := newWorld(t, pod)
		w.runtime.Program = func(c agent.ContainerConfig) fakeruntime.Program {
			if c.Container.Name == "stubborn" {
				return fakeruntime.Program{OnTerm: -1}
			}
			return fakeruntime.Program{OnTerm: 2 * time.Second}
		}
		w.run()
		defer w.stop()
		w.after(time.Second)
		gone := api.Clone(w.plane.pod("web"))
		now := metav1.Now()
		gone.DeletionTimestamp, gone.DeletionGracePeriodSeconds = &now, &grace
		w.plane.set(gone)
		w.after(time.Second)
		if got := w.calls("Signal"); len(got) != 1 || got[0] != "Signal 15 stubborn-0" {
			t.Errorf("after 1 s: %v", got)
		}
		w.after(3 * time.Second)
		if got := w.calls("Signal"); len(got) != 2 || got[1] != "Signal 15 polite-0" {
			t.Errorf("after 4 s: %v", got)
		}
		w.after(15 * time.Second)
		if w.plane.pod("web") == nil {
			t.Error("gone before the grace was over")
		}
		if s := w.status("web", "polite"); s.State.Terminated == nil {
			t.Errorf("polite: %+v", s)
		}
		w.after(2500 * time.Millisecond)
		if got := w.calls("Signal"); len(got) != 3 || got[2] != "Signal 9 stubborn-0" {
			t.Errorf("after 21 s: %v", got)
		}
		if p := w.plane.pod("web"); p != nil {
			t.Errorf("still there: %+v", p.Status)
		}
		if left, _ := w.runtime.List(t.Context()); len(left) != 0 {
			t.Errorf("the runtime still holds %+v", left)
		}
		if left, _ := w.network.Attached(t.Context()); len(left) != 0 {
			t.Errorf("the network still holds %v", left)
		}
	})
}

// TestWithdrawnBeforeTerm: services let go of a pod before its server is told to end,
// and a service that does not let go costs a bounded part of the grace.
func TestWithdrawnBeforeTerm(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("polite"), makePod("stuck"))
		w.run()
		defer w.stop()
		w.after(time.Second)
		remove := func(name string) {
			gone := api.Clone(w.plane.pod(name))
			now, grace := metav1.Now(), int64(20)
			gone.DeletionTimestamp, gone.DeletionGracePeriodSeconds = &now, &grace
			w.plane.set(gone)
		}
		held := make(chan struct{})
		w.network.held = held
		remove("polite")
		w.after(3 * time.Second)
		if got := w.calls("Signal"); len(got) != 0 {
			t.Errorf("while a service sends requests: %v", got)
		}
		close(held)
		w.after(time.Second)
		if got := w.calls("Signal"); len(got) != 1 || w.plane.pod("polite") != nil {
			t.Errorf("withdrawn: %v", got)
		}
		w.network.held = make(chan struct{})
		remove("stuck")
		w.after(6 * time.Second)
		if got := w.calls("Signal"); len(got) != 2 || w.plane.pod("stuck") != nil {
			t.Errorf("never withdrawn: %v", got)
		}
	})
}

func TestReboot(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		pod.Spec.InitContainers = []corev1.Container{{Name: "setup", Image: "app:1"}}
		w := newWorld(t, pod)
		w.runtime.Program = func(c agent.ContainerConfig) fakeruntime.Program {
			if c.Init {
				return fakeruntime.Program{Runs: time.Second}
			}
			return fakeruntime.Program{}
		}
		w.run()
		w.after(10 * time.Second)
		w.stop()
		w.runtime.Reboot()
		w.run()
		defer w.stop()
		w.after(10 * time.Second)
		if s := w.status("web", "main"); s.RestartCount != 1 || s.State.Running == nil {
			t.Errorf("main: %+v", s)
		}
		if s := w.status("web", "setup"); s.RestartCount != 1 || s.State.Terminated == nil {
			t.Errorf("setup: %+v", s)
		}
		if !ready(w.plane.pod("web")) {
			t.Errorf("not ready: %+v", w.plane.pod("web").Status)
		}
	})
}

// A heartbeat of a node of which nothing has changed is contact without content: it
// must not become an entry of the log.
// TestAnnotations: what the agent says of its node is put on the object, and taken off
// again; what others put there stays.
func TestAnnotations(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t)
		w.config.Annotations = map[string]string{"a": "1", "b": ""}
		w.run()
		w.after(time.Minute)
		if got := w.plane.node("n1").Annotations; len(got) != 1 || got["a"] != "1" {
			t.Errorf("at first: %v", got)
		}
		w.stop()
		n := api.Clone(w.plane.node("n1"))
		n.Annotations["c"] = "others'"
		w.plane.set(n)
		w.config.Annotations = map[string]string{"a": "", "b": "2"}
		w.run()
		defer w.stop()
		w.after(time.Minute)
		if got := w.plane.node("n1").Annotations; len(got) != 2 || got["b"] != "2" || got["c"] == "" {
			t.Errorf("with another configuration: %v", got)
		}
	})
}

func TestHeartbeatsSayNothing(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		w.run()
		defer w.stop()
		w.after(15 * time.Second)
		w.plane.mu.Lock()
		reports, mutations := w.plane.reports, len(w.plane.history)
		w.plane.mu.Unlock()
		w.after(10 * time.Minute)
		w.plane.mu.Lock()
		defer w.plane.mu.Unlock()
		if n := w.plane.reports - reports; n < 59 || n > 61 {
			t.Errorf("%d reports in ten minutes, want one every 10 s", n)
		}
		for _, m := range w.plane.history[mutations:] {
			t.Errorf("in ten quiet minutes: %s %s", m.Verb, m.Key)
		}
	})
}
