package containerd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"decree.dev/decree/reconciler/agent"
)

func ptr[T any](v T) *T { return &v }

// status returns the fields of /proc/self/status of a shell in the pod's first container.
func status(t *testing.T, r *Runtime, p *corev1.Pod) map[string]string {
	t.Helper()
	p.Spec.Containers[0].Args = []string{"cat /proc/self/status"}
	fields := map[string]string{}
	for line := range strings.Lines(output(t, r, p)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		fields[key] = strings.TrimSpace(value)
	}
	return fields
}

func caps(t *testing.T, hex string) uint64 {
	t.Helper()
	v, err := strconv.ParseUint(hex, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

const (
	bitChown   = 1 << 0
	bitNetRaw  = 1 << 13
	bitMknod   = 1 << 27
	bitAdmin   = 1 << 21
	bitSetFcap = 1 << 31
)

func TestSecurityDefaults(t *testing.T) {
	got := status(t, newRuntime(t), pod(""))
	eff := caps(t, got["CapEff"])
	if eff&bitChown == 0 || eff&(bitNetRaw|bitMknod|bitAdmin|bitSetFcap) != 0 {
		t.Errorf("effective capabilities %x", eff)
	}
	if caps(t, got["CapBnd"]) != eff || caps(t, got["CapInh"]) != 0 || caps(t, got["CapAmb"]) != 0 {
		t.Errorf("capabilities: bounding %s, inheritable %s, ambient %s", got["CapBnd"], got["CapInh"], got["CapAmb"])
	}
	if got["Seccomp"] != "2" || got["NoNewPrivs"] != "1" {
		t.Errorf("Seccomp %s, NoNewPrivs %s; want 2 (filter), 1", got["Seccomp"], got["NoNewPrivs"])
	}
}

func TestSecurityAsked(t *testing.T) {
	r := newRuntime(t)
	for name, test := range map[string]struct {
		sc    corev1.SecurityContext
		check func(f map[string]string) bool
	}{
		"drop ALL, add one": {
			corev1.SecurityContext{Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"CHOWN"}}},
			func(f map[string]string) bool { return caps(t, f["CapBnd"]) == bitChown },
		},
		"drop one": {
			corev1.SecurityContext{Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"cap_chown"}}},
			func(f map[string]string) bool { c := caps(t, f["CapEff"]); return c&bitChown == 0 && c != 0 },
		},
		"add ALL": {
			corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"ALL"}}},
			func(f map[string]string) bool { return caps(t, f["CapEff"])&bitAdmin != 0 },
		},
		"escalation": {
			corev1.SecurityContext{AllowPrivilegeEscalation: ptr(true)},
			func(f map[string]string) bool { return f["NoNewPrivs"] == "0" && f["Seccomp"] == "2" },
		},
		"unconfined": {
			corev1.SecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeUnconfined}},
			func(f map[string]string) bool { return f["Seccomp"] == "0" && f["NoNewPrivs"] == "1" },
		},
		"privileged": {
			corev1.SecurityContext{Privileged: ptr(true)},
			func(f map[string]string) bool {
				return f["Seccomp"] == "0" && f["NoNewPrivs"] == "0" && caps(t, f["CapEff"])&bitAdmin != 0
			},
		},
		"user and group": {
			corev1.SecurityContext{RunAsUser: ptr(int64(77)), RunAsGroup: ptr(int64(88)), RunAsNonRoot: ptr(true)},
			func(f map[string]string) bool {
				return strings.HasPrefix(f["Uid"], "77\t") && strings.HasPrefix(f["Gid"], "88\t") && caps(t, f["CapEff"]) == 0
			},
		},
	} {
		p := pod("")
		p.Spec.Containers[0].SecurityContext = &test.sc
		if got := status(t, r, p); !test.check(got) {
			t.Errorf("%s: Uid %s, Gid %s, CapEff %s, CapBnd %s, Seccomp %s, NoNewPrivs %s", name,
				got["Uid"], got["Gid"], got["CapEff"], got["CapBnd"], got["Seccomp"], got["NoNewPrivs"])
		}
	}
}

func TestUsersAndGroups(t *testing.T) {
	r := newRuntime(t)
	p := pod("id -u; id -g; id -G")
	p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: ptr(int64(1234)), FSGroup: ptr(int64(999)), SupplementalGroups: []int64{777}}
	// 1234 is "web" in the image, whose groups come from there.
	if got, want := output(t, r, p), "1234\n2345\n2345 777 999 3456\n"; sortedWords(got) != sortedWords(want) {
		t.Errorf("got %q, want %q", got, want)
	}
	root := pod("true")
	root.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: ptr(true)}
	createSandbox(t, r, root)
	if _, err := r.CreateContainer(t.Context(), containerConfig(root, 0, 0)); !errors.Is(err, agent.ErrRunAsRoot) {
		t.Errorf("root with runAsNonRoot: %v", err)
	}
}

func sortedWords(s string) string {
	seen := map[string]int{}
	for _, w := range strings.Fields(s) {
		seen[w]++
	}
	return fmt.Sprint(seen)
}

func TestFilesOfAContainer(t *testing.T) {
	r := newRuntime(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("mounted\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := pod(`cat /in/f /in/deep/f; echo x >/in/f || echo refused; echo y >/rw/new; echo z >/etc/x || echo readonly
		head -c1 /proc/kcore | wc -c; echo 1 2>/dev/null >/proc/sys/kernel/domainname || echo procro
		ls /dev/shm | wc -l; cat /proc/1/oom_score_adj; pwd; echo $PATH $HOSTNAME $A`)
	p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{ReadOnlyRootFilesystem: ptr(true)}
	p.Spec.Containers[0].WorkingDir = "/tmp"
	createSandbox(t, r, p)
	cfg := containerConfig(p, 0, 0)
	rw := t.TempDir()
	cfg.Mounts = []agent.Mount{
		{HostPath: dir, ContainerPath: "/in/deep", ReadOnly: true}, {HostPath: dir, ContainerPath: "/in", ReadOnly: true},
		{HostPath: rw, ContainerPath: "/rw"},
	}
	if err := os.Mkdir(filepath.Join(dir, "deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg.Env = []string{"A=b"}
	startContainer(t, r, cfg)
	got := logs(t, r, p, "c0", agent.LogOptions{Follow: true, TailLines: -1})
	got = strings.Join(keep(got, "kcore", "can't create"), "\n")
	want := "mounted\nmounted\nrefused\nreadonly\n0\nprocro\n0\n1000\n/tmp\n/bin " + p.Name + " b"
	if got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if data, err := os.ReadFile(filepath.Join(rw, "new")); err != nil || string(data) != "y\n" {
		t.Errorf("writable mount: %q, %v", data, err)
	}
}

// keep returns the lines without those that contain one of drop.
func keep(text string, drop ...string) []string {
	var out []string
next:
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		for _, d := range drop {
			if strings.Contains(line, d) {
				continue next
			}
		}
		out = append(out, line)
	}
	return out
}

func TestImageDefaults(t *testing.T) {
	r := newRuntime(t)
	p := pod("")
	c := &p.Spec.Containers[0]
	c.Command, c.Args = nil, nil
	if got := output(t, r, p); got != "from the image\n" {
		t.Errorf("entrypoint and command of the image: %q", got)
	}
	p = pod("echo args only")
	p.Spec.Containers[0].Command = nil
	if got := output(t, r, p); got != "args only\n" {
		t.Errorf("entrypoint of the image with own args: %q", got)
	}
}

func TestSharedNamespaces(t *testing.T) {
	r := newRuntime(t)
	p := pod("echo shared >/dev/shm/f; sleep 1000", "sleep 1000")
	ids := start(t, r, p)
	script := "for n in net ipc uts pid mnt; do readlink /proc/self/ns/$n; done; hostname; cat /proc/net/dev | grep -c lo:; ip link show lo | grep -c UP; cat /proc/sys/net/ipv4/ip_unprivileged_port_start"
	a, _ := execOut(t, r, ids[0], "sh", "-c", script)
	b, _ := execOut(t, r, ids[1], "sh", "-c", script)
	la, lb := strings.Fields(a), strings.Fields(b)
	if len(la) != 9 || len(lb) != 9 {
		t.Fatalf("got %q and %q", a, b)
	}
	for i, ns := range []string{"net", "ipc", "uts", "pid", "mnt"} {
		if shared := la[i] == lb[i]; shared != (i < 3) {
			t.Errorf("namespace %s: %s and %s", ns, la[i], lb[i])
		}
		if own, err := os.Readlink("/proc/self/ns/" + ns); err != nil || own == la[i] {
			t.Errorf("namespace %s is the node's", ns)
		}
	}
	if strings.Join(la[5:], " ") != p.Name+" 1 1 0" {
		t.Errorf("hostname, loopback, loopback up, first free port: %v", la[5:])
	}
	if out, _ := execOut(t, r, ids[1], "cat", "/dev/shm/f"); out != "shared\n" {
		t.Errorf("shared memory: %q", out)
	}
}

func TestHostNetwork(t *testing.T) {
	r := newRuntime(t)
	p := pod("readlink /proc/self/ns/net; readlink /proc/self/ns/uts; readlink /proc/self/ns/ipc")
	p.Spec.HostNetwork = true
	got := strings.Fields(output(t, r, p))
	for i, ns := range []string{"net", "uts", "ipc"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		if host := i < len(got) && got[i] == own; host != (i < 2) {
			t.Errorf("namespace %s of the pod %v, of the node %s", ns, got, own)
		}
	}
}

func TestSysctls(t *testing.T) {
	r := newRuntime(t)
	p := pod("cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shmmax")
	p.Spec.SecurityContext = &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{
		{Name: "net.ipv4.ip_local_port_range", Value: "10000 20000"}, {Name: "kernel.shmmax", Value: "12345678"},
	}}
	if got := strings.Join(strings.Fields(output(t, r, p)), " "); got != "10000 20000 12345678" {
		t.Errorf("sysctls: %q", got)
	}
	p = pod("true")
	p.Spec.SecurityContext = &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: "kernel.panic", Value: "1"}}}
	if _, err := r.CreateSandbox(t.Context(), agent.SandboxConfig{Pod: p}); err == nil || !strings.Contains(err.Error(), "kernel.panic") {
		t.Errorf("a sysctl of the node was accepted: %v", err)
	}
}

// cgroupFile reads a file of a cgroup by its v1 controller, v1 name or v2 name.
func cgroupFile(t *testing.T, path, controller, v1, v2 string) string {
	t.Helper()
	tree, err := cgroups()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(tree.v1[controller], path, v1)
	if tree.unified != "" {
		file = filepath.Join(tree.unified, path, v2)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func TestLimits(t *testing.T) {
	r := newRuntime(t)
	p := pod("sleep 1000")
	res := corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("250m")},
		Limits:   corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("500m"), corev1.ResourceMemory: resource.MustParse("64Mi")},
	}
	p.Spec.Containers[0].Resources = res
	podRes := res.DeepCopy()
	podRes.Limits[corev1.ResourceMemory] = resource.MustParse("128Mi")
	if _, err := r.CreateSandbox(t.Context(), agent.SandboxConfig{Pod: p, Resources: *podRes}); err != nil {
		t.Fatal(err)
	}
	id := startContainer(t, r, containerConfig(p, 0, 0))
	group := r.podCgroup(p.UID)
	for path, memory := range map[string]string{group: "134217728", filepath.Join(group, id): "67108864"} {
		if got := cgroupFile(t, path, "memory", "memory.limit_in_bytes", "memory.max"); got != memory {
			t.Errorf("%s: memory limit %s, want %s", path, got, memory)
		}
		if got := cgroupFile(t, path, "cpu", "cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "50000") {
			t.Errorf("%s: cpu quota %s, want 50000", path, got)
		}
		if got := cgroupFile(t, path, "cpu", "cpu.shares", "cpu.weight"); got != "256" && got != "10" {
			t.Errorf("%s: cpu shares %s, want 256 (weight 10)", path, got)
		}
	}
	if got := cgroupFile(t, filepath.Join(group, id), "pids", "pids.max", "pids.max"); got != "4096" {
		t.Errorf("pids limit %s, want 4096", got)
	}
}

func TestOutOfMemory(t *testing.T) {
	r := newRuntime(t)
	p := pod("x=$(head -c 100000000 /dev/zero | cat - /dev/zero | dd bs=1M count=200 2>/dev/null | wc -c); a=aaaaaaaa; while true; do a=$a$a; done")
	p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("16Mi")}
	ids := start(t, r, p)
	if c := waitExit(t, r, ids[0]); !c.OOMKilled || c.ExitCode != 137 {
		t.Errorf("ended container: %+v, want OOMKilled with 137", c)
	}
}
