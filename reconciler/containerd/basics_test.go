package containerd

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"decree.dev/decree/reconciler/agent"
)

func goarch() string { return runtime.GOARCH }

// assertNothingLeft looks for mounts, cgroups, folders and processes of a Runtime.
func assertNothingLeft(t testing.TB, cfg Config) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, cfg.Dir) || strings.HasPrefix(m.Mountpoint, cfg.RunDir) || strings.Contains(m.Mountpoint, cfg.Namespace) {
			t.Errorf("mount left: %s", m.Mountpoint)
		}
	}
	tree, err := cgroups()
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range tree.roots {
		if _, err := os.Stat(filepath.Join(root, cfg.CgroupParent)); err == nil {
			t.Errorf("cgroup left: %s%s", root, cfg.CgroupParent)
		}
	}
	for _, dir := range []string{cfg.Dir, cfg.RunDir} {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("folder left: %s", dir)
		}
	}
	// A shim ends a moment after it was told to.
	await(t, "the end of all processes that name "+cfg.Namespace, func() bool {
		procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range procs {
			if line, err := os.ReadFile(p); err == nil && bytes.Contains(line, []byte(cfg.Namespace)) {
				return false
			}
		}
		return true
	})
}

func TestLifeOfAPod(t *testing.T) {
	r := newRuntime(t)
	p := pod("echo out; echo err >&2; exit 3", "sleep 1000")
	ids := start(t, r, p)
	c := waitExit(t, r, ids[0])
	if c.ExitCode != 3 || c.Name != "c0" || c.OOMKilled || c.Hash != "h" || c.Image != testImage || c.FinishedAt.Before(c.StartedAt) {
		t.Errorf("ended container: %+v", c)
	}
	got := logs(t, r, p, "c0", agent.LogOptions{TailLines: -1})
	if !strings.Contains(got, "out\n") || !strings.Contains(got, "err\n") || len(got) != 8 {
		t.Errorf("logs: %q", got)
	}
	if c := find(t, r, ids[1]); c.State != agent.Running || c.Pid == 0 || c.StartedAt.IsZero() {
		t.Errorf("running container: %+v", c)
	}
	out, code := execOut(t, r, ids[1], "sh", "-c", "echo $FROM; hostname; exit 7")
	if want := "image\n" + p.Name + "\n"; out != want || code != 7 {
		t.Errorf("exec: %q, exit %d; want %q, exit 7", out, code, want)
	}
	if err := r.RemoveSandbox(t.Context(), p.UID); err == nil || errors.Is(err, agent.ErrNotFound) {
		t.Errorf("sandbox with containers was removed: %v", err)
	}
	for _, id := range ids {
		if err := r.RemoveContainer(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := r.RemoveContainer(t.Context(), id); !errors.Is(err, agent.ErrNotFound) {
			t.Errorf("second removal: %v", err)
		}
	}
	if got := logs(t, r, p, "c0", agent.LogOptions{TailLines: -1}); len(got) != 8 {
		t.Errorf("logs after the removal of the container: %q", got)
	}
	if err := r.RemoveSandbox(t.Context(), p.UID); err != nil {
		t.Fatal(err)
	}
	if all, err := r.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("left: %+v, %v", all, err)
	}
}
