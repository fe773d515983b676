package agent

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func statusPod() *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u"}}
	p.Spec.RestartPolicy = corev1.RestartPolicyAlways
	p.Spec.Containers = []corev1.Container{{Name: "main", Image: "app:1"}}
	return p
}

func statusLocal(p *corev1.Pod) LocalState {
	l := newLocalState()
	for _, c := range allContainers(p) {
		l.Hashes[c.Name] = HashContainer(c.Container)
	}
	return l
}

func box(p *corev1.Pod, containers ...Container) *Sandbox {
	for i := range containers {
		c := &containers[i]
		c.ID, c.CreatedAt = c.Name+string(rune('0'+c.Attempt)), noon
		if spec := containerSpec(p, c.Name); spec != nil && c.Hash == "" {
			c.Hash = HashContainer(spec)
		}
	}
	return &Sandbox{UID: p.UID, NetNS: "/n", CreatedAt: noon, Containers: containers}
}

func TestWaitingReasons(t *testing.T) {
	p := statusPod()
	for _, test := range []struct {
		name  string
		retry map[RetryKey]Retry
		box   *Sandbox
		want  string
		text  string
	}{
		{"new", nil, nil, "ContainerCreating", ""},
		{"pull", map[RetryKey]Retry{{"main", PullImage}: {Failures: 1, Reason: reasonErrImagePull, Message: "gone"}}, nil, "ErrImagePull", "gone"},
		{"pull again", map[RetryKey]Retry{{"main", PullImage}: {Failures: 2, Reason: reasonErrImagePull, Message: "gone"}}, nil, "ImagePullBackOff", `Back-off pulling image "app:1": gone`},
		{"bad name", map[RetryKey]Retry{{"main", PullImage}: {Failures: 3, Reason: reasonInvalidImageName, Message: "x"}}, nil, "InvalidImageName", "x"},
		{"volumes", map[RetryKey]Retry{{"", SyncVolumes}: {Failures: 1, Reason: reasonConfigError, Message: "no secret"}}, nil, "CreateContainerConfigError", "no secret"},
		{"start", map[RetryKey]Retry{{"main", StartContainer}: {Failures: 1, Reason: reasonRunError, Message: "no such file"}}, box(p, Container{Name: "main", State: Created}), "RunContainerError", "no such file"},
		{"crash loop", nil, box(p, Container{Name: "main", Attempt: 3, State: Exited, ExitCode: 1, StartedAt: noon, FinishedAt: noon}), "CrashLoopBackOff", "back-off 40s restarting failed container=main pod=web_shop(u)"},
	} {
		l := statusLocal(p)
		if test.retry != nil {
			l.Retry = test.retry
		}
		st := Status(noon, p, test.box, l, nil)
		w := st.ContainerStatuses[0].State.Waiting
		if w == nil || w.Reason != test.want || w.Message != test.text {
			t.Errorf("%s: %+v, want %s %q", test.name, st.ContainerStatuses[0].State, test.want, test.text)
		}
	}
}

func TestPhases(t *testing.T) {
	exited := func(code int32) Container {
		return Container{Name: "main", State: Exited, ExitCode: code, StartedAt: noon, FinishedAt: noon}
	}
	for _, test := range []struct {
		name   string
		policy corev1.RestartPolicy
		c      []Container
		want   corev1.PodPhase
	}{
		{"nothing", "Always", nil, corev1.PodPending},
		{"created", "Always", []Container{{Name: "main", State: Created}}, corev1.PodPending},
		{"running", "Always", []Container{{Name: "main", State: Running, StartedAt: noon}}, corev1.PodRunning},
		{"restarting", "Always", []Container{exited(1)}, corev1.PodRunning},
		{"done, to be restarted", "Always", []Container{exited(0)}, corev1.PodRunning},
		{"done", "OnFailure", []Container{exited(0)}, corev1.PodSucceeded},
		{"failed, to be restarted", "OnFailure", []Container{exited(1)}, corev1.PodRunning},
		{"failed", "Never", []Container{exited(1)}, corev1.PodFailed},
		{"succeeded", "Never", []Container{exited(0)}, corev1.PodSucceeded},
	} {
		p := statusPod()
		p.Spec.RestartPolicy = test.policy
		if got := Status(noon, p, box(p, test.c...), statusLocal(p), nil); got.Phase != test.want {
			t.Errorf("%s: %s, want %s", test.name, got.Phase, test.want)
		}
	}
}

func TestConditionsKeepWhatOthersSay(t *testing.T) {
	p := statusPod()
	before := metav1.NewTime(noon.Add(-time.Hour))
	p.Status.Conditions = []corev1.PodCondition{
		{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, Reason: "Bound", LastTransitionTime: before},
		{Type: "example.org/gate", Status: corev1.ConditionFalse, LastTransitionTime: before},
		{Type: corev1.PodInitialized, Status: corev1.ConditionTrue, LastTransitionTime: before},
		{Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: before},
	}
	p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.org/gate"}}
	l := statusLocal(p)
	b := box(p, Container{Name: "main", State: Running, StartedAt: noon})
	l.Probes["main0"] = ProbeState{Started: true, Ready: true}
	l.Attached, l.IPs = true, []netip.Addr{netip.MustParseAddr("10.98.0.5")}
	st := Status(noon, p, b, l, []netip.Addr{netip.MustParseAddr("192.0.2.1")})
	get := func(ty corev1.PodConditionType) corev1.PodCondition {
		for _, c := range st.Conditions {
			if c.Type == ty {
				return c
			}
		}
		t.Fatalf("no condition %s in %+v", ty, st.Conditions)
		return corev1.PodCondition{}
	}
	if c := get(corev1.PodScheduled); c.Reason != "Bound" {
		t.Errorf("scheduled: %+v", c)
	}
	if c := get(corev1.PodInitialized); c.Status != corev1.ConditionTrue || !c.LastTransitionTime.Equal(&before) {
		t.Errorf("initialized: %+v", c)
	}
	if c := get(corev1.ContainersReady); c.Status != corev1.ConditionTrue {
		t.Errorf("containers ready: %+v", c)
	}
	if c := get(corev1.PodReady); c.Status != corev1.ConditionFalse || c.Reason != "ReadinessGatesNotReady" || !c.LastTransitionTime.Equal(&before) {
		t.Errorf("ready: %+v", c)
	}
	p.Status.Conditions[1].Status = corev1.ConditionTrue
	st = Status(noon, p, b, l, nil)
	if c := get(corev1.PodReady); c.Status != corev1.ConditionTrue || !c.LastTransitionTime.Time.Equal(noon) {
		t.Errorf("ready: %+v", c)
	}
	if st.PodIP != "10.98.0.5" || st.PodIPs[0].IP != "10.98.0.5" {
		t.Errorf("addresses: %+v", st)
	}
	if len(st.Conditions) != 5 {
		t.Errorf("%d conditions: %+v", len(st.Conditions), st.Conditions)
	}
}

func TestExitTexts(t *testing.T) {
	p := statusPod()
	for want, c := range map[string]Container{
		"Container main exited with 137 (SIGKILL), restarting at once":                            {ExitCode: 137},
		"Container main exited with 1, restarting in 10s":                                         {ExitCode: 1, Attempt: 1},
		"Container main exited with 137 (out of memory, killed by the kernel), restarting in 20s": {ExitCode: 137, OOMKilled: true, Attempt: 2},
		"Container main exited with 0, restarting in 5m0s":                                        {Attempt: 20},
	} {
		c.Name, c.State, c.StartedAt, c.FinishedAt = "main", Exited, noon, noon
		b := box(p, c)
		if got := exitText(noon, p, b.Containers[0], attemptsByName(p, b)["main"], statusLocal(p)); got != want {
			t.Errorf("got  %q\nwant %q", got, want)
		}
	}
	p.Spec.RestartPolicy = corev1.RestartPolicyNever
	b := box(p, Container{Name: "main", State: Exited, ExitCode: 2})
	if got := exitText(noon, p, b.Containers[0], attemptsByName(p, b)["main"], statusLocal(p)); !strings.HasSuffix(got, "not restarted (restart policy Never)") {
		t.Errorf("got %q", got)
	}
}

func TestQOSAndResources(t *testing.T) {
	q := resource.MustParse
	p := statusPod()
	if got := QOSClass(p); got != corev1.PodQOSBestEffort {
		t.Errorf("nothing: %s", got)
	}
	p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{"cpu": q("100m")}
	if got := QOSClass(p); got != corev1.PodQOSBurstable {
		t.Errorf("requests: %s", got)
	}
	all := corev1.ResourceList{"cpu": q("100m"), "memory": q("64Mi")}
	p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Limits: all}
	if got := QOSClass(p); got != corev1.PodQOSGuaranteed {
		t.Errorf("limits: %s", got)
	}
	p.Spec.InitContainers = []corev1.Container{{Name: "setup", Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{"cpu": q("1"), "memory": q("32Mi")}}}}
	r := podResources(p)
	if cpu, mem := r.Limits["cpu"], r.Limits["memory"]; cpu.String() != "1" || mem.String() != "64Mi" {
		t.Errorf("limits %v", r.Limits)
	}
	p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "free"})
	if r = podResources(p); len(r.Limits) != 0 {
		t.Errorf("a container without a limit, but the pod has %v", r.Limits)
	}
}

func TestHashIgnoresWhatNeedsNoRestart(t *testing.T) {
	c := corev1.Container{Name: "main", Image: "app:1"}
	h := HashContainer(&c)
	c.ReadinessProbe, c.ImagePullPolicy = &corev1.Probe{}, corev1.PullAlways
	if HashContainer(&c) != h {
		t.Error("a probe changes the hash")
	}
	c.Args = []string{"x"}
	if HashContainer(&c) == h {
		t.Error("arguments do not change the hash")
	}
}
