package containerd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
)

// shimSockets is where shims listen, named by containerd's address, its namespace and
// the pod.
const shimSockets = "/run/containerd/s"

// sandboxRecord is what must be known of a sandbox after a restart; containerd has
// no place for a pod without containers. It is a JSON file named after the pod.
type sandboxRecord struct {
	UID       types.UID `json:"uid"`
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	Hostname  string    `json:"hostname"`
	HostNet   bool      `json:"hostNet,omitempty"`
	HostIPC   bool      `json:"hostIPC,omitempty"`
	Boot      string    `json:"boot"` // the boot whose namespaces these are
	CreatedAt time.Time `json:"createdAt"`
}

func (r *Runtime) recordPath(pod types.UID) string {
	return filepath.Join(r.cfg.sandboxDir(), string(pod)+".json")
}

func (r *Runtime) nsPath(pod types.UID, kind string) string {
	return filepath.Join(r.cfg.nsDir(), string(pod), kind)
}

// checkUID refuses a pod UID that could leave our folders or cgroup.
func checkUID(uid types.UID) error {
	s := string(uid)
	if s == "" || len(s) > 128 || s[0] == '.' || strings.ContainsAny(s, "/\\\x00 \n") {
		return fmt.Errorf("pod uid %q is not usable as a file name", s)
	}
	return nil
}

// CreateSandbox implements agent.Runtime. A sandbox that lost its namespaces to a
// restart of the machine is made anew under the same UID.
func (r *Runtime) CreateSandbox(ctx context.Context, cfg agent.SandboxConfig) (agent.Sandbox, error) {
	pod := cfg.Pod
	fail := func(err error) (agent.Sandbox, error) {
		return agent.Sandbox{}, fmt.Errorf("create sandbox of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if err := checkUID(pod.UID); err != nil {
		return fail(err)
	}
	if pod.Spec.ShareProcessNamespace != nil && *pod.Spec.ShareProcessNamespace {
		return fail(errors.New("spec.shareProcessNamespace is not supported: a sandbox has no process to hold a shared namespace"))
	}
	defer r.locks.lock(string(pod.UID))()
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	rec, err := r.readRecord(pod.UID)
	if err == nil && r.alive(rec) {
		return r.describe(rec), nil
	}
	if err != nil && !errors.Is(err, agent.ErrNotFound) {
		return fail(err)
	}
	rec = sandboxRecord{
		UID: pod.UID, Namespace: pod.Namespace, Name: pod.Name, Hostname: cfg.Hostname,
		HostNet: cfg.HostNet, HostIPC: pod.Spec.HostIPC, Boot: bootID(), CreatedAt: time.Now().UTC(),
	}
	sysctls, err := podSysctls(pod)
	if err != nil {
		return fail(err)
	}
	// The record comes first: what is half made is found and removed by it.
	if err := r.writeRecord(rec); err != nil {
		return fail(err)
	}
	if err := createPodCgroup(r.podCgroup(pod.UID), cfg.Resources); err != nil {
		return fail(err)
	}
	if err := r.makeNamespaces(rec, sysctls); err != nil {
		return fail(err)
	}
	return r.describe(rec), nil
}

// RemoveSandbox implements agent.Runtime. It also removes the logs of the pod.
func (r *Runtime) RemoveSandbox(ctx context.Context, pod types.UID) error {
	if err := checkUID(pod); err != nil {
		return err
	}
	defer r.locks.lock(string(pod))()
	if _, err := r.readRecord(pod); err != nil {
		return fmt.Errorf("remove sandbox of pod %s: %w", pod, err)
	}
	left, err := r.containersOf(ctx, pod)
	if err != nil {
		return fmt.Errorf("remove sandbox of pod %s: %w", pod, err)
	}
	if len(left) > 0 {
		return fmt.Errorf("remove sandbox of pod %s: container %s must be removed first", pod, left[0].ID)
	}
	if err := r.dropSandbox(pod); err != nil {
		return fmt.Errorf("remove sandbox of pod %s: %w", pod, err)
	}
	return nil
}

// dropSandbox removes all that a sandbox may have left, the record last.
func (r *Runtime) dropSandbox(pod types.UID) error {
	r.pumps.drop(pod)
	if err := removeNamespaces(filepath.Join(r.cfg.nsDir(), string(pod))); err != nil {
		return err
	}
	if err := removeCgroup(r.podCgroup(pod)); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(r.cfg.logDir(), string(pod))); err != nil {
		return err
	}
	// The socket of the pod's shim, which a killed one leaves behind.
	sum := sha256.Sum256([]byte(filepath.Join(r.cfg.Address, r.cfg.Namespace, string(pod))))
	os.Remove(filepath.Join(shimSockets, hex.EncodeToString(sum[:])))
	return os.Remove(r.recordPath(pod))
}

func (r *Runtime) writeRecord(rec sandboxRecord) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return writeFileAtomic(r.recordPath(rec.UID), data, 0o600)
}

func (r *Runtime) readRecord(pod types.UID) (sandboxRecord, error) {
	var rec sandboxRecord
	data, err := os.ReadFile(r.recordPath(pod))
	if errors.Is(err, os.ErrNotExist) {
		return rec, fmt.Errorf("sandbox of pod %s: %w", pod, agent.ErrNotFound)
	}
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(data, &rec); err != nil {
		return rec, fmt.Errorf("sandbox record %s: %w", r.recordPath(pod), err)
	}
	return rec, nil
}

// readRecords returns every sandbox on disk. One that cannot be read is reported
// and left out: it must not hide the others.
func (r *Runtime) readRecords() ([]sandboxRecord, error) {
	entries, err := os.ReadDir(r.cfg.sandboxDir())
	if err != nil {
		return nil, err
	}
	var recs []sandboxRecord
	for _, e := range entries {
		uid, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		rec, err := r.readRecord(types.UID(uid))
		if errors.Is(err, agent.ErrNotFound) {
			continue
		}
		if err != nil {
			r.log.Error("unreadable sandbox record", "pod", uid, "error", err)
			rec = sandboxRecord{UID: types.UID(uid)}
		}
		recs = append(recs, rec)
	}
	return recs, nil
}

// alive reports whether the namespaces of a sandbox still exist.
func (r *Runtime) alive(rec sandboxRecord) bool {
	if rec.Boot != bootID() {
		return false
	}
	for _, kind := range rec.namespaces() {
		if !isNamespace(r.nsPath(rec.UID, kind)) {
			return false
		}
	}
	return true
}

// namespaces lists the kinds of namespace that the sandbox has of its own. With the
// host's network goes the host's name.
func (rec sandboxRecord) namespaces() []string {
	var kinds []string
	if !rec.HostNet {
		kinds = append(kinds, "net", "uts")
	}
	if !rec.HostIPC {
		kinds = append(kinds, "ipc")
	}
	return kinds
}

func (r *Runtime) describe(rec sandboxRecord) agent.Sandbox {
	s := agent.Sandbox{UID: rec.UID, Namespace: rec.Namespace, Name: rec.Name, CreatedAt: rec.CreatedAt, Lost: !r.alive(rec)}
	if !rec.HostNet {
		s.NetNS = r.nsPath(rec.UID, "net")
	}
	return s
}
