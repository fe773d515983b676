package containerd

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// leakShim starts a process that looks like a shim of r for a pod, as containerd
// leaves one behind when its client dies while it deletes a task.
func leakShim(t *testing.T, r *Runtime, pod string) (ended <-chan error) {
	t.Helper()
	bundle := t.TempDir()
	config := fmt.Sprintf(`{"annotations":{%q:%q}}`, shimGroup, pod)
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh")
	cmd.Args = []string{"/usr/bin/containerd-shim-runc-v2", "-c", "read x", "sh", "-namespace", r.cfg.Namespace, "-address", r.cfg.Address}
	cmd.Dir = bundle
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() { stdin.Close() })
	return done
}

func TestLeakedShims(t *testing.T) {
	r := newRuntime(t)
	p := pod("sleep 1000")
	ids := start(t, r, p)
	ended := leakShim(t, r, "removed-pod")
	own := leakShim(t, r, string(p.UID))
	suspects := r.sweepOnce(nil)
	select {
	case <-ended:
		t.Error("a shim was ended at first sight: its pod may just be going")
	default:
	}
	r.sweepOnce(suspects)
	<-ended
	select {
	case <-own:
		t.Error("the shim of a pod with a sandbox was ended")
	default:
	}
	if out, code := execOut(t, r, ids[0], "echo", "hi"); out != "hi\n" || code != 0 {
		t.Errorf("a container of another shim after the sweep: %q, %d", out, code)
	}
	if err := r.Purge(t.Context()); err != nil {
		t.Error(err)
	}
	<-own
}
