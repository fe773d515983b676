package containerd

import (
	"fmt"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent"
)

// TestChurn restarts short containers of one pod as fast as it can: its shim ends
// with every last container, and a start must never meet one that is ending.
func TestChurn(t *testing.T) {
	r := newRuntime(t)
	p := pod("exit 3")
	createSandbox(t, r, p)
	for attempt := range 25 {
		id := startContainer(t, r, containerConfig(p, 0, attempt))
		if c := waitExit(t, r, id); c.ExitCode != 3 {
			t.Fatalf("attempt %d: %+v", attempt, c)
		}
		if attempt%2 == 0 {
			if err := r.RemoveContainer(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestListWhileStarting lists all the time while containers start: none of them may
// look as if it had ended.
func TestListWhileStarting(t *testing.T) {
	r := newRuntime(t)
	p := pod("sleep 1000", "sleep 1000", "sleep 1000", "sleep 1000", "sleep 1000", "sleep 1000")
	createSandbox(t, r, p)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range p.Spec.Containers {
			id, err := r.CreateContainer(t.Context(), containerConfig(p, i, 0))
			if err == nil {
				err = r.StartContainer(t.Context(), id)
			}
			if err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		all, err := r.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all[0].Containers {
			if c.State == agent.Exited {
				t.Fatalf("while it was being started: %+v", c)
			}
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

// TestManyPods starts pods at once and expects the whole log of each.
func TestManyPods(t *testing.T) {
	r := newRuntime(t)
	var pods []*corev1.Pod
	for i := range 12 {
		pods = append(pods, pod(fmt.Sprintf("echo pod %d; exit %d", i, i), fmt.Sprintf("echo second of %d", i)))
	}
	var wg sync.WaitGroup
	for _, p := range pods {
		wg.Go(func() {
			if _, err := r.CreateSandbox(t.Context(), agent.SandboxConfig{Pod: p, Hostname: p.Name}); err != nil {
				t.Error(err)
				return
			}
			for i := range p.Spec.Containers {
				id, err := r.CreateContainer(t.Context(), containerConfig(p, i, 0))
				if err == nil {
					err = r.StartContainer(t.Context(), id)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for i, p := range pods {
		for j, want := range []string{fmt.Sprintf("pod %d\n", i), fmt.Sprintf("second of %d\n", i)} {
			if got := logs(t, r, p, fmt.Sprintf("c%d", j), agent.LogOptions{TailLines: -1, Follow: true}); got != want {
				t.Errorf("log: %q, want %q", got, want)
			}
		}
		if c := waitExit(t, r, containerID(p.UID, "c0", 0)); int(c.ExitCode) != i {
			t.Errorf("pod %d: %+v", i, c)
		}
	}
}
