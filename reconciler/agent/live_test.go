package agent_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/agent/volume"
	"decree.dev/decree/reconciler/containerd"
)

const busybox = "test.local/busybox:1"

// startContainerd runs a containerd of the test's own and returns a way to connect.
func startContainerd(t *testing.T) func() *containerd.Runtime {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test starts containers and must run as root (run: sudo go test ./reconciler/agent)")
	}
	for _, bin := range []string{"containerd", "containerd-shim-runc-v2", "runc", "busybox"} {
		if _, err := exec.LookPath(bin); err != nil {
			t.Fatalf("%s is missing (run: go tool task setup)", bin)
		}
	}
	dir, err := os.MkdirTemp("", "dagt-") // socket paths must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	quiet := slog.New(slog.DiscardHandler)
	cfg := containerd.SupervisorConfig{Dir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), Logger: quiet}
	sup, err := containerd.Supervise(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	clean := func(f func(context.Context) error) {
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := f(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	clean(func(ctx context.Context) error { return containerd.WipeContainerd(ctx, cfg) })
	clean(sup.Stop)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := sup.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	id := strings.ToLower(rand.Text()[:6])
	rc := containerd.Config{Address: sup.Address(), Namespace: "test-" + id, Dir: filepath.Join(dir, "rt"),
		RunDir: filepath.Join(dir, "r"), CgroupParent: "/decree-agent-" + id, Logger: quiet}
	open := func() *containerd.Runtime {
		r, err := containerd.New(rc)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	clean(func(ctx context.Context) error {
		r := open()
		defer r.Close()
		return r.Purge(ctx)
	})
	importImage(t, open())
	return open
}

func importImage(t *testing.T, r *containerd.Runtime) {
	t.Helper()
	defer r.Close()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := containerd.PackImage(path, busybox, nil, &archive); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ImportImage(t.Context(), &archive); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for cond, which is asked after every report and at intervals.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("timed out waiting for: %s", what)
		}
	}
}

func shell(name, script string) corev1.Container {
	return corev1.Container{Name: name, Image: busybox, Command: []string{"/busybox", "sh", "-c", script}}
}

func livePod() *corev1.Pod {
	a := shell("a", `/busybox cat /config/greeting /data/made; echo node=$NODE ip=$IP; /busybox cat /etc/hosts; exec /busybox sleep 100000`)
	a.Env = []corev1.EnvVar{
		{Name: "NODE", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "spec.nodeName"}}},
		{Name: "IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}},
	}
	a.VolumeMounts = []corev1.VolumeMount{{Name: "config", MountPath: "/config"}, {Name: "data", MountPath: "/data"},
		{Name: "keys", MountPath: "/keys"}, {Name: "data", MountPath: "/sub", SubPath: "deep/down"}}
	a.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/busybox", "test", "-f", "/data/made"}}}}
	b := shell("b", `trap 'echo bye > /dev/termination-log; exit 0' TERM; while true; do /busybox sleep 0.05; done`)
	p := makePod("live", a, b)
	setup := shell("setup", "echo made-by-init > /data/made")
	setup.VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	p.Spec.InitContainers = []corev1.Container{setup}
	grace := int64(5)
	p.Spec.TerminationGracePeriodSeconds = &grace
	p.Spec.Volumes = []corev1.Volume{
		{Name: "data", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
		{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}},
		{Name: "keys", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "keys"}}},
	}
	return p
}

func configMap(greeting string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "settings"}, Data: map[string]string{"greeting": greeting}}
}

// TestLive runs a pod on containerd, kills a container, replaces the agent, changes
// a config map, and stops everything.
func TestLive(t *testing.T) {
	open := startContainerd(t)
	w := newWorld(t, livePod(), configMap("hello\n"),
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "keys"}, Data: map[string][]byte{"key": []byte("s3cret")}})
	w.config.Mounter = volume.Kernel{}
	t.Cleanup(func() { volume.Kernel{}.Unmount(w.config.Dir) }) // of a test that ended early
	w.config.ResolvConf = "/dev/null"
	start := func() (stop func()) {
		r := open()
		w.config.Runtime, w.config.Registerer = r, prometheus.NewRegistry()
		w.run()
		return func() {
			w.stop()
			r.Close()
		}
	}
	stop := start()
	begin := time.Now()
	eventually(t, "the pod to be ready", func() bool { return ready(w.plane.pod("live")) })
	t.Logf("two containers after an init container ready after %s", time.Since(begin).Round(time.Millisecond))

	t.Logf("events:\n%s", strings.Join(w.plane.events("live"), "\n"))
	logStepTimes(t, w.config.Registerer.(*prometheus.Registry))
	logs := w.output(t, "a")
	for _, want := range []string{"hello", "made-by-init", "node=n1 ip=10.98.0.1", "10.98.0.1\tlive"} {
		if !strings.Contains(logs, want) {
			t.Errorf("log lacks %q:\n%s", want, logs)
		}
	}
	if got := w.exec(t, "a", "/busybox", "cat", "/keys/key"); got != "s3cret" {
		t.Errorf("secret: %q", got)
	}
	w.exec(t, "a", "/busybox", "sh", "-c", "echo x > /sub/file && /busybox test -f /data/deep/down/file")

	pid := w.pid(t, "a")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	eventually(t, "the killed container to be restarted", func() bool {
		s := w.status("live", "a")
		return s.RestartCount == 1 && s.Ready
	})
	t.Logf("killed container ready again after %s", time.Since(killed).Round(time.Millisecond))
	w.wantEventually(t, "Exited: Container a exited with 137 (SIGKILL), restarting at once")
	if s := w.status("live", "b"); s.RestartCount != 0 {
		t.Errorf("b suffered: %+v", s)
	}

	before := w.status("live", "a")
	stop()
	stop = start()
	eventually(t, "the new agent to take over", func() bool { return w.adopted(t) })
	if after := w.status("live", "a"); after.ContainerID != before.ContainerID || after.RestartCount != 1 || !after.Ready {
		t.Errorf("adopted %+v as %+v", before, after)
	}

	w.plane.set(configMap("changed\n"))
	eventually(t, "the config map's change to be seen", func() bool {
		return w.exec(t, "a", "/busybox", "cat", "/config/greeting") == "changed\n"
	})

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := w.agent.StopAll(ctx); err != nil {
		t.Fatal(err)
	}
	w.assertNothingLeft(t)
	stop()
}

func (w *world) adopted(t *testing.T) bool {
	_, err := w.agent.Exec(t.Context(), "default", "live", "a", agent.ExecConfig{Command: []string{"/busybox", "true"}})
	return err == nil && ready(w.plane.pod("live"))
}

func (w *world) output(t *testing.T, container string) string {
	t.Helper()
	var out bytes.Buffer
	if err := w.agent.Logs(t.Context(), "default", "live", container, agent.LogOptions{TailLines: -1}, &out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func (w *world) exec(t *testing.T, container string, command ...string) string {
	t.Helper()
	var out bytes.Buffer
	code, err := w.agent.Exec(t.Context(), "default", "live", container, agent.ExecConfig{Command: command, Stdout: &out, Stderr: &out})
	if err != nil || code != 0 {
		t.Fatalf("exec %q: %d, %v: %s", command, code, err, out.String())
	}
	return out.String()
}

func (w *world) pid(t *testing.T, container string) int {
	t.Helper()
	list, err := w.config.Runtime.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		for _, c := range s.Containers {
			if c.Name == container && c.State == agent.Running {
				return int(c.Pid)
			}
		}
	}
	return 0
}

func (w *world) wantEventually(t *testing.T, part string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the event %q; there are %q", part, w.plane.events("live")), func() bool {
		return strings.Contains(strings.Join(w.plane.events("live"), "\n"), part)
	})
}

func (w *world) assertNothingLeft(t *testing.T) {
	t.Helper()
	if left, err := w.config.Runtime.List(t.Context()); err != nil || len(left) != 0 {
		t.Errorf("left in the runtime: %+v, %v", left, err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(w.config.Dir))
	if err != nil || len(mounts) != 0 {
		t.Errorf("left mounted: %v, %v", mounts, err)
	}
	entries, err := os.ReadDir(filepath.Join(w.config.Dir, "pods"))
	if err != nil || len(entries) != 0 {
		t.Errorf("left in the folder: %v, %v", entries, err)
	}
	if w.plane.pod("live") == nil {
		t.Error("StopAll deleted the pod's object")
	}
}

// logStepTimes shows where the time went.
func logStepTimes(t *testing.T, r *prometheus.Registry) {
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "decree_agent_step_seconds" {
			continue
		}
		for _, m := range f.Metric {
			h := m.GetHistogram()
			t.Logf("%s (%s): %d, %.0f ms each", m.Label[0].GetValue(), m.Label[1].GetValue(), h.GetSampleCount(), 1000*h.GetSampleSum()/float64(h.GetSampleCount()))
		}
	}
}
