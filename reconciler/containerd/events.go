package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// reapTimeout bounds what is done for one ended container. containerd itself waits
// up to 10 s for output that a surviving grandchild still holds open.
const reapTimeout = 30 * time.Second

// watch follows containerd's events until ctx ends, and looks for itself after every
// connect: what happened meanwhile was sent to nobody.
func (r *Runtime) watch(ctx context.Context) {
	ctx = r.ns(ctx)
	delay := 20 * time.Millisecond
	for ctx.Err() == nil {
		sub, cancel := context.WithCancel(ctx)
		ch, errs := r.client.Subscribe(sub, "namespace=="+r.cfg.Namespace+",topic~=^/tasks/")
		if err := r.sweep(ctx); err == nil {
			delay = 20 * time.Millisecond
			r.signal()
			err = r.follow(ctx, ch, errs)
			if ctx.Err() == nil {
				r.log.Warn("connection to containerd was lost, connecting again", "address", r.cfg.Address, "error", err)
			}
		}
		cancel()
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
		delay = min(2*delay, time.Second)
	}
}

func (r *Runtime) follow(ctx context.Context, ch <-chan *events.Envelope, errs <-chan error) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-errs:
			return err
		case env := <-ch:
			r.handle(env)
		}
	}
}

func (r *Runtime) handle(env *events.Envelope) {
	if env == nil || env.Event == nil {
		return
	}
	switch {
	case env.Topic == "/tasks/exit":
		ev, err := typeurl.UnmarshalAny(env.Event)
		exit, ok := ev.(*apievents.TaskExit)
		if err != nil || !ok {
			r.log.Error("unreadable event of containerd", "topic", env.Topic, "error", err)
			return
		}
		if exit.ID == "" || exit.ID == exit.ContainerID {
			r.goReap(exit.ContainerID, exit)
		}
	case strings.HasPrefix(env.Topic, "/tasks/exec-"):
	default:
		r.signal()
	}
}

// sweep does what was missed while nobody watched: it reaps the containers that ended,
// writes down the end of those whose process is gone without a trace, and ends logs.
func (r *Runtime) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	resp, err := r.client.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	known := map[string]bool{}
	for _, t := range resp.Tasks {
		known[t.ID] = true
		if t.Status == tasktypes.Status_STOPPED {
			r.goReap(t.ID, nil)
		}
	}
	all, err := r.client.ContainerService().List(ctx, `labels."`+labelPodUID+`"`)
	if err != nil {
		return err
	}
	for _, c := range all {
		if !known[c.ID] {
			r.bury(ctx, c.ID)
		}
	}
	return nil
}

// bury completes a container that has begun and has no process any more.
func (r *Runtime) bury(ctx context.Context, id string) {
	c, err := r.client.ContainerService().Get(ctx, id)
	if err != nil {
		return // removed, or the next sweep's
	}
	m := metaOf(c.Labels)
	defer r.locks.lock(string(m.pod))()
	begun, _ := r.cfg.logPaths(m).started()
	if _, err := r.getTask(ctx, id); !begun || !errdefs.IsNotFound(err) || populated(r.containerCgroup(m.pod, id)) {
		return
	}
	gone := &tasktypes.Process{ExitStatus: lostExitCode, ExitedAt: timestamppb.Now()}
	if err := r.recordExit(ctx, c, m, gone); err != nil {
		r.log.Error("record the end of a lost container", "container", id, "error", err)
		return
	}
	if err := r.pumps.finish(m); err != nil {
		r.log.Error("finish log", "container", id, "error", err)
	}
}

// reapLater reaps a container that was found ended.
func (r *Runtime) reapLater(id string) { r.goReap(id, nil) }

// goReap reaps in the background and then tells the agent.
func (r *Runtime) goReap(id string, exit *apievents.TaskExit) {
	r.background(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(r.ns(ctx), reapTimeout)
		defer cancel()
		if err := r.reap(ctx, id, exit); err != nil && ctx.Err() == nil {
			r.log.Error("clear away ended container", "container", id, "error", err)
			if exit == nil {
				return // the next List tries again; a signal would make that a tight loop
			}
		}
		r.signal()
	})
}

// reap records how a container ended and deletes its task, which lets the shim go
// and makes sure that all output is in the files. exit is used when the task has
// gone already, because its shim died.
func (r *Runtime) reap(ctx context.Context, id string, exit *apievents.TaskExit) error {
	c, err := r.client.ContainerService().Get(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil // removed, or not a container of ours
	}
	if err != nil {
		return err
	}
	m := metaOf(c.Labels)
	if m.pod == "" {
		return nil
	}
	defer r.locks.lock(string(m.pod))()
	task, err := r.getTask(ctx, id)
	if errdefs.IsNotFound(err) {
		if exit == nil || m.exit != nil {
			return nil
		}
		task = &tasktypes.Process{Status: tasktypes.Status_STOPPED, ExitStatus: exit.ExitStatus, ExitedAt: exit.ExitedAt}
	} else if err != nil {
		return err
	}
	if task.Status != tasktypes.Status_STOPPED {
		return nil
	}
	if err := r.recordExit(ctx, c, m, task); err != nil {
		return fmt.Errorf("record exit: %w", err)
	}
	_, err = r.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete task: %w", err)
	}
	return r.pumps.finish(m)
}

func (r *Runtime) recordExit(ctx context.Context, c containers.Container, m meta, task *tasktypes.Process) error {
	if m.exit != nil {
		return nil
	}
	_, startedAt := r.cfg.logPaths(m).started()
	data, err := json.Marshal(exitRecord{
		Code: int32(task.ExitStatus), At: task.ExitedAt.AsTime(), StartedAt: startedAt,
		OOM: task.ExitStatus != 0 && oomKills(r.containerCgroup(m.pod, c.ID)) > 0,
	})
	if err != nil {
		return err
	}
	_, err = r.client.ContainerService().Update(ctx, containers.Container{ID: c.ID, Labels: map[string]string{labelExit: string(data)}}, "labels."+labelExit)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
