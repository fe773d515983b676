package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/agent/fakeruntime"
	"decree.dev/decree/schemas/api"
)

// answering is a Program whose exec probes succeed while ok is true.
func answering(ok *atomic.Bool) fakeruntime.Program {
	return fakeruntime.Program{Exec: func(_ context.Context, _ []string, out io.Writer) (int, error) {
		if ok.Load() {
			return 0, nil
		}
		fmt.Fprint(out, "not yet")
		return 1, nil
	}}
}

func execProbe() *corev1.Probe {
	return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"check"}}}, PeriodSeconds: 10, FailureThreshold: 3}
}

func TestReadinessIsQuick(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		pod.Spec.Containers[0].ReadinessProbe = execProbe()
		w := newWorld(t, pod)
		var ok atomic.Bool
		w.runtime.Program = func(agent.ContainerConfig) fakeruntime.Program { return answering(&ok) }
		w.run()
		defer w.stop()
		w.after(500 * time.Millisecond)
		if ready(w.plane.pod("web")) {
			t.Fatal("ready before the probe succeeded")
		}
		ok.Store(true)
		w.after(500 * time.Millisecond)
		if !ready(w.plane.pod("web")) {
			t.Errorf("not ready within half a second of being up: %+v", w.plane.pod("web").Status.Conditions)
		}
		if list := strings.Join(w.plane.events("web"), "\n"); strings.Contains(list, "Unhealthy") {
			t.Errorf("quick checks made events:\n%s", list)
		}
		ok.Store(false)
		w.after(25 * time.Second)
		if !ready(w.plane.pod("web")) {
			t.Error("not ready before the failure threshold")
		}
		w.after(16 * time.Second)
		if ready(w.plane.pod("web")) {
			t.Error("still ready after three failures")
		}
		w.wantEvent("web", "Unhealthy: Readiness probe failed: command exited with 1: not yet (3)")
		if s := w.status("web", "main"); s.RestartCount != 0 {
			t.Errorf("readiness restarted the container: %+v", s)
		}
	})
}

func TestLivenessRestarts(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		pod.Spec.Containers[0].LivenessProbe = execProbe()
		own := int64(4)
		pod.Spec.Containers[0].LivenessProbe.TerminationGracePeriodSeconds = &own
		w := newWorld(t, pod)
		var ok atomic.Bool
		ok.Store(true)
		w.runtime.Program = func(agent.ContainerConfig) fakeruntime.Program {
			p := answering(&ok)
			p.OnTerm = -1
			return p
		}
		w.run()
		defer w.stop()
		w.after(time.Minute)
		ok.Store(false)
		w.after(33 * time.Second)
		if got := w.calls("Signal"); len(got) == 0 || got[0] != "Signal 15 main-0" {
			t.Fatalf("after three failures: %v", got)
		}
		ok.Store(true)
		w.after(5 * time.Second)
		if got := w.calls("Signal"); len(got) != 2 || got[1] != "Signal 9 main-0" {
			t.Errorf("after the probe's own grace: %v", got)
		}
		if s := w.status("web", "main"); s.RestartCount != 1 || s.State.Running == nil {
			t.Errorf("status %+v", s)
		}
		w.wantEvent("web", "Killing: Stopping container main: it failed its liveness probe 3 times")
	})
}

func TestStartupProbeGates(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		c := &pod.Spec.Containers[0]
		c.StartupProbe, c.LivenessProbe = execProbe(), execProbe()
		c.StartupProbe.FailureThreshold = 12
		c.LivenessProbe.FailureThreshold = 1
		w := newWorld(t, pod)
		var ok atomic.Bool
		w.runtime.Program = func(agent.ContainerConfig) fakeruntime.Program { return answering(&ok) }
		w.run()
		defer w.stop()
		w.after(100 * time.Second)
		if s := w.status("web", "main"); s.RestartCount != 0 || *s.Started || s.Ready {
			t.Errorf("while starting: %+v", s)
		}
		ok.Store(true)
		w.after(11 * time.Second)
		if s := w.status("web", "main"); !*s.Started || !s.Ready {
			t.Errorf("started: %+v", s)
		}
		ok.Store(false)
		w.after(30 * time.Second)
		if s := w.status("web", "main"); s.RestartCount == 0 {
			t.Errorf("liveness does not count after the start: %+v\n%s\n%v", s, strings.Join(w.plane.events("web"), "\n"), w.runtime.Calls())
		}
	})
}

func TestTCPProbeGoesToThePod(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		pod.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}
		pod.Spec.Containers[0].ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromString("http")}}}
		w := newWorld(t, pod)
		w.config.Dial = func(_ context.Context, network, address string) (net.Conn, error) {
			if network != "tcp" || address != "10.98.0.1:8080" {
				return nil, errors.New("nobody there")
			}
			here, there := net.Pipe()
			there.Close()
			return here, nil
		}
		w.run()
		defer w.stop()
		w.after(100 * time.Millisecond)
		if !ready(w.plane.pod("web")) {
			t.Errorf("not ready: %+v", w.plane.pod("web").Status)
		}
	})
}

func TestMissingConfigMap(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		pod.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}
		w := newWorld(t, pod)
		w.run()
		defer w.stop()
		w.after(10 * time.Second)
		s := w.status("web", "main")
		if s.State.Waiting == nil || s.State.Waiting.Reason != "CreateContainerConfigError" || !strings.Contains(s.State.Waiting.Message, `configmap "settings" not found`) {
			t.Errorf("status %+v", s)
		}
		w.assertQuiet(15) // a few tries, with growing waits
		w.plane.set(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "settings"}, Data: map[string]string{"COLOUR": "blue"}})
		w.after(50 * time.Millisecond)
		if s := w.status("web", "main"); s.State.Running == nil {
			t.Errorf("did not start once the config map was there: %+v", s)
		}
		if cfg, _ := w.runtime.Config("uid-web", "main"); len(cfg.Env) != 1 || cfg.Env[0] != "COLOUR=blue" {
			t.Errorf("env %v", cfg.Env)
		}
	})
}

func TestImagePullBackOff(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		var broken atomic.Bool
		broken.Store(true)
		w.runtime.Fail = func(call, _ string) error {
			if call == "PullImage" && broken.Load() {
				return errors.New("manifest unknown")
			}
			return nil
		}
		w.run()
		defer w.stop()
		w.after(time.Second)
		if s := w.status("web", "main"); s.State.Waiting.Reason != "ErrImagePull" || !strings.Contains(s.State.Waiting.Message, "manifest unknown") {
			t.Errorf("first: %+v", s)
		}
		w.after(11 * time.Second)
		if s := w.status("web", "main"); s.State.Waiting.Reason != "ImagePullBackOff" {
			t.Errorf("second: %+v", s)
		}
		w.wantEvent("web", `Failed: Failed to pull image "app:1"`)
		broken.Store(false)
		w.after(time.Minute)
		if s := w.status("web", "main"); s.State.Running == nil {
			t.Errorf("after the mend: %+v", s)
		}
	})
}

func TestChangedImageRestartsThatContainer(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web", corev1.Container{Name: "a", Image: "app:1"}, corev1.Container{Name: "b", Image: "app:1"}))
		w.run()
		defer w.stop()
		w.after(time.Minute)
		p := api.Clone(w.plane.pod("web"))
		p.Spec.Containers[0].Image = "app:2"
		w.plane.set(p)
		w.after(time.Second)
		a, b := w.status("web", "a"), w.status("web", "b")
		if a.RestartCount != 1 || a.State.Running == nil || b.RestartCount != 0 {
			t.Errorf("a %+v\nb %+v", a, b)
		}
		if c, _ := w.runtime.Container("uid-web", "a"); c.Image != "app:2" {
			t.Errorf("runs %s", c.Image)
		}
	})
}

func TestWithoutControlPlane(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		w.run()
		defer w.stop()
		w.after(time.Minute)
		w.plane.setDown(true)
		if err := w.runtime.Crash("uid-web", "main", 9); err != nil {
			t.Fatal(err)
		}
		w.after(time.Second)
		if c, _ := w.runtime.Container("uid-web", "main"); c.Attempt != 1 || c.State != agent.Running {
			t.Errorf("not restarted: %+v", c)
		}
		w.plane.setDown(false)
		w.after(10 * time.Second)
		if s := w.status("web", "main"); s.RestartCount != 1 {
			t.Errorf("reported late: %+v", s)
		}
		w.wantEvent("web", "Exited")
	})
}

func TestNothingIsPrunedBeforeTheViewIsLoaded(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		w := newWorld(t, pod)
		w.run()
		w.after(time.Minute)
		w.stop()
		w.plane.remove(w.plane.pod("web"))
		w.plane.synced = make(chan struct{})
		w.run()
		defer w.stop()
		w.after(time.Hour)
		if c, err := w.runtime.Container("uid-web", "main"); err != nil || c.State != agent.Running {
			t.Fatalf("pruned too early: %+v, %v", c, err)
		}
		close(w.plane.synced)
		w.after(time.Minute)
		if left, _ := w.runtime.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %+v", left)
		}
	})
}

func TestRuntimeLossIsNoExit(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		var lost atomic.Bool
		w.runtime.Fail = func(string, string) error {
			if lost.Load() {
				return errors.New("connection refused")
			}
			return nil
		}
		w.run()
		defer w.stop()
		w.after(time.Minute)
		if n := w.plane.node("n1"); n == nil || n.Status.Conditions[0].Status != corev1.ConditionTrue {
			t.Fatalf("node %+v", n)
		}
		before := w.status("web", "main")
		lost.Store(true)
		w.after(2 * time.Minute)
		n := w.plane.node("n1").Status.Conditions[0]
		if n.Status != corev1.ConditionFalse || !strings.Contains(n.Message, "connection refused") {
			t.Errorf("node condition %+v", n)
		}
		if s := w.status("web", "main"); s.State.Running == nil || s.ContainerID != before.ContainerID {
			t.Errorf("status %+v", s)
		}
		lost.Store(false)
		w.after(20 * time.Second)
		if n := w.plane.node("n1").Status.Conditions[0]; n.Status != corev1.ConditionTrue {
			t.Errorf("node condition %+v", n)
		}
		if got := w.calls("StartContainer"); len(got) != 1 {
			t.Errorf("started %v", got)
		}
	})
}

func TestStopAllWithoutRun(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("a"), makePod("b"))
		w.runtime.Program = func(agent.ContainerConfig) fakeruntime.Program { return fakeruntime.Program{OnTerm: 3 * time.Second} }
		w.run()
		w.after(time.Minute)
		w.stop()
		w.plane = newPlane() // the control plane has gone, with everything
		w.plane.synced = make(chan struct{})
		w.config.ControlPlane = w.plane
		a, err := agent.New(w.config)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := a.StopAll(ctx); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 3*time.Second || took > 6*time.Second {
			t.Errorf("took %s; both end in parallel, 3 s after SIGTERM", took)
		}
		if left, _ := w.runtime.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %+v", left)
		}
	})
}

func TestJobPodCompletes(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("job")
		pod.Spec.RestartPolicy = corev1.RestartPolicyNever
		w := newWorld(t, pod)
		w.runtime.Program = func(agent.ContainerConfig) fakeruntime.Program { return fakeruntime.Program{Runs: time.Second} }
		w.run()
		w.after(time.Minute)
		p := w.plane.pod("job")
		if p.Status.Phase != corev1.PodSucceeded || w.status("job", "main").State.Terminated == nil {
			t.Errorf("status %+v", p.Status)
		}
		if left, _ := w.network.Attached(t.Context()); len(left) != 0 {
			t.Error("a finished pod keeps its address")
		}
		w.stop()
		w.runtime.Reboot()
		w.run()
		defer w.stop()
		w.after(time.Minute)
		if got := w.calls("StartContainer"); len(got) != 1 {
			t.Errorf("ran again: %v", got)
		}
		if p := w.plane.pod("job"); p.Status.Phase != corev1.PodSucceeded {
			t.Errorf("phase %s", p.Status.Phase)
		}
	})
}

func TestSlowPullHoldsUpNobodyElse(t *testing.T) {
	scenario(t, func(t *testing.T) {
		slow := makePod("slow", corev1.Container{Name: "main", Image: "big:1"})
		w := newWorld(t, slow, makePod("quick"))
		w.runtime.Images["app:1"] = "app@sha256:1"
		w.runtime.Delay["PullImage"] = time.Minute
		w.run()
		defer w.stop()
		w.after(time.Second)
		if s := w.status("quick", "main"); s.State.Running == nil {
			t.Errorf("quick: %+v", s)
		}
		w.wantEvent("slow", `Pulling: Pulling image "big:1"`)
		w.after(2 * time.Minute)
		w.wantEvent("slow", `Pulled: Successfully pulled image "big:1" in 1m0s`)
		if s := w.status("slow", "main"); s.State.Running == nil {
			t.Errorf("slow: %+v", s)
		}
	})
}

func TestPostStartFailureKills(t *testing.T) {
	scenario(t, func(t *testing.T) {
		pod := makePod("web")
		pod.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"hook"}}}}
		w := newWorld(t, pod)
		var ok atomic.Bool
		w.runtime.Program = func(agent.ContainerConfig) fakeruntime.Program { return answering(&ok) }
		w.run()
		defer w.stop()
		w.after(500 * time.Millisecond)
		w.wantEvent("web", "FailedPostStartHook")
		w.wantEvent("web", "Killing")
		ok.Store(true)
		w.after(20 * time.Second)
		if s := w.status("web", "main"); s.State.Running == nil || !s.Ready || s.RestartCount == 0 {
			t.Errorf("status %+v", s)
		}
	})
}

func TestSidecar(t *testing.T) {
	scenario(t, func(t *testing.T) {
		always := corev1.ContainerRestartPolicyAlways
		pod := makePod("job")
		pod.Spec.RestartPolicy = corev1.RestartPolicyNever
		pod.Spec.InitContainers = []corev1.Container{{Name: "proxy", Image: "app:1", RestartPolicy: &always}}
		w := newWorld(t, pod)
		w.runtime.Program = func(c agent.ContainerConfig) fakeruntime.Program {
			if c.Container.Name == "main" {
				return fakeruntime.Program{Runs: 30 * time.Second}
			}
			return fakeruntime.Program{}
		}
		w.run()
		defer w.stop()
		w.after(10 * time.Second)
		if !ready(w.plane.pod("job")) {
			t.Errorf("not ready: %+v", w.plane.pod("job").Status)
		}
		if err := w.runtime.Crash("uid-job", "proxy", 9); err != nil {
			t.Fatal(err)
		}
		w.after(time.Second)
		if s := w.status("job", "proxy"); s.RestartCount != 1 || s.State.Running == nil {
			t.Errorf("proxy: %+v", s)
		}
		w.after(time.Minute)
		if p := w.plane.pod("job"); p.Status.Phase != corev1.PodSucceeded {
			t.Errorf("status %+v", p.Status)
		}
		if got := w.calls("Signal"); len(got) != 1 || got[0] != "Signal 15 proxy-1" {
			t.Errorf("signals %v", got)
		}
	})
}

func TestRefusedStatusIsSentAgain(t *testing.T) {
	scenario(t, func(t *testing.T) {
		w := newWorld(t, makePod("web"))
		w.run()
		defer w.stop()
		w.after(time.Second)
		p := api.Clone(w.plane.pod("web"))
		p.Status = corev1.PodStatus{Phase: corev1.PodPending} // somebody else got it wrong
		w.plane.set(p)
		w.after(time.Minute)
		if s := w.plane.pod("web").Status; s.Phase != corev1.PodRunning {
			t.Errorf("status %+v", s)
		}
	})
}
