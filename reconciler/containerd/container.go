package containerd

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	apitypes "github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
)

const (
	runcRuntime = "io.containerd.runc.v2"
	// shimGroup is the annotation that makes the shim of runc serve all containers
	// with the same value: one process for each pod instead of one per container.
	shimGroup = "io.containerd.runc.v2.group"
	// gcRoot keeps containerd's garbage collector from what has this label, so that
	// no lease is needed between making a snapshot and its container.
	gcRoot = "containerd.io/gc.root"

	killTimeout = 10 * time.Second
)

// containerID names a container; the same attempt always gets the same name, so
// that a repeated create finds the first one.
func containerID(pod types.UID, name string, attempt int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%d", pod, name, attempt))
	return strings.TrimRight(name[:min(len(name), 40)], "-.") + "-" + hex.EncodeToString(sum[:10])
}

func randomID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// CreateContainer implements agent.Runtime.
func (r *Runtime) CreateContainer(ctx context.Context, cfg agent.ContainerConfig) (string, error) {
	ctx = r.ns(ctx)
	id := containerID(cfg.Pod.UID, cfg.Container.Name, cfg.Attempt)
	if err := r.createContainer(ctx, id, cfg); err != nil {
		return "", fmt.Errorf("create container %s of pod %s/%s: %w", cfg.Container.Name, cfg.Pod.Namespace, cfg.Pod.Name, err)
	}
	return id, nil
}

func (r *Runtime) createContainer(ctx context.Context, id string, cfg agent.ContainerConfig) error {
	if err := checkUID(cfg.Pod.UID); err != nil {
		return err
	}
	defer r.locks.lock(string(cfg.Pod.UID))()
	rec, err := r.readRecord(cfg.Pod.UID)
	if err != nil {
		return err
	}
	if !r.alive(rec) {
		return fmt.Errorf("the sandbox has lost its namespaces: %w", agent.ErrNotFound)
	}
	image := cfg.ImageRef
	if image == "" {
		image = cfg.Container.Image
	}
	ref, err := parseImage(image)
	if err != nil {
		return err
	}
	img, err := r.image(ctx, ref)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w: %s is not on this node: pull it first", agent.ErrImageNotFound, ref)
	}
	if err != nil {
		return err
	}
	spec, err := r.spec(ctx, id, cfg, rec, img)
	if err != nil {
		return err
	}
	any, err := typeurl.MarshalAny(spec)
	if err != nil {
		return err
	}
	name, err := r.snapshotter(ctx)
	if err != nil {
		return err
	}
	labels := containerLabels(cfg)
	if err := r.prepareSnapshot(ctx, name, id, img, labels); err != nil {
		return err
	}
	_, err = r.client.ContainerService().Create(ctx, containers.Container{
		ID: id, Labels: labels, Image: img.Name, Spec: any,
		Runtime:     containers.RuntimeInfo{Name: runcRuntime},
		Snapshotter: name, SnapshotKey: id,
	})
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return errors.Join(err, r.removeSnapshot(context.WithoutCancel(ctx), name, id))
	}
	return nil
}

func (r *Runtime) prepareSnapshot(ctx context.Context, snapshotter, id string, img *imageInfo, labels map[string]string) error {
	_, err := r.client.SnapshotService(snapshotter).Prepare(ctx, id, img.ChainID,
		snapshots.WithLabels(map[string]string{gcRoot: id, labelPodUID: labels[labelPodUID]}))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if errdefs.IsNotFound(err) {
		r.images.drop(img.Digest) // removed behind our back
		return fmt.Errorf("%w: image %s is not unpacked any more: pull it again", agent.ErrImageNotFound, img.Name)
	}
	return err
}

func (r *Runtime) removeSnapshot(ctx context.Context, snapshotter, key string) error {
	err := r.client.SnapshotService(snapshotter).Remove(ctx, key)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	return nil
}

// StartContainer implements agent.Runtime.
func (r *Runtime) StartContainer(ctx context.Context, id string) error {
	ctx = r.ns(ctx)
	c, err := r.getContainer(ctx, id)
	if err != nil {
		return fmt.Errorf("start container %s: %w", id, err)
	}
	m := metaOf(c.Labels)
	// One at a time within a pod: its containers share a shim, and a shim that ends
	// with its last container must not be given a new one.
	defer r.locks.lock(string(m.pod))()
	if err := r.startContainer(ctx, c, m); err != nil {
		return fmt.Errorf("start container %s of pod %s/%s: %w", m.name, m.podNamespace, m.podName, err)
	}
	return nil
}

func (r *Runtime) startContainer(ctx context.Context, c containers.Container, m meta) error {
	if m.exit != nil {
		return errors.New("it has already run: create its next attempt")
	}
	task, err := r.getTask(ctx, c.ID)
	if err == nil && task.Status != tasktypes.Status_CREATED {
		return nil
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err != nil {
		if begun, _ := r.cfg.logPaths(m).started(); begun {
			return errors.New("it has already run, and its end was not seen: create its next attempt")
		}
		if err := r.createTask(ctx, c, m); err != nil {
			return cleanStartError(err)
		}
	}
	at := time.Now() // not after: a short program ends before the answer comes
	if _, err := r.client.TaskService().Start(ctx, &tasks.StartRequest{ContainerID: c.ID}); err != nil {
		clean := context.WithoutCancel(ctx)
		if t, getErr := r.getTask(clean, c.ID); getErr == nil && t.Status == tasktypes.Status_CREATED {
			_, _ = r.client.TaskService().Delete(clean, &tasks.DeleteTaskRequest{ContainerID: c.ID})
			r.pumps.abandon(m)
		}
		return cleanStartError(errgrpc.ToNative(err))
	}
	return r.pumps.started(m, at)
}

// createTask makes the process of a container, not yet running its program.
func (r *Runtime) createTask(ctx context.Context, c containers.Container, m meta) error {
	mounts, err := r.client.SnapshotService(c.Snapshotter).Mounts(ctx, c.SnapshotKey)
	if err != nil {
		return fmt.Errorf("mounts of snapshot: %w", err)
	}
	io, err := r.pumps.prepare(m)
	if err != nil {
		return fmt.Errorf("prepare logs: %w", err)
	}
	req := &tasks.CreateTaskRequest{
		ContainerID: c.ID, Rootfs: protoMounts(mounts),
		Stdin: io.stdin, Stdout: io.stdout, Stderr: io.stderr, Terminal: m.tty,
	}
	if _, err := r.client.TaskService().Create(ctx, req); err != nil {
		if _, getErr := r.getTask(context.WithoutCancel(ctx), c.ID); errdefs.IsNotFound(getErr) {
			r.pumps.abandon(m)
		}
		return errgrpc.ToNative(err)
	}
	return nil
}

// cleanStartError keeps the words of runc that say what is wrong with the container.
func cleanStartError(err error) error {
	text := err.Error()
	for _, mark := range []string{"executable file not found", "no such file or directory", "permission denied", "exec format error", "not a directory", "is a directory"} {
		if strings.Contains(text, "OCI runtime") && strings.Contains(text, mark) {
			return fmt.Errorf("%w: %w", agent.ErrInvalidContainer, err)
		}
	}
	return err
}

func protoMounts(mounts []mount.Mount) []*apitypes.Mount {
	out := make([]*apitypes.Mount, len(mounts))
	for i, m := range mounts {
		out[i] = &apitypes.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	}
	return out
}

// SignalContainer implements agent.Runtime. A container that has ended counts as
// signalled.
func (r *Runtime) SignalContainer(ctx context.Context, id string, signal int) error {
	ctx = r.ns(ctx)
	if _, err := r.getContainer(ctx, id); err != nil {
		return fmt.Errorf("signal container %s: %w", id, err)
	}
	if err := r.kill(ctx, id, signal, false); err != nil {
		return fmt.Errorf("signal container %s: %w", id, err)
	}
	return nil
}

func (r *Runtime) kill(ctx context.Context, id string, signal int, all bool) error {
	_, err := r.client.TaskService().Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: uint32(signal), All: all})
	if err = errgrpc.ToNative(err); err == nil || errdefs.IsNotFound(err) {
		return nil
	}
	// It may have ended meanwhile, with its shim; containerd has many words for that.
	task, getErr := r.getTask(ctx, id)
	if errdefs.IsNotFound(getErr) || getErr == nil && task.Status == tasktypes.Status_STOPPED {
		return nil
	}
	return err
}

// RemoveContainer implements agent.Runtime.
func (r *Runtime) RemoveContainer(ctx context.Context, id string) error {
	ctx = r.ns(ctx)
	c, err := r.getContainer(ctx, id)
	if err != nil {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	m := metaOf(c.Labels)
	defer r.locks.lock(string(m.pod))()
	if err := r.removeContainer(ctx, c, m); err != nil {
		return fmt.Errorf("remove container %s of pod %s/%s: %w", m.name, m.podNamespace, m.podName, err)
	}
	return nil
}

// removeContainer removes task, snapshot and record, the record last: what a crash
// leaves is found by it.
func (r *Runtime) removeContainer(ctx context.Context, c containers.Container, m meta) error {
	if err := r.removeTask(ctx, c.ID); err != nil {
		return err
	}
	// Nothing when the task was deleted; what is left after the death of a shim
	// otherwise.
	if err := removeCgroup(r.containerCgroup(m.pod, c.ID)); err != nil {
		return err
	}
	if err := r.pumps.finish(m); err != nil {
		// As with a full disk, which the removal may mend.
		r.log.Error("the end of a container's log is lost", "container", c.ID, "error", err)
		r.pumps.abandonRaw(m)
	}
	if err := r.removeSnapshot(ctx, c.Snapshotter, c.SnapshotKey); err != nil {
		return err
	}
	err := r.client.ContainerService().Delete(ctx, c.ID)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// removeTask kills a task, waits for its end and deletes it.
func (r *Runtime) removeTask(ctx context.Context, id string) error {
	task, err := r.getTask(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if task.Status != tasktypes.Status_STOPPED {
		if err := r.kill(ctx, id, int(unix.SIGKILL), true); err != nil {
			return fmt.Errorf("kill: %w", err)
		}
		if task.Status != tasktypes.Status_CREATED {
			waitCtx, cancel := context.WithTimeout(ctx, killTimeout)
			defer cancel()
			_, err := r.client.TaskService().Wait(waitCtx, &tasks.WaitRequest{ContainerID: id})
			if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("wait for its end after SIGKILL: %w", err)
			}
		}
	}
	_, err = r.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete task: %w", err)
	}
	return nil
}

func (r *Runtime) getContainer(ctx context.Context, id string) (containers.Container, error) {
	c, err := r.client.ContainerService().Get(ctx, id)
	if errdefs.IsNotFound(err) {
		return c, fmt.Errorf("container %s: %w", id, agent.ErrNotFound)
	}
	return c, err
}

// getTask returns the process of a container; errdefs.ErrNotFound when it has none.
func (r *Runtime) getTask(ctx context.Context, id string) (*tasktypes.Process, error) {
	resp, err := r.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	return resp.Process, nil
}

// readTime reads a file that holds one time.
func readTime(path string) time.Time {
	data, err := os.ReadFile(path)
	if err != nil {
		return time.Time{}
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}
