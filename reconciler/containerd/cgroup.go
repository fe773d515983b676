package containerd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	cfsPeriod = 100_000 // µs: the kernel's default
	minShares = 2
	minQuota  = 1_000 // µs: the kernel refuses less
)

// cgroupTree is the layout of control groups on this machine: one hierarchy (v2), or
// one for each controller (v1, also in hybrid mode).
type cgroupTree struct {
	unified string            // root of the v2 hierarchy that has the controllers; "" on v1
	roots   []string          // all hierarchies
	v1      map[string]string // controller to root
}

var cgroups = sync.OnceValues(func() (cgroupTree, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return cgroupTree{}, fmt.Errorf("list cgroup mounts: %w", err)
	}
	t := cgroupTree{v1: map[string]string{}}
	for _, m := range mounts {
		if m.Mountpoint != "/sys/fs/cgroup" && filepath.Dir(m.Mountpoint) != "/sys/fs/cgroup" {
			continue
		}
		t.roots = append(t.roots, m.Mountpoint)
		if m.FSType == "cgroup2" && m.Mountpoint == "/sys/fs/cgroup" {
			t.unified = m.Mountpoint
		}
		if m.FSType == "cgroup" {
			for _, opt := range strings.Split(m.VFSOptions, ",") {
				t.v1[opt] = m.Mountpoint
			}
		}
	}
	if len(t.roots) == 0 {
		return t, errors.New("no cgroup hierarchy is mounted below /sys/fs/cgroup")
	}
	return t, nil
})

func (r *Runtime) podCgroup(pod types.UID) string {
	return filepath.Join(r.cfg.CgroupParent, "pod"+string(pod))
}

func (r *Runtime) containerCgroup(pod types.UID, id string) string {
	return filepath.Join(r.podCgroup(pod), id)
}

// createPodCgroup makes the cgroup that holds a pod's containers and sets the
// limits of the whole pod.
func createPodCgroup(path string, res corev1.ResourceRequirements) error {
	tree, err := cgroups()
	if err != nil {
		return err
	}
	if err := tree.create(path, res); err != nil {
		return errors.Join(fmt.Errorf("make cgroup %s: %w", path, err), removeCgroup(path))
	}
	return nil
}

func (t cgroupTree) create(path string, res corev1.ResourceRequirements) error {
	shares, quota, memory := cpuShares(res), cpuQuota(res), memoryLimit(res)
	if t.unified != "" {
		dir := filepath.Join(t.unified, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := t.delegate(path); err != nil {
			return err
		}
		values := map[string]string{"cpu.weight": strconv.FormatUint(1+(shares-minShares)*9999/262142, 10)}
		if quota > 0 {
			values["cpu.max"] = fmt.Sprintf("%d %d", quota, cfsPeriod)
		}
		if memory > 0 {
			values["memory.max"] = strconv.FormatInt(memory, 10)
		}
		return writeValues(dir, values)
	}
	values := map[string]map[string]string{"cpu": {"cpu.shares": strconv.FormatUint(shares, 10)}, "memory": {}, "pids": {}}
	if quota > 0 {
		values["cpu"]["cpu.cfs_period_us"] = strconv.Itoa(cfsPeriod)
		values["cpu"]["cpu.cfs_quota_us"] = strconv.FormatInt(quota, 10)
	}
	if memory > 0 {
		values["memory"]["memory.limit_in_bytes"] = strconv.FormatInt(memory, 10)
	}
	for controller, vs := range values {
		root, ok := t.v1[controller]
		if !ok {
			if len(vs) > 0 {
				return fmt.Errorf("the cgroup controller %q is not mounted", controller)
			}
			continue
		}
		dir := filepath.Join(root, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := writeValues(dir, vs); err != nil {
			return err
		}
	}
	return nil
}

// delegate switches the controllers on from the root down to path.
func (t cgroupTree) delegate(path string) error {
	dir := t.unified
	for _, part := range strings.Split(strings.Trim(path, "/"), "/") {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +memory +pids"), 0); err != nil {
			return fmt.Errorf("switch controllers on: %w", err)
		}
		dir = filepath.Join(dir, part)
	}
	return nil
}

func writeValues(dir string, values map[string]string) error {
	for name, value := range values {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
			return fmt.Errorf("set %s to %s: %w", name, value, err)
		}
	}
	return nil
}

// removeCgroup removes path from all hierarchies, with what is below and whatever
// process still runs there.
func removeCgroup(path string) error {
	tree, err := cgroups()
	if err != nil {
		return err
	}
	for _, root := range tree.roots {
		if err := removeTree(filepath.Join(root, path)); err != nil {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
	return nil
}

// removeTree removes a cgroup and those below it. Killed processes leave their
// group a moment after their end, so that a busy group is tried again for a while.
func removeTree(dir string) error {
	var err error
	for wait := time.Millisecond; wait < time.Second; wait *= 2 {
		if err = removeOnce(dir); err == nil || !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(wait)
	}
	return err
}

func removeOnce(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		killAll(dirs[i])
		if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// killAll kills the processes of a cgroup.
func killAll(dir string) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return
	}
	for _, field := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// populated reports whether processes run in a cgroup or below it.
func populated(path string) bool {
	tree, err := cgroups()
	if err != nil {
		return false
	}
	found := false
	for _, root := range tree.roots {
		_ = filepath.WalkDir(filepath.Join(root, path), func(dir string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if found = err == nil && len(data) > 0; found {
				return filepath.SkipAll
			}
			return nil
		})
		if found {
			return true
		}
	}
	return false
}

// oomKills returns how many processes the kernel killed in a cgroup for lack of
// memory.
func oomKills(path string) int {
	tree, err := cgroups()
	if err != nil {
		return 0
	}
	file := filepath.Join(tree.v1["memory"], path, "memory.oom_control")
	if tree.unified != "" {
		file = filepath.Join(tree.unified, path, "memory.events")
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(value))
			return n
		}
	}
	return 0
}

// cpuShares is the CPU weight of a request: 1024 for one CPU.
func cpuShares(res corev1.ResourceRequirements) uint64 {
	milli := res.Requests.Cpu().MilliValue()
	if milli == 0 {
		milli = res.Limits.Cpu().MilliValue()
	}
	return uint64(min(max(milli*1024/1000, minShares), 262144))
}

// cpuQuota is the CPU limit in µs per cfsPeriod; 0: none.
func cpuQuota(res corev1.ResourceRequirements) int64 {
	milli := res.Limits.Cpu().MilliValue()
	if milli == 0 {
		return 0
	}
	return max(milli*cfsPeriod/1000, minQuota)
}

// memoryLimit is the memory limit in bytes; 0: none.
func memoryLimit(res corev1.ResourceRequirements) int64 { return res.Limits.Memory().Value() }
