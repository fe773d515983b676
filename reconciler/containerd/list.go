package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
)

// The labels of a container are its whole description: after a restart nothing else
// is needed.
const (
	labelPodUID       = "decree.dev/pod-uid"
	labelPodNamespace = "decree.dev/pod-namespace"
	labelPodName      = "decree.dev/pod-name"
	labelContainer    = "decree.dev/container"
	labelAttempt      = "decree.dev/attempt"
	labelInit         = "decree.dev/init"
	labelHash         = "decree.dev/hash"
	labelImage        = "decree.dev/image"
	labelImageRef     = "decree.dev/image-ref"
	labelTTY          = "decree.dev/tty"
	labelStdin        = "decree.dev/stdin"
	labelExit         = "decree.dev/exit"
)

// lostExitCode is reported when a container ended unseen, with the machine or with
// its shim.
const lostExitCode = 255

// meta is what the labels say.
type meta struct {
	pod                         types.UID
	podNamespace, podName       string
	name, hash, image, imageRef string
	attempt                     int
	init, tty, stdin            bool
	exit                        *exitRecord
}

// exitRecord is kept in a label once a container has ended.
type exitRecord struct {
	Code      int32     `json:"code"`
	OOM       bool      `json:"oom,omitempty"`
	StartedAt time.Time `json:"startedAt"`
	At        time.Time `json:"at"`
}

func containerLabels(cfg agent.ContainerConfig) map[string]string {
	return map[string]string{
		labelPodUID: string(cfg.Pod.UID), labelPodNamespace: cfg.Pod.Namespace, labelPodName: cfg.Pod.Name,
		labelContainer: cfg.Container.Name, labelAttempt: strconv.Itoa(cfg.Attempt), labelInit: strconv.FormatBool(cfg.Init),
		labelHash: cfg.Hash, labelImage: cfg.Container.Image, labelImageRef: cfg.ImageRef,
		labelTTY: strconv.FormatBool(cfg.Container.TTY), labelStdin: strconv.FormatBool(cfg.Container.Stdin),
	}
}

func metaOf(labels map[string]string) meta {
	m := meta{
		pod: types.UID(labels[labelPodUID]), podNamespace: labels[labelPodNamespace], podName: labels[labelPodName],
		name: labels[labelContainer], hash: labels[labelHash], image: labels[labelImage], imageRef: labels[labelImageRef],
		init: labels[labelInit] == "true", tty: labels[labelTTY] == "true", stdin: labels[labelStdin] == "true",
	}
	m.attempt, _ = strconv.Atoi(labels[labelAttempt])
	if text := labels[labelExit]; text != "" {
		var exit exitRecord
		if json.Unmarshal([]byte(text), &exit) == nil {
			m.exit = &exit
		}
	}
	return m
}

// List implements agent.Runtime.
func (r *Runtime) List(ctx context.Context) ([]agent.Sandbox, error) {
	ctx = r.ns(ctx)
	recs, err := r.readRecords()
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	// Tasks before containers: a container that is removed in between is not listed
	// at all, instead of as one without a process.
	resp, err := r.client.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", errgrpc.ToNative(err))
	}
	running := map[string]*tasktypes.Process{}
	for _, t := range resp.Tasks {
		running[t.ID] = t
	}
	all, err := r.client.ContainerService().List(ctx, `labels."`+labelPodUID+`"`)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	pods := map[types.UID]*agent.Sandbox{}
	for _, rec := range recs {
		s := r.describe(rec)
		pods[rec.UID] = &s
	}
	for _, c := range all {
		m := metaOf(c.Labels)
		s := pods[m.pod]
		if s == nil {
			s = &agent.Sandbox{UID: m.pod, Namespace: m.podNamespace, Name: m.podName, CreatedAt: c.CreatedAt, Lost: true}
			pods[m.pod] = s
		}
		one, err := r.observe(ctx, c, m, running[c.ID])
		if err != nil {
			return nil, fmt.Errorf("state of container %s: %w", c.ID, err)
		}
		s.Containers = append(s.Containers, one)
	}
	return sorted(pods), nil
}

func sorted(pods map[types.UID]*agent.Sandbox) []agent.Sandbox {
	out := make([]agent.Sandbox, 0, len(pods))
	for _, s := range pods {
		slices.SortFunc(s.Containers, func(a, b agent.Container) int {
			if a.Name != b.Name {
				return strings.Compare(a.Name, b.Name)
			}
			return a.Attempt - b.Attempt
		})
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b agent.Sandbox) int { return strings.Compare(string(a.UID), string(b.UID)) })
	return out
}

// observe puts the state of one container together from its labels, its task and
// the traces of its start.
func (r *Runtime) observe(ctx context.Context, c containers.Container, m meta, task *tasktypes.Process) (agent.Container, error) {
	traces := r.tracesOf(m)
	if task != nil || m.exit != nil || !traces.begun {
		// With these traces, not with those of a moment later: a start that begins now
		// would look like one whose process is gone.
		return r.compose(c, m, task, traces), nil
	}
	// Begun, and no process is listed: it is being started or reaped just now, or
	// containerd left it out because its shim did not answer in time, or it is lost.
	unlock, ok := r.locks.tryLock(string(m.pod))
	if !ok {
		// The end is not written down yet; a later event tells of it.
		busy := &tasktypes.Process{Status: tasktypes.Status_CREATED}
		if !readTime(r.cfg.logPaths(m).marker()).IsZero() {
			busy.Status = tasktypes.Status_RUNNING
		}
		return r.compose(c, m, busy, traces), nil
	}
	defer unlock()
	fresh, err := r.client.ContainerService().Get(ctx, c.ID)
	if err != nil && !errdefs.IsNotFound(err) {
		return agent.Container{}, err
	}
	if err == nil {
		c, m = fresh, metaOf(fresh.Labels)
	}
	// Only a plain "not found" counts as an end.
	if task, err = r.getTask(ctx, c.ID); err != nil && !errdefs.IsNotFound(err) {
		return agent.Container{}, err
	}
	return r.compose(c, m, task, r.tracesOf(m)), nil
}

// traces are what a start leaves on disk.
type traces struct {
	begun bool
	at    time.Time // zero: begun, but the program was not yet started
}

func (r *Runtime) tracesOf(m meta) traces {
	begun, at := r.cfg.logPaths(m).started()
	return traces{begun, at}
}

// compose says what labels, task and traces amount to.
func (r *Runtime) compose(c containers.Container, m meta, task *tasktypes.Process, t traces) agent.Container {
	out := agent.Container{
		ID: c.ID, Name: m.name, Attempt: m.attempt, Init: m.init, State: agent.Created,
		Image: m.image, ImageRef: m.imageRef, CreatedAt: c.CreatedAt, Hash: m.hash,
	}
	if m.exit != nil {
		out.State, out.ExitCode, out.OOMKilled = agent.Exited, m.exit.Code, m.exit.OOM
		out.StartedAt, out.FinishedAt = m.exit.StartedAt, m.exit.At
		return out
	}
	switch {
	case task == nil && !t.begun, task != nil && task.Status == tasktypes.Status_CREATED:
		return out
	case task == nil && populated(r.containerCgroup(m.pod, c.ID)):
		// Its shim has died, and containerd has not yet killed what it left behind.
		out.State = agent.Running
	case task == nil:
		out.State, out.ExitCode = agent.Exited, lostExitCode
	case task.Status == tasktypes.Status_STOPPED:
		out.State, out.ExitCode, out.FinishedAt = agent.Exited, int32(task.ExitStatus), task.ExitedAt.AsTime()
		out.OOMKilled = task.ExitStatus != 0 && oomKills(r.containerCgroup(m.pod, c.ID)) > 0
		r.reapLater(c.ID)
	default:
		out.State, out.Pid = agent.Running, task.Pid
	}
	out.StartedAt = t.at
	return out
}

// containersOf lists the containers of a pod.
func (r *Runtime) containersOf(ctx context.Context, pod types.UID) ([]containers.Container, error) {
	return r.client.ContainerService().List(r.ns(ctx), fmt.Sprintf("labels.%q==%q", labelPodUID, pod))
}
