package containerd

import (
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func resources(cpuRequest, cpuLimit, memoryRequest, memoryLimit string) corev1.ResourceRequirements {
	list := func(cpu, memory string) corev1.ResourceList {
		l := corev1.ResourceList{}
		if cpu != "" {
			l[corev1.ResourceCPU] = resource.MustParse(cpu)
		}
		if memory != "" {
			l[corev1.ResourceMemory] = resource.MustParse(memory)
		}
		return l
	}
	return corev1.ResourceRequirements{Requests: list(cpuRequest, memoryRequest), Limits: list(cpuLimit, memoryLimit)}
}

// TestUnifiedLayout looks at what is written where there is one hierarchy, on a
// folder that stands for it.
func TestUnifiedLayout(t *testing.T) {
	root := t.TempDir()
	tree := cgroupTree{unified: root, roots: []string{root}}
	if err := tree.create("/decree/podx", resources("1", "1500m", "", "64Mi")); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"cgroup.subtree_control":        "+cpu +memory +pids",
		"decree/cgroup.subtree_control": "+cpu +memory +pids",
		"decree/podx/cpu.weight":        "39",
		"decree/podx/cpu.max":           "150000 100000",
		"decree/podx/memory.max":        "67108864",
	} {
		if got, err := os.ReadFile(filepath.Join(root, file)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", file, got, err, want)
		}
	}
}

func TestCPUAndMemory(t *testing.T) {
	for _, test := range []struct {
		res           corev1.ResourceRequirements
		shares        uint64
		quota, memory int64
	}{
		{corev1.ResourceRequirements{}, 2, 0, 0},
		{resources("100m", "", "1Gi", ""), 102, 0, 0},
		{resources("", "2", "", "1Mi"), 2048, 200000, 1 << 20},
		{resources("1m", "1m", "", ""), 2, 1000, 0},
		{resources("1000", "", "", ""), 262144, 0, 0},
	} {
		if s, q, m := cpuShares(test.res), cpuQuota(test.res), memoryLimit(test.res); s != test.shares || q != test.quota || m != test.memory {
			t.Errorf("%+v: %d shares, quota %d, memory %d", test, s, q, m)
		}
	}
}

func TestOOMScore(t *testing.T) {
	for want, res := range map[int]corev1.ResourceRequirements{
		1000: {},
		-997: resources("1", "1", "64Mi", "64Mi"),
		999:  resources("1", "2", "", ""),
		3:    resources("", "", "1000Ti", ""),
	} {
		p := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Resources: res}}}}
		if got := oomScore(p, &p.Spec.Containers[0]); got != want {
			t.Errorf("%+v: %d, want %d", res, got, want)
		}
	}
}
