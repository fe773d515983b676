package containerd

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"decree.dev/decree/reconciler/agent"
)

func TestKilledProcess(t *testing.T) {
	r := newRuntime(t)
	ids := start(t, r, pod("sleep 1000"))
	if err := syscall.Kill(int(find(t, r, ids[0]).Pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if c := waitExit(t, r, ids[0]); c.ExitCode != 137 || c.OOMKilled {
		t.Errorf("killed container: %+v", c)
	}
}

// TestRuntimeRestart starts a container, goes away while it writes and another ends,
// and comes back.
func TestRuntimeRestart(t *testing.T) {
	r := newRuntime(t)
	gate := t.TempDir()
	wait := "while ! test -e /gate/go; do sleep 0.01; done; "
	p := pod(wait+"for i in $(seq 1 2000); do echo line $i; done; echo end >/gate/done; sleep 1000", wait+"echo last words; exit 5")
	createSandbox(t, r, p)
	var ids []string
	for i := range p.Spec.Containers {
		cfg := containerConfig(p, i, 0)
		cfg.Mounts = []agent.Mount{{HostPath: gate, ContainerPath: "/gate"}}
		ids = append(ids, startContainer(t, r, cfg))
	}
	before := find(t, r, ids[0])
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(gate, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of the output", func() bool { _, err := os.Stat(filepath.Join(gate, "done")); return err == nil })
	r = openRuntime(t, r.cfg)
	after := find(t, r, ids[0])
	if after != before {
		t.Errorf("before %+v\nafter  %+v", before, after)
	}
	if c := waitExit(t, r, ids[1]); c.ExitCode != 5 {
		t.Errorf("ended while nobody watched: %+v", c)
	}
	if got := logs(t, r, p, "c1", agent.LogOptions{TailLines: -1, Follow: true}); got != "last words\n" {
		t.Errorf("log of the ended: %q", got)
	}
	got := strings.Split(strings.TrimSpace(logs(t, r, p, "c0", agent.LogOptions{TailLines: -1})), "\n")
	if len(got) != 2000 || got[0] != "line 1" || got[1999] != "line 2000" {
		t.Errorf("%d lines, want 2000", len(got))
	}
}

// await polls for what gives no event.
func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 20*time.Second)
	defer cancel()
	for !cond() {
		select {
		case <-ctx.Done():
			t.Fatalf("%s did not come", what)
		case <-tick.C:
		}
	}
}

// ownDaemon starts a containerd for one test.
func ownDaemon(t *testing.T) *Supervisor {
	t.Helper()
	dir, err := os.MkdirTemp(daemon.dir, "own-")
	if err != nil {
		t.Fatal(err)
	}
	cfg := SupervisorConfig{Dir: filepath.Join(dir, "d"), RunDir: filepath.Join(dir, "r"), Logger: quiet()}
	sup, err := Supervise(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := sup.Stop(ctx); err != nil {
			t.Error(err)
		}
		if err := WipeContainerd(ctx, sup.cfg); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "*", "*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	ready(t, sup)
	return sup
}

func ready(t *testing.T, sup *Supervisor) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := sup.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestContainerdKilled(t *testing.T) {
	sup := ownDaemon(t)
	cfg := testConfig(t)
	cfg.Address = sup.Address()
	r := openRuntime(t, cfg)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.Purge(ctx); err != nil {
			t.Error(err)
		}
		r.Close()
		assertNothingLeft(t, cfg)
	})
	importBusybox(t, r)
	gate := t.TempDir()
	p := pod("echo alive; sleep 1000", "while ! test -e /gate/go; do sleep 0.01; done; exit 6")
	createSandbox(t, r, p)
	var ids []string
	for i := range p.Spec.Containers {
		cfg := containerConfig(p, i, 0)
		cfg.Mounts = []agent.Mount{{HostPath: gate, ContainerPath: "/gate"}}
		ids = append(ids, startContainer(t, r, cfg))
	}
	before := find(t, r, ids[0])
	old := sup.Pid()
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	neverExited(t, r, ids[1], before)
	if err := os.WriteFile(filepath.Join(gate, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	await(t, "another containerd", func() bool { pid := sup.Pid(); return pid != 0 && pid != old })
	ready(t, sup)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	if after := find(t, r, ids[0]); after != before {
		t.Errorf("before %+v\nafter  %+v", before, after)
	}
	// containerd 2 takes the shim of an ended container for a leaked one and drops
	// its exit code together with it.
	version, err := r.client.Version(r.ns(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	c, v1 := waitExit(t, r, ids[1]), strings.HasPrefix(strings.TrimPrefix(version.Version, "v"), "1.")
	if c.ExitCode != 6 && (v1 || c.ExitCode != lostExitCode) {
		t.Errorf("ended while containerd %s was down: %+v", version.Version, c)
	}
	if out, code := execOut(t, r, ids[0], "echo", "hi"); out != "hi\n" || code != 0 {
		t.Errorf("exec after the restart: %q, %d", out, code)
	}
}

// neverExited lists while containerd is down: an error or the truth, never an exit.
func neverExited(t *testing.T, r *Runtime, id string, other agent.Container) {
	t.Helper()
	for range 20 {
		all, err := r.List(t.Context())
		if err != nil {
			continue
		}
		for _, s := range all {
			for _, c := range s.Containers {
				if c.ID == other.ID && c != other || c.ID == id && c.State != agent.Running {
					t.Errorf("without containerd a container was reported as %+v", c)
				}
			}
		}
	}
}

func TestSupervisor(t *testing.T) {
	sup := ownDaemon(t)
	if _, err := Supervise(t.Context(), sup.cfg); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second supervisor: %v", err)
	}
	pid := sup.Pid()
	if err := sup.Close(); err != nil {
		t.Fatal(err)
	}
	if sid, err := getsid(pid); err != nil || sid != pid {
		t.Errorf("containerd %d is in session %d, %v; want its own", pid, sid, err)
	}
	again, err := Supervise(context.Background(), sup.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if again.Pid() != pid {
		t.Errorf("a new supervisor runs %d instead of adopting %d", again.Pid(), pid)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "another containerd", func() bool { p := again.Pid(); return p != 0 && p != pid })
	ready(t, again)
	if err := again.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pid, err := runningContainerd(sup.cfg); err != nil || pid != 0 {
		t.Errorf("after Stop: %d, %v", pid, err)
	}
	if err := StopContainerd(t.Context(), sup.cfg); err != nil {
		t.Errorf("second stop: %v", err)
	}
	sup.proc.cmd.Wait() // a child of this process; adopted in life, reaped here
}

func getsid(pid int) (int, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])[3]))
}

// TestLostSandbox removes the namespaces as a restart of the machine does.
func TestLostSandbox(t *testing.T) {
	r := newRuntime(t)
	p := pod("sleep 1000")
	box := createSandbox(t, r, p)
	if err := removeNamespaces(filepath.Dir(box.NetNS)); err != nil {
		t.Fatal(err)
	}
	all, err := r.List(t.Context())
	if err != nil || len(all) != 1 || !all[0].Lost {
		t.Fatalf("List: %+v, %v; want one lost sandbox", all, err)
	}
	if _, err := r.CreateContainer(t.Context(), containerConfig(p, 0, 0)); err == nil {
		t.Error("a container was made in a lost sandbox")
	}
	if box = createSandbox(t, r, p); box.Lost {
		t.Error("the new sandbox is lost")
	}
	startContainer(t, r, containerConfig(p, 0, 0))
}

// TestLostShim kills the shim: its containers end with it.
func TestLostShim(t *testing.T) {
	r := newRuntime(t)
	ids := start(t, r, pod("sleep 1000", "sleep 1000"))
	shims := shimsOf(t, r)
	if len(shims) != 1 {
		t.Fatalf("%d shims for a pod of two containers, want 1", len(shims))
	}
	if err := syscall.Kill(shims[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if c := waitExit(t, r, id); c.ExitCode == 0 {
			t.Errorf("container of a killed shim: %+v", c)
		}
		if err := r.RemoveContainer(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

// shimsOf returns the shims that serve a Runtime.
func shimsOf(t testing.TB, r *Runtime) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err == nil && bytes.Contains(line, []byte("shim-runc-v2\x00")) && bytes.Contains(line, []byte(r.cfg.Namespace)) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			pids = append(pids, pid)
		}
	}
	return pids
}
