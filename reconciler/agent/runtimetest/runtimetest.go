// Package runtimetest holds every implementation of agent.Runtime, the real one and
// fakes, to the same behaviour. It is imported by tests only.
package runtimetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
)

const patience = 30 * time.Second

// Setup is a Runtime with an image on it, and command lines that the image
// understands.
type Setup struct {
	Runtime agent.Runtime
	Image   string                     // present; PullImage with policy Never finds it
	Exit    func(code int) []string    // ends at once with that code
	Print   func(line string) []string // writes one line to stdout, ends with 0
	Forever []string                   // runs until killed
	TermOK  []string                   // runs until SIGTERM, then ends with 0
}

// Run checks a Runtime. setup is called once for each subtest.
func Run(t *testing.T, setup func(t *testing.T) Setup) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s Setup)
	}{
		{"NothingAtFirst", nothingAtFirst},
		{"SandboxIsIdempotent", sandboxIsIdempotent},
		{"UnknownIsNotFound", unknownIsNotFound},
		{"Life", life},
		{"CreateIsIdempotent", createIsIdempotent},
		{"ExitCode", exitCode},
		{"Restart", restart},
		{"Signal", signal},
		{"RemoveRunning", removeRunning},
		{"SandboxWaitsForContainers", sandboxWaitsForContainers},
		{"Exec", execCodes},
		{"ExecTimeout", execTimeout},
		{"Logs", logs},
		{"FollowEnds", followEnds},
		{"PullPolicy", pullPolicy},
		{"CancelledIsNoExit", cancelledIsNoExit},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, setup(t)) })
	}
}

func newPod(names ...string) *corev1.Pod {
	id := fmt.Sprint(time.Now().UnixNano())
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "p" + id, UID: types.UID("uid-" + id)}}
	for _, n := range names {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: n})
	}
	return p
}

func (s Setup) sandbox(t *testing.T, p *corev1.Pod) agent.Sandbox {
	t.Helper()
	box, err := s.Runtime.CreateSandbox(t.Context(), agent.SandboxConfig{Pod: p, Hostname: p.Name})
	if err != nil {
		t.Fatal(err)
	}
	return box
}

func (s Setup) config(p *corev1.Pod, i, attempt int, command []string) agent.ContainerConfig {
	c := p.Spec.Containers[i].DeepCopy()
	c.Image, c.Command = s.Image, command
	return agent.ContainerConfig{
		Pod: p, Container: c, Attempt: attempt, ImageRef: s.Image, Hostname: p.Name,
		Args: command, Hash: fmt.Sprintf("hash-%d", attempt),
	}
}

func (s Setup) create(t *testing.T, cfg agent.ContainerConfig) string {
	t.Helper()
	id, err := s.Runtime.CreateContainer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (s Setup) start(t *testing.T, p *corev1.Pod, attempt int, command []string) string {
	t.Helper()
	id := s.create(t, s.config(p, 0, attempt, command))
	if err := s.Runtime.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	return id
}

// pod returns what List says of a pod.
func (s Setup) pod(t *testing.T, uid types.UID) (agent.Sandbox, bool) {
	t.Helper()
	all, err := s.Runtime.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, box := range all {
		if box.UID == uid {
			return box, true
		}
	}
	return agent.Sandbox{}, false
}

func (s Setup) container(t *testing.T, uid types.UID, id string) agent.Container {
	t.Helper()
	box, _ := s.pod(t, uid)
	for _, c := range box.Containers {
		if c.ID == id {
			return c
		}
	}
	t.Fatalf("container %s is not listed: %+v", id, box)
	return agent.Container{}
}

// wait lists at every signal until the container has the state.
func (s Setup) wait(t *testing.T, uid types.UID, id string, state agent.ContainerState) agent.Container {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		c := s.container(t, uid, id)
		if c.State == state {
			return c
		}
		select {
		case <-s.Runtime.Events():
		case <-ctx.Done():
			t.Fatalf("no event brought container %s to state %d: %+v", id, state, c)
		}
	}
}

func nothingAtFirst(t *testing.T, s Setup) {
	if all, err := s.Runtime.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("List: %+v, %v; want nothing", all, err)
	}
}

func sandboxIsIdempotent(t *testing.T, s Setup) {
	p := newPod("a")
	first, second := s.sandbox(t, p), s.sandbox(t, p)
	if first.UID != p.UID || first.Name != p.Name || first.Namespace != p.Namespace || first.NetNS == "" || first.Lost {
		t.Errorf("sandbox: %+v", first)
	}
	if first.NetNS != second.NetNS || !first.CreatedAt.Equal(second.CreatedAt) {
		t.Errorf("a second create made another sandbox: %+v, %+v", first, second)
	}
	if box, ok := s.pod(t, p.UID); !ok || len(box.Containers) != 0 {
		t.Errorf("a sandbox without containers must be listed: %+v", box)
	}
	if err := s.Runtime.RemoveSandbox(t.Context(), p.UID); err != nil {
		t.Error(err)
	}
	if err := s.Runtime.RemoveSandbox(t.Context(), p.UID); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("second removal: %v", err)
	}
	if _, ok := s.pod(t, p.UID); ok {
		t.Error("the removed sandbox is listed")
	}
	host, err := s.Runtime.CreateSandbox(t.Context(), agent.SandboxConfig{Pod: p, HostNet: true})
	if err != nil || host.NetNS != "" {
		t.Errorf("sandbox in the host's network: %+v, %v", host, err)
	}
}

func unknownIsNotFound(t *testing.T, s Setup) {
	rt, ctx, p := s.Runtime, t.Context(), newPod("a")
	_, execErr := rt.Exec(ctx, "no-such-container", agent.ExecConfig{Command: []string{"true"}})
	_, createErr := rt.CreateContainer(ctx, s.config(p, 0, 0, s.Forever))
	for name, err := range map[string]error{
		"StartContainer":                    rt.StartContainer(ctx, "no-such-container"),
		"SignalContainer":                   rt.SignalContainer(ctx, "no-such-container", 15),
		"RemoveContainer":                   rt.RemoveContainer(ctx, "no-such-container"),
		"RemoveSandbox":                     rt.RemoveSandbox(ctx, "no-such-pod"),
		"Exec":                              execErr,
		"Logs":                              rt.Logs(ctx, "no-such-pod", "a", agent.LogOptions{TailLines: -1}, &bytes.Buffer{}),
		"CreateContainer without a sandbox": createErr,
	} {
		if !errors.Is(err, agent.ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound", name, err)
		}
	}
}

func life(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	cfg := s.config(p, 0, 0, s.Forever)
	id := s.create(t, cfg)
	c := s.container(t, p.UID, id)
	if c.State != agent.Created || !c.StartedAt.IsZero() || c.Name != "a" || c.Hash != cfg.Hash || c.Image != s.Image || c.Init || c.Attempt != 0 {
		t.Errorf("created container: %+v", c)
	}
	for range 2 { // the second changes nothing
		if err := s.Runtime.StartContainer(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	c = s.wait(t, p.UID, id, agent.Running)
	if c.StartedAt.IsZero() || c.Pid == 0 || !c.FinishedAt.IsZero() {
		t.Errorf("running container: %+v", c)
	}
	if err := s.Runtime.RemoveContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if box, ok := s.pod(t, p.UID); !ok || len(box.Containers) != 0 {
		t.Errorf("after the removal: %+v", box)
	}
}

func createIsIdempotent(t *testing.T, s Setup) {
	p := newPod("a", "b")
	s.sandbox(t, p)
	first, again := s.create(t, s.config(p, 0, 0, s.Forever)), s.create(t, s.config(p, 0, 0, s.Forever))
	if first != again {
		t.Errorf("the same attempt got two containers: %s, %s", first, again)
	}
	ids := map[string]bool{first: true, s.create(t, s.config(p, 0, 1, s.Forever)): true, s.create(t, s.config(p, 1, 0, s.Forever)): true}
	if len(ids) != 3 {
		t.Errorf("another attempt or name must be another container: %v", ids)
	}
	init := s.config(p, 0, 7, s.Forever)
	init.Init = true
	if c := s.container(t, p.UID, s.create(t, init)); !c.Init || c.Attempt != 7 {
		t.Errorf("init container: %+v", c)
	}
}

func exitCode(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	id := s.start(t, p, 0, s.Exit(42))
	c := s.wait(t, p.UID, id, agent.Exited)
	if c.ExitCode != 42 || c.OOMKilled || c.FinishedAt.IsZero() || c.FinishedAt.Before(c.StartedAt) || c.Pid != 0 {
		t.Errorf("ended container: %+v", c)
	}
	if err := s.Runtime.SignalContainer(t.Context(), id, 15); err != nil {
		t.Errorf("signal to an ended container: %v, want nil", err)
	}
	if err := s.Runtime.StartContainer(t.Context(), id); err == nil {
		t.Error("an ended container was started again")
	}
	if again := s.container(t, p.UID, id); again.ExitCode != 42 || !again.FinishedAt.Equal(c.FinishedAt) {
		t.Errorf("the end changed from %+v to %+v", c, again)
	}
}

func restart(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	first := s.start(t, p, 0, s.Exit(1))
	s.wait(t, p.UID, first, agent.Exited)
	second := s.start(t, p, 1, s.Forever)
	s.wait(t, p.UID, second, agent.Running)
	if c := s.container(t, p.UID, first); c.State != agent.Exited || c.Attempt != 0 {
		t.Errorf("first attempt: %+v", c)
	}
	if err := s.Runtime.RemoveContainer(t.Context(), first); err != nil {
		t.Error(err)
	}
	if c := s.container(t, p.UID, second); c.State != agent.Running || c.Attempt != 1 || c.Hash != "hash-1" {
		t.Errorf("second attempt: %+v", c)
	}
}

func signal(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	gentle := s.start(t, p, 0, s.TermOK)
	s.wait(t, p.UID, gentle, agent.Running)
	// The program needs a moment to install its handler.
	s.awaitLog(t, p, "ready")
	if err := s.Runtime.SignalContainer(t.Context(), gentle, 15); err != nil {
		t.Fatal(err)
	}
	if c := s.wait(t, p.UID, gentle, agent.Exited); c.ExitCode != 0 {
		t.Errorf("after SIGTERM: %+v", c)
	}
	hard := s.start(t, p, 1, s.Forever)
	s.wait(t, p.UID, hard, agent.Running)
	if err := s.Runtime.SignalContainer(t.Context(), hard, 9); err != nil {
		t.Fatal(err)
	}
	if c := s.wait(t, p.UID, hard, agent.Exited); c.ExitCode != 137 {
		t.Errorf("after SIGKILL: %+v, want exit code 137", c)
	}
}

// awaitLog follows the log of container a until the text has appeared.
func (s Setup) awaitLog(t *testing.T, p *corev1.Pod, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	w := &awaited{text: text, found: cancel}
	err := s.Runtime.Logs(ctx, p.UID, "a", agent.LogOptions{Follow: true, TailLines: -1}, w)
	if !strings.Contains(w.String(), text) {
		t.Fatalf("the log never said %q: %q, %v", text, w.String(), err)
	}
}

type awaited struct {
	bytes.Buffer
	text  string
	found func()
}

func (a *awaited) Write(b []byte) (int, error) {
	n, err := a.Buffer.Write(b)
	if strings.Contains(a.String(), a.text) {
		a.found()
	}
	return n, err
}

func removeRunning(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	id := s.start(t, p, 0, s.Forever)
	if err := s.Runtime.RemoveContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := s.Runtime.RemoveSandbox(t.Context(), p.UID); err != nil {
		t.Error(err)
	}
}

func sandboxWaitsForContainers(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	id := s.create(t, s.config(p, 0, 0, s.Forever))
	if err := s.Runtime.RemoveSandbox(t.Context(), p.UID); err == nil || errors.Is(err, agent.ErrNotFound) {
		t.Errorf("a sandbox with a container was removed: %v", err)
	}
	if err := s.Runtime.RemoveContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := s.Runtime.RemoveSandbox(t.Context(), p.UID); err != nil {
		t.Error(err)
	}
}

func execCodes(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	id := s.start(t, p, 0, s.Forever)
	s.wait(t, p.UID, id, agent.Running)
	var out bytes.Buffer
	code, err := s.Runtime.Exec(t.Context(), id, agent.ExecConfig{Command: s.Print("hello"), Stdout: &out})
	if err != nil || code != 0 || out.String() != "hello\n" {
		t.Errorf("exec: %q, %d, %v", out.String(), code, err)
	}
	if code, err = s.Runtime.Exec(t.Context(), id, agent.ExecConfig{Command: s.Exit(9)}); err != nil || code != 9 {
		t.Errorf("exit code: %d, %v; want 9", code, err)
	}
	if err := s.Runtime.RemoveContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err = s.Runtime.Exec(t.Context(), id, agent.ExecConfig{Command: s.Exit(0)}); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("exec in a removed container: %v", err)
	}
}

func execTimeout(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	id := s.start(t, p, 0, s.Forever)
	s.wait(t, p.UID, id, agent.Running)
	_, err := s.Runtime.Exec(t.Context(), id, agent.ExecConfig{Command: s.Forever, Timeout: 300 * time.Millisecond})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec beyond its timeout: %v", err)
	}
	if c := s.container(t, p.UID, id); c.State != agent.Running {
		t.Errorf("the container suffered: %+v", c)
	}
}

func (s Setup) logs(t *testing.T, p *corev1.Pod, opts agent.LogOptions) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out bytes.Buffer
	if err := s.Runtime.Logs(ctx, p.UID, "a", opts, &out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func logs(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	all := agent.LogOptions{TailLines: -1}
	previous := agent.LogOptions{TailLines: -1, Previous: true}
	first := s.start(t, p, 0, s.Print("first"))
	s.wait(t, p.UID, first, agent.Exited)
	if err := s.Runtime.Logs(t.Context(), p.UID, "a", previous, &bytes.Buffer{}); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("previous log of the first attempt: %v", err)
	}
	second := s.start(t, p, 1, s.Print("second"))
	s.wait(t, p.UID, second, agent.Exited)
	for what, test := range map[string]struct {
		opts agent.LogOptions
		want string
	}{
		"all":      {all, "second\n"},
		"previous": {previous, "first\n"},
		"tail 0":   {agent.LogOptions{TailLines: 0}, ""},
		"tail 1":   {agent.LogOptions{TailLines: 1}, "second\n"},
		"limit":    {agent.LogOptions{TailLines: -1, LimitBytes: 3}, "sec"},
		"since":    {agent.LogOptions{TailLines: -1, Since: time.Now().Add(time.Hour)}, ""},
	} {
		if got := s.logs(t, p, test.opts); got != test.want {
			t.Errorf("%s: %q, want %q", what, got, test.want)
		}
	}
	stamped := s.logs(t, p, agent.LogOptions{TailLines: -1, Timestamps: true})
	at, text, _ := strings.Cut(stamped, " ")
	if _, err := time.Parse(time.RFC3339Nano, at); err != nil || text != "second\n" {
		t.Errorf("timestamps: %q", stamped)
	}
	for _, id := range []string{first, second} {
		if err := s.Runtime.RemoveContainer(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.logs(t, p, all); got != "second\n" {
		t.Errorf("log after the removal of the container: %q", got)
	}
	if err := s.Runtime.RemoveSandbox(t.Context(), p.UID); err != nil {
		t.Fatal(err)
	}
	if err := s.Runtime.Logs(t.Context(), p.UID, "a", all, &bytes.Buffer{}); !errors.Is(err, agent.ErrNotFound) {
		t.Errorf("log after the removal of the sandbox: %v", err)
	}
}

func followEnds(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	s.start(t, p, 0, s.Print("only"))
	if got := s.logs(t, p, agent.LogOptions{TailLines: -1, Follow: true}); got != "only\n" {
		t.Errorf("followed: %q", got)
	}
}

func pullPolicy(t *testing.T, s Setup) {
	for _, policy := range []corev1.PullPolicy{corev1.PullNever, corev1.PullIfNotPresent} {
		ref, err := s.Runtime.PullImage(t.Context(), s.Image, policy, nil)
		if err != nil || !strings.Contains(ref, "@sha256:") {
			t.Errorf("%s: %q, %v; want a reference by digest", policy, ref, err)
		}
	}
	if _, err := s.Runtime.PullImage(t.Context(), "registry.invalid/absent:1", corev1.PullNever, nil); !errors.Is(err, agent.ErrImageNeverPull) {
		t.Errorf("absent image, policy Never: %v", err)
	}
	if _, err := s.Runtime.PullImage(t.Context(), "UPPER:bad tag", corev1.PullIfNotPresent, nil); !errors.Is(err, agent.ErrImageInvalid) {
		t.Errorf("invalid name: %v", err)
	}
}

func cancelledIsNoExit(t *testing.T, s Setup) {
	p := newPod("a")
	s.sandbox(t, p)
	id := s.start(t, p, 0, s.Forever)
	s.wait(t, p.UID, id, agent.Running)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if all, err := s.Runtime.List(ctx); err == nil {
		t.Errorf("List with a cancelled context answered %+v", all)
	}
	if c := s.container(t, p.UID, id); c.State != agent.Running {
		t.Errorf("the container suffered: %+v", c)
	}
}
