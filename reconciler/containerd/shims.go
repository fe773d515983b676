package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// shimSweep is how often shims without a pod are looked for.
	shimSweep = 30 * time.Second
	// shimPatience is how long a shim may take to end after its last container.
	shimPatience = 2 * time.Second
)

// shim is a process that holds the containers of one pod.
type shim struct {
	pid int
	pod types.UID // "" when its folder is gone
}

// shims finds the shims of this containerd and namespace among all processes:
// containerd itself forgets a shim when a client dies while it deletes a task.
func (r *Runtime) shims() ([]shim, error) {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var found []shim
	for _, path := range procs {
		line, err := os.ReadFile(path)
		if err != nil || !r.isShim(bytes.Split(line, []byte{0})) {
			continue // it ended, or is another program
		}
		dir := filepath.Dir(path)
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		found = append(found, shim{pid, podOfBundle(filepath.Join(dir, "cwd", "config.json"))})
	}
	return found, nil
}

func (r *Runtime) isShim(args [][]byte) bool {
	option := func(name string) string {
		for i := 1; i+1 < len(args); i++ {
			if string(args[i]) == name {
				return string(args[i+1])
			}
		}
		return ""
	}
	return filepath.Base(string(args[0])) == "containerd-shim-runc-v2" &&
		option("-namespace") == r.cfg.Namespace && option("-address") == r.cfg.Address
}

// podOfBundle reads the pod from the OCI configuration of a shim's container.
func podOfBundle(path string) types.UID {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	var spec struct{ Annotations map[string]string }
	if json.Unmarshal(data, &spec) != nil {
		return ""
	}
	return types.UID(spec.Annotations[shimGroup])
}

// sweepShims ends shims whose pod has had no sandbox for two looks in a row.
func (r *Runtime) sweepShims(ctx context.Context) {
	tick := time.NewTicker(shimSweep)
	defer tick.Stop()
	suspects := map[shim]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		suspects = r.sweepOnce(suspects)
	}
}

// sweepOnce ends the suspects that are still there, and returns new ones.
func (r *Runtime) sweepOnce(suspects map[shim]bool) map[shim]bool {
	next := map[shim]bool{}
	found, err := r.shims()
	if err != nil {
		r.log.Error("look for shims without a pod", "error", err)
	}
	for _, s := range found {
		if s.pod == "" {
			continue
		}
		if _, err := os.Stat(r.recordPath(s.pod)); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		if !suspects[s] {
			next[s] = true
			continue
		}
		r.log.Warn("a shim was left of a removed pod, ending it", "pid", s.pid, "pod", s.pod)
		_ = unix.Kill(s.pid, unix.SIGKILL) // containerd clears up after it
	}
	return next
}

// purgeShims ends every shim that does not end by itself. There are no containers.
func (r *Runtime) purgeShims(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	kill := time.Now().Add(shimPatience)
	for {
		found, err := r.shims()
		if err != nil || len(found) == 0 {
			return err
		}
		if time.Now().After(kill) {
			for _, s := range found {
				_ = unix.Kill(s.pid, unix.SIGKILL)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("shim with pid %d does not end: %w", found[0].pid, ctx.Err())
		case <-tick.C:
		}
	}
}
