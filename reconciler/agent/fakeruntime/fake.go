// Package fakeruntime is an in-memory [agent.Runtime] for tests. Time in it is the
// time package's, so that it runs in the fake time of testing/synctest; it starts no
// goroutines of its own but timers.
//
// It is held to the same conformance suite as the real runtime.
package fakeruntime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
)

// Program is what a container does once it is started.
type Program struct {
	// Runs is how long it runs before it exits by itself; zero: forever.
	Runs time.Duration
	Exit int32 // its exit code then
	// OnTerm is how long it takes to end after SIGTERM (with exit code 0); negative:
	// it ignores SIGTERM.
	OnTerm time.Duration
	// Output is written to the log at the start.
	Output string
	// Exec answers commands run in the container; nil: exit code 0, no output.
	Exec func(ctx context.Context, cmd []string, stdout io.Writer) (int, error)
	// StartError makes StartContainer fail.
	StartError error
}

// Runtime is the fake. Its fields may be set before use.
type Runtime struct {
	// Program chooses what a container does; nil: all run until they are stopped.
	Program func(agent.ContainerConfig) Program
	// Fail, when not nil, is asked before every call ("PullImage", "List", …) with
	// the pod UID, container ID or image concerned; an error makes the call fail.
	Fail func(call, what string) error
	// Delay is how long each call of a kind takes.
	Delay map[string]time.Duration
	// Images present; PullImage adds to them. Missing ones are pulled unless
	// the policy is Never.
	Images map[string]string

	mu     sync.Mutex
	pods   map[types.UID]*pod
	events chan struct{}
	calls  []string
}

type pod struct {
	sandbox    agent.Sandbox
	containers []*container
	logs       map[string][]logged   // by container name
	newest     map[string]*container // by name; removed ones too
}

type logged struct {
	at      time.Time
	attempt int
	text    string
}

type container struct {
	agent.Container
	pod     *pod
	program Program
	stop    *time.Timer
	done    chan struct{}
	config  agent.ContainerConfig
}

// New returns an empty runtime.
func New() *Runtime {
	return &Runtime{Images: map[string]string{}, Delay: map[string]time.Duration{}, pods: map[types.UID]*pod{}, events: make(chan struct{}, 1)}
}

var _ agent.Runtime = (*Runtime)(nil)

// Calls returns the successful changing calls so far, such as "StartContainer web-0".
func (r *Runtime) Calls() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

// before delays and fails a call as told.
func (r *Runtime) before(ctx context.Context, call, what string) error {
	r.mu.Lock()
	delay, fail := r.Delay[call], r.Fail
	r.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if fail != nil {
		return fail(call, what)
	}
	return nil
}

func (r *Runtime) notify() {
	select {
	case r.events <- struct{}{}:
	default:
	}
}

// Events implements [agent.Runtime].
func (r *Runtime) Events() <-chan struct{} { return r.events }

// List implements [agent.Runtime].
func (r *Runtime) List(ctx context.Context) ([]agent.Sandbox, error) {
	if err := r.before(ctx, "List", ""); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []agent.Sandbox
	for _, p := range r.pods {
		s := p.sandbox
		s.Containers = nil
		for _, c := range p.containers {
			s.Containers = append(s.Containers, c.Container)
		}
		slices.SortFunc(s.Containers, func(a, b agent.Container) int {
			if a.Name != b.Name {
				return strings.Compare(a.Name, b.Name)
			}
			return a.Attempt - b.Attempt
		})
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b agent.Sandbox) int { return strings.Compare(string(a.UID), string(b.UID)) })
	return out, nil
}

// PullImage implements [agent.Runtime].
func (r *Runtime) PullImage(ctx context.Context, image string, policy corev1.PullPolicy, _ []agent.RegistryAuth) (string, error) {
	if image == "" || strings.ContainsAny(image, " \t\n") || strings.ToLower(image) != image {
		return "", fmt.Errorf("pull %q: %w", image, agent.ErrImageInvalid)
	}
	r.mu.Lock()
	ref, ok := r.Images[image]
	r.mu.Unlock()
	if ok && policy != corev1.PullAlways {
		return ref, nil
	}
	if policy == corev1.PullNever {
		return "", fmt.Errorf("pull %s: %w", image, agent.ErrImageNeverPull)
	}
	if err := r.before(ctx, "PullImage", image); err != nil {
		return "", fmt.Errorf("pull %s: %w", image, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if ref == "" {
		ref = image + "@sha256:" + strings.Repeat("0", 64)
	}
	r.Images[image] = ref
	r.calls = append(r.calls, "PullImage "+image)
	return ref, nil
}

// CreateSandbox implements [agent.Runtime].
func (r *Runtime) CreateSandbox(ctx context.Context, cfg agent.SandboxConfig) (agent.Sandbox, error) {
	if err := r.before(ctx, "CreateSandbox", string(cfg.Pod.UID)); err != nil {
		return agent.Sandbox{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.pods[cfg.Pod.UID]
	if ok && !p.sandbox.Lost {
		return p.sandbox, nil
	}
	if !ok {
		p = &pod{logs: map[string][]logged{}, newest: map[string]*container{}}
		r.pods[cfg.Pod.UID] = p
	}
	p.sandbox = agent.Sandbox{UID: cfg.Pod.UID, Namespace: cfg.Pod.Namespace, Name: cfg.Pod.Name, CreatedAt: time.Now()}
	if !cfg.HostNet {
		p.sandbox.NetNS = "/run/fake/" + string(cfg.Pod.UID)
	}
	r.calls = append(r.calls, "CreateSandbox "+cfg.Pod.Name)
	return p.sandbox, nil
}

// RemoveSandbox implements [agent.Runtime].
func (r *Runtime) RemoveSandbox(ctx context.Context, uid types.UID) error {
	if err := r.before(ctx, "RemoveSandbox", string(uid)); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.pods[uid]
	if !ok {
		return fmt.Errorf("sandbox of pod %s: %w", uid, agent.ErrNotFound)
	}
	if len(p.containers) > 0 {
		return fmt.Errorf("sandbox of pod %s: container %s must be removed first", uid, p.containers[0].ID)
	}
	delete(r.pods, uid)
	r.calls = append(r.calls, "RemoveSandbox "+p.sandbox.Name)
	return nil
}

// CreateContainer implements [agent.Runtime].
func (r *Runtime) CreateContainer(ctx context.Context, cfg agent.ContainerConfig) (string, error) {
	id := fmt.Sprintf("%s-%s-%d", cfg.Pod.UID, cfg.Container.Name, cfg.Attempt)
	if err := r.before(ctx, "CreateContainer", id); err != nil {
		return "", err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.pods[cfg.Pod.UID]
	if !ok || p.sandbox.Lost {
		return "", fmt.Errorf("sandbox of pod %s: %w", cfg.Pod.UID, agent.ErrNotFound)
	}
	if p.find(id) != nil {
		return id, nil
	}
	c := &container{pod: p, config: cfg, done: make(chan struct{})}
	c.Container = agent.Container{ID: id, Name: cfg.Container.Name, Attempt: cfg.Attempt, Init: cfg.Init, State: agent.Created,
		Image: cfg.Container.Image, ImageRef: cfg.ImageRef, CreatedAt: time.Now(), Hash: cfg.Hash}
	if r.Program != nil {
		c.program = r.Program(cfg)
	}
	p.containers = append(p.containers, c)
	if n := p.newest[c.Name]; n == nil || n.Attempt < c.Attempt {
		p.newest[c.Name] = c
	}
	r.calls = append(r.calls, fmt.Sprintf("CreateContainer %s-%d", c.Name, c.Attempt))
	r.notify()
	return id, nil
}

func (p *pod) find(id string) *container {
	for _, c := range p.containers {
		if c.ID == id {
			return c
		}
	}
	return nil
}

func (r *Runtime) find(id string) (*container, error) {
	for _, p := range r.pods {
		if c := p.find(id); c != nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("container %s: %w", id, agent.ErrNotFound)
}

// StartContainer implements [agent.Runtime].
func (r *Runtime) StartContainer(ctx context.Context, id string) error {
	if err := r.before(ctx, "StartContainer", id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.find(id)
	if err != nil {
		return err
	}
	switch {
	case c.State == agent.Running:
		return nil
	case c.State == agent.Exited:
		return fmt.Errorf("start container %s: it has exited already", id)
	case c.program.StartError != nil:
		return c.program.StartError
	}
	for _, other := range c.pod.containers {
		if other.Name == c.Name && other.State == agent.Running {
			return fmt.Errorf("start container %s: %s still runs", id, other.ID)
		}
	}
	c.State, c.StartedAt, c.Pid = agent.Running, time.Now(), 4242
	if c.program.Output != "" {
		c.log(c.program.Output)
	}
	if c.program.Runs > 0 {
		c.stop = time.AfterFunc(c.program.Runs, func() { r.exit(c, c.program.Exit, 0) })
	}
	r.calls = append(r.calls, fmt.Sprintf("StartContainer %s-%d", c.Name, c.Attempt))
	r.notify()
	return nil
}

func (c *container) log(text string) {
	for line := range strings.Lines(text) {
		c.pod.logs[c.Name] = append(c.pod.logs[c.Name], logged{time.Now(), c.Attempt, strings.TrimSuffix(line, "\n") + "\n"})
	}
}

// exit ends a running container.
func (r *Runtime) exit(c *container, code, signal int32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.exitLocked(c, code, signal)
}

func (r *Runtime) exitLocked(c *container, code, signal int32) {
	if c.State != agent.Running {
		return
	}
	if c.stop != nil {
		c.stop.Stop()
	}
	c.State, c.FinishedAt, c.ExitCode, c.Signal, c.Pid = agent.Exited, time.Now(), code, signal, 0
	close(c.done)
	r.notify()
}

// Crash ends a container by a signal from outside, as kill -9 does.
func (r *Runtime) Crash(pod types.UID, name string, signal int32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.pods[pod]; p != nil {
		for _, c := range p.containers {
			if c.Name == name && c.State == agent.Running {
				r.exitLocked(c, 128+signal, signal)
				return nil
			}
		}
	}
	return fmt.Errorf("running container %s of pod %s: %w", name, pod, agent.ErrNotFound)
}

// Reboot ends everything: processes and namespaces are gone, records stay.
func (r *Runtime) Reboot() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.pods {
		p.sandbox.Lost = true
		for _, c := range p.containers {
			r.exitLocked(c, 255, 0)
		}
	}
	r.notify()
}

// SignalContainer implements [agent.Runtime].
func (r *Runtime) SignalContainer(ctx context.Context, id string, signal int) error {
	if err := r.before(ctx, "SignalContainer", id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.find(id)
	if err != nil {
		return err
	}
	if c.State != agent.Running {
		return nil
	}
	r.calls = append(r.calls, fmt.Sprintf("Signal %d %s-%d", signal, c.Name, c.Attempt))
	switch {
	case signal == 9:
		r.exitLocked(c, 137, 9)
	case signal == 15 && c.program.OnTerm == 0:
		r.exitLocked(c, 0, 0)
	case signal == 15 && c.program.OnTerm > 0:
		if c.stop != nil {
			c.stop.Stop()
		}
		c.stop = time.AfterFunc(c.program.OnTerm, func() { r.exit(c, 0, 0) })
	}
	return nil
}

// RemoveContainer implements [agent.Runtime].
func (r *Runtime) RemoveContainer(ctx context.Context, id string) error {
	if err := r.before(ctx, "RemoveContainer", id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.find(id)
	if err != nil {
		return err
	}
	r.exitLocked(c, 137, 9)
	c.pod.containers = slices.DeleteFunc(c.pod.containers, func(o *container) bool { return o == c })
	r.calls = append(r.calls, fmt.Sprintf("RemoveContainer %s-%d", c.Name, c.Attempt))
	r.notify()
	return nil
}

// Exec implements [agent.Runtime].
func (r *Runtime) Exec(ctx context.Context, id string, cfg agent.ExecConfig) (int, error) {
	if err := r.before(ctx, "Exec", id); err != nil {
		return 0, err
	}
	r.mu.Lock()
	c, err := r.find(id)
	if err == nil && c.State != agent.Running {
		err = fmt.Errorf("exec in container %s: it does not run: %w", id, agent.ErrNotFound)
	}
	r.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if cfg.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cfg.Timeout)
		defer cancel()
	}
	out := cfg.Stdout
	if out == nil {
		out = io.Discard
	}
	if c.program.Exec == nil {
		return 0, nil
	}
	return c.program.Exec(ctx, cfg.Command, out)
}

// Logs implements [agent.Runtime]. Follow ends with the container.
func (r *Runtime) Logs(ctx context.Context, uid types.UID, name string, opts agent.LogOptions, w io.Writer) error {
	if err := r.before(ctx, "Logs", string(uid)); err != nil {
		return err
	}
	r.mu.Lock()
	p, ok := r.pods[uid]
	if !ok || p.logs == nil {
		r.mu.Unlock()
		return fmt.Errorf("logs of pod %s: %w", uid, agent.ErrNotFound)
	}
	latest, known := p.latest(name)
	lines := slices.Clone(p.logs[name])
	r.mu.Unlock()
	if !known {
		return fmt.Errorf("logs of container %s: %w", name, agent.ErrNotFound)
	}
	attempt := latest.Attempt
	if opts.Previous {
		if attempt--; attempt < 0 {
			return fmt.Errorf("previous logs of container %s: %w", name, agent.ErrNotFound)
		}
	}
	lines = slices.DeleteFunc(lines, func(l logged) bool { return l.attempt != attempt || l.at.Before(opts.Since) })
	if opts.TailLines >= 0 && int64(len(lines)) > opts.TailLines {
		lines = lines[int64(len(lines))-opts.TailLines:]
	}
	var b strings.Builder
	for _, l := range lines {
		if opts.Timestamps {
			b.WriteString(l.at.UTC().Format(time.RFC3339Nano) + " ")
		}
		b.WriteString(l.text)
	}
	text := b.String()
	if opts.LimitBytes > 0 && int64(len(text)) > opts.LimitBytes {
		text = text[:opts.LimitBytes]
	}
	if _, err := w.Write([]byte(text)); err != nil {
		return err
	}
	if opts.Follow && !opts.Previous {
		select {
		case <-latest.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (p *pod) latest(name string) (*container, bool) {
	c, ok := p.newest[name]
	return c, ok
}

// Container returns the newest attempt of a container.
func (r *Runtime) Container(uid types.UID, name string) (agent.Container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.pods[uid]; p != nil {
		if c, ok := p.latest(name); ok {
			return c.Container, nil
		}
	}
	return agent.Container{}, errors.New("no such container")
}

// Config returns how the newest attempt of a container was created.
func (r *Runtime) Config(uid types.UID, name string) (agent.ContainerConfig, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.pods[uid]; p != nil {
		if c, ok := p.latest(name); ok {
			return c.config, nil
		}
	}
	return agent.ContainerConfig{}, errors.New("no such container")
}
