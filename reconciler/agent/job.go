package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent/podenv"
	"decree.dev/decree/reconciler/agent/volume"
	"decree.dev/decree/schemas/api"
)

// Bounds of steps that have none of their own.
const (
	quickTimeout = 30 * time.Second // sandbox, network, signals, removal
	startTimeout = 2 * time.Minute
	pullTimeout  = 15 * time.Minute
	hookTimeout  = 10 * time.Minute // a post-start hook
	// pullingAfter is when a pull is worth an event: looking at a present image is
	// faster.
	pullingAfter = 300 * time.Millisecond
)

// job is one step with everything it needs, so that it can run beside the worker.
type job struct {
	agent *Agent
	step  Step
	pod   *corev1.Pod
	view  api.Reader
	ips   []netip.Addr
	netns string
	ref   string // of the image
	hash  string
	want  string // version of the volumes
}

func (w *worker) job(s Step) *job {
	j := &job{agent: w.agent, step: s, pod: w.in.pod, view: w.in.view, ips: w.local.IPs,
		ref: w.local.Images[s.Container].Ref, hash: w.local.Hashes[s.Container], want: w.local.VolumesWant}
	if j.view == nil {
		j.view = api.NewSnapshot(0)
	}
	if w.sandbox != nil {
		j.netns = w.sandbox.NetNS
	}
	return j
}

// do carries the step out. Its time is bounded; its result says what came of it.
func (j *job) do(ctx context.Context) stepResult {
	switch j.step.Action {
	case PullImage:
		return j.pull(ctx)
	case CreateSandbox:
		return j.createSandbox(ctx)
	case AttachNetwork:
		return j.attach(ctx)
	case SyncVolumes:
		return stepResult{version: j.want, err: j.configError(j.volumes().Sync())}
	case CreateContainer:
		return j.create(ctx)
	case StartContainer:
		return j.bounded(ctx, startTimeout, func(ctx context.Context) error {
			return j.agent.slot(ctx, func() error { return j.agent.cfg.Runtime.StartContainer(ctx, j.step.ID) })
		})
	case PostStart:
		return j.bounded(ctx, hookTimeout, func(ctx context.Context) error { return j.hook(ctx, true) })
	case PreStop:
		return j.bounded(ctx, j.step.Grace, func(ctx context.Context) error { return j.hook(ctx, false) })
	case Withdraw:
		return j.bounded(ctx, j.step.Grace, func(ctx context.Context) error { return j.agent.cfg.Network.Withdraw(ctx, j.pod.UID) })
	case Terminate:
		return j.signal(ctx, j.stopSignal())
	case Kill:
		return j.signal(ctx, unix.SIGKILL)
	}
	return j.bounded(ctx, quickTimeout, j.remove)
}

func (j *job) bounded(ctx context.Context, d time.Duration, f func(context.Context) error) stepResult {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return stepResult{err: f(ctx)}
}

// remove does the steps that take something away. What is gone already is fine.
func (j *job) remove(ctx context.Context) error {
	cfg := &j.agent.cfg
	switch j.step.Action {
	case RemoveContainer:
		return ignoreMissing(cfg.Runtime.RemoveContainer(ctx, j.step.ID))
	case DetachNetwork:
		if j.pod.Spec.HostNetwork {
			return nil
		}
		return ignoreMissing(cfg.Network.Detach(ctx, j.pod.UID, j.netns))
	case RemoveSandbox:
		return ignoreMissing(cfg.Runtime.RemoveSandbox(ctx, j.pod.UID))
	case Cleanup:
		return removeDir(cfg.Mounter, j.agent.podDir(j.pod.UID))
	case ReportGone:
		zero := int64(0)
		j.agent.report.put(api.Mutation{Verb: api.Delete, Key: api.KeyOf(j.pod), UID: j.pod.UID, Grace: &zero}, nil)
		return nil
	}
	return fmt.Errorf("unknown step %s", j.step)
}

func ignoreMissing(err error) error {
	if errors.Is(err, ErrNotFound) || errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func removeDir(m volume.Mounter, dir string) error { return volume.Remove(m, dir) }

// slot runs f when one of the places for starting is free.
func (a *Agent) slot(ctx context.Context, f func() error) error {
	select {
	case a.starts <- struct{}{}:
		defer func() { <-a.starts }()
		return f()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (j *job) createSandbox(ctx context.Context) stepResult {
	ctx, cancel := context.WithTimeout(ctx, quickTimeout)
	defer cancel()
	if err := writePod(j.agent.podDir(j.pod.UID), j.pod); err != nil {
		return stepResult{err: err}
	}
	var s Sandbox
	err := j.agent.slot(ctx, func() (err error) {
		s, err = j.agent.cfg.Runtime.CreateSandbox(ctx, SandboxConfig{Pod: j.pod, Hostname: j.hostname(),
			HostNet: j.pod.Spec.HostNetwork, Resources: podResources(j.pod)})
		return err
	})
	return stepResult{sandbox: &s, err: err}
}

func (j *job) attach(ctx context.Context) stepResult {
	if j.pod.Spec.HostNetwork {
		return stepResult{ips: j.agent.cfg.HostIPs}
	}
	ctx, cancel := context.WithTimeout(ctx, quickTimeout)
	defer cancel()
	ips, err := j.agent.cfg.Network.Attach(ctx, j.pod, j.netns)
	if err == nil && len(ips) == 0 {
		err = errors.New("the network gave the pod no address")
	}
	return stepResult{ips: ips, err: err}
}

func (j *job) pull(ctx context.Context) stepResult {
	c := containerSpec(j.pod, j.step.Container)
	r := stepResult{image: c.Image}
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	select {
	case j.agent.pulls <- struct{}{}:
		defer func() { <-j.agent.pulls }()
	case <-ctx.Done():
		r.err = context.Cause(ctx)
		return r
	}
	policy := pullPolicy(c)
	slow := time.AfterFunc(pullingAfter, func() {
		j.agent.events.pod(j.pod, c.Name, j.step.Init, false, "Pulling", fmt.Sprintf("Pulling image %q", c.Image))
	})
	defer slow.Stop()
	r.ref, r.err = j.agent.cfg.Runtime.PullImage(ctx, c.Image, policy, registryAuth(j.pod, j.view))
	return r
}

// pullPolicy fills in Kubernetes' default: Always for the tag latest or none.
func pullPolicy(c *corev1.Container) corev1.PullPolicy {
	if c.ImagePullPolicy != "" {
		return c.ImagePullPolicy
	}
	last := c.Image[strings.LastIndexByte(c.Image, '/')+1:]
	if _, tag, tagged := strings.Cut(last, ":"); !strings.Contains(last, "@") && (!tagged || tag == "latest") {
		return corev1.PullAlways
	}
	return corev1.PullIfNotPresent
}

func (j *job) create(ctx context.Context) stepResult {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	cfg, err := j.containerConfig()
	if err != nil {
		return stepResult{err: j.configError(err)}
	}
	r := stepResult{hash: j.hash, ref: j.ref}
	r.err = j.agent.slot(ctx, func() (err error) {
		r.id, err = j.agent.cfg.Runtime.CreateContainer(ctx, cfg)
		return err
	})
	return r
}

// configError marks errors about what the pod's author has to mend.
func (j *job) configError(err error) error {
	if err == nil {
		return nil
	}
	return &waitingError{reasonConfigError, err}
}

func (j *job) containerConfig() (ContainerConfig, error) {
	c := containerSpec(j.pod, j.step.Container)
	env, err := podenv.Env(j.env(c))
	if err != nil {
		return ContainerConfig{}, err
	}
	mounts, err := j.mounts(c, env)
	if err != nil {
		return ContainerConfig{}, err
	}
	// Only the variables that reach the container count in its arguments.
	command, args := podenv.Args(c, env)
	expanded := c.DeepCopy()
	expanded.Command, expanded.Args = command, args
	return ContainerConfig{
		Pod: j.pod, Container: expanded, Attempt: j.step.Attempt, Init: j.step.Init, ImageRef: j.ref,
		Hostname: j.hostname(), Env: env, Args: slices.Concat(command, args), Mounts: mounts, Hash: j.hash,
	}, nil
}

func (j *job) env(c *corev1.Container) podenv.Input {
	in := podenv.Input{Pod: j.pod, Container: c, Objects: j.view, Allocatable: j.agent.cfg.Capacity}
	for _, ip := range j.ips {
		in.PodIPs = append(in.PodIPs, ip.String())
	}
	for _, ip := range j.agent.cfg.HostIPs {
		in.HostIPs = append(in.HostIPs, ip.String())
	}
	if node, ok := api.Get[*corev1.Node](j.view, "", j.agent.cfg.Node); ok {
		in.Allocatable = node.Status.Allocatable
	}
	return in
}

func (j *job) volumes() *volume.Pod {
	c := &corev1.Container{}
	if len(j.pod.Spec.Containers) > 0 {
		c = &j.pod.Spec.Containers[0]
	}
	return &volume.Pod{Dir: j.agent.podDir(j.pod.UID), Mounter: j.agent.cfg.Mounter, Env: j.env(c)}
}

// mounts are the container's volumes and the generated files.
func (j *job) mounts(c *corev1.Container, env []string) ([]Mount, error) {
	v := j.volumes()
	var mounts []Mount
	for i, m := range c.VolumeMounts {
		path, err := v.Path(m.Name)
		if err != nil {
			return nil, fmt.Errorf("volumeMounts[%d]: %w", i, err)
		}
		if sub := subPath(m, env); sub != "" {
			target := filepath.Join(v.Dir, "subpaths", c.Name, fmt.Sprint(i))
			if path, err = volume.SubPath(v.Mounter, path, sub, target); err != nil {
				return nil, fmt.Errorf("volumeMounts[%d]: %w", i, err)
			}
		}
		mounts = append(mounts, Mount{HostPath: path, ContainerPath: m.MountPath, ReadOnly: m.ReadOnly || j.readOnly(m.Name)})
	}
	etc, err := v.WriteEtc(j.hostname(), v.Env.PodIPs, j.agent.dns())
	if err != nil {
		return nil, fmt.Errorf("write the pod's hosts and resolv.conf: %w", err)
	}
	message, err := j.messageFile(c)
	if err != nil {
		return nil, fmt.Errorf("make the termination message: %w", err)
	}
	for path, host := range map[string]string{"/etc/hosts": etc.Hosts, "/etc/hostname": etc.Hostname, "/etc/resolv.conf": etc.Resolv,
		messagePath(c): message} {
		if !slices.ContainsFunc(mounts, func(m Mount) bool { return filepath.Clean(m.ContainerPath) == path }) {
			mounts = append(mounts, Mount{HostPath: host, ContainerPath: path})
		}
	}
	// Parents before children: a mount over /data must not hide one at /data/x.
	slices.SortStableFunc(mounts, func(a, b Mount) int { return cmp.Compare(a.ContainerPath, b.ContainerPath) })
	return mounts, nil
}

// readOnly reports that a volume shows objects, which containers cannot change.
func (j *job) readOnly(name string) bool {
	return slices.ContainsFunc(j.pod.Spec.Volumes, func(v corev1.Volume) bool {
		return v.Name == name && (v.ConfigMap != nil || v.Secret != nil || v.DownwardAPI != nil || v.Projected != nil)
	})
}

func subPath(m corev1.VolumeMount, env []string) string {
	if m.SubPathExpr == "" {
		return m.SubPath
	}
	_, args := podenv.Args(&corev1.Container{Args: []string{m.SubPathExpr}}, env)
	return args[0]
}

func (j *job) hostname() string {
	if j.pod.Spec.HostNetwork {
		return j.agent.cfg.Node
	}
	h := cmp.Or(j.pod.Spec.Hostname, j.pod.Name)
	for len(h) > 63 || (h != "" && (h[len(h)-1] == '-' || h[len(h)-1] == '.')) {
		h = h[:min(len(h)-1, 63)]
	}
	return h
}

func (a *Agent) dns() volume.DNS {
	return volume.DNS{Server: a.cfg.ClusterDNS, Domain: a.cfg.ClusterDomain, NodeResolvConf: a.cfg.ResolvConf}
}

func (j *job) signal(ctx context.Context, sig syscall.Signal) stepResult {
	return j.bounded(ctx, quickTimeout, func(ctx context.Context) error {
		return ignoreMissing(j.agent.cfg.Runtime.SignalContainer(ctx, j.step.ID, int(sig)))
	})
}

// stopSignal is the container's lifecycle.stopSignal, SIGTERM by default.
func (j *job) stopSignal() syscall.Signal {
	c := containerSpec(j.pod, j.step.Container)
	if c != nil && c.Lifecycle != nil && c.Lifecycle.StopSignal != nil {
		if s := unix.SignalNum(string(*c.Lifecycle.StopSignal)); s != 0 {
			return s
		}
	}
	return unix.SIGTERM
}

const (
	podFile          = "pod.json"
	messageLimit     = 4096
	defaultMessageAt = "/dev/termination-log"
)

// writePod notes the pod beside its volumes, so that it can be stopped as it wants
// when the control plane is gone or has forgotten it.
func writePod(dir string, pod *corev1.Pod) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make the pod's folder: %w", err)
	}
	data, err := json.Marshal(pod)
	if err != nil {
		return fmt.Errorf("note pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	temp := filepath.Join(dir, podFile+".new")
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return fmt.Errorf("note pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return os.Rename(temp, filepath.Join(dir, podFile))
}

func readPod(dir string) (*corev1.Pod, error) {
	data, err := os.ReadFile(filepath.Join(dir, podFile))
	if err != nil {
		return nil, err
	}
	pod := &corev1.Pod{}
	return pod, json.Unmarshal(data, pod)
}

// messagePath is where the container may write why it ended.
func messagePath(c *corev1.Container) string {
	return filepath.Clean(cmp.Or(c.TerminationMessagePath, defaultMessageAt))
}

func messageFileOf(podDir, container string, attempt int) string {
	return filepath.Join(podDir, "messages", fmt.Sprintf("%s-%d", container, attempt))
}

func (j *job) messageFile(c *corev1.Container) (string, error) {
	path := messageFileOf(j.agent.podDir(j.pod.UID), c.Name, j.step.Attempt)
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return "", err
	}
	// Containers may run as any user.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o666)
	if err != nil {
		return "", err
	}
	return path, errors.Join(f.Chmod(0o666), f.Close())
}
