package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

// insideNetNS tells a measuring process that it has a network namespace of its own.
const insideNetNS = "DECREE_BENCH_NETNS"

// inOwnNetNS runs this same command line in a new network namespace and returns its
// exit status as an error; done is false if it runs in one already.
func inOwnNetNS(ctx context.Context, s Streams) (done bool, err error) {
	if os.Getenv(insideNetNS) != "" {
		return false, nil
	}
	self, err := os.Executable()
	if err != nil {
		return true, err
	}
	cmd := exec.CommandContext(ctx, self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideNetNS+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.In, s.Out, s.Err
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return true, exitCode(exit.ExitCode())
	}
	return true, err
}

// benchPush runs a cluster of its own, in the process's own network namespace, and
// pushes to it. A run adds one application with one replica and waits until it is healthy.
// Accepted is the moment at which a watch shows the new Deployment.
func benchPush(ctx context.Context, runs int) ([]figure, error) {
	dir, err := os.MkdirTemp("/tmp", "decree-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	images := filepath.Join(filepath.Dir(self), "images")
	if _, err := os.Stat(images); err != nil {
		return nil, fmt.Errorf("%w: run go tool task build first", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return nil, err
	}
	b := &pushBench{self: self, dir: dir, data: filepath.Join(dir, "data"), images: images}
	defer b.stop()
	if err := b.start(ctx); err != nil {
		return nil, err
	}
	return b.run(ctx, runs)
}

// pushBench is a cluster to push to.
type pushBench struct {
	self, dir, data, images string
	up                      *exec.Cmd
	client                  *client.Client
	ready                   float64 // ms from start to ready
	idle                    float64 // MB resident after start
}

func (b *pushBench) env() []string {
	return append(os.Environ(), "DECREE_DATA="+b.data, "PATH="+filepath.Dir(b.self)+":"+os.Getenv("PATH"), "HOME="+b.dir,
		"GIT_AUTHOR_NAME=bench", "GIT_AUTHOR_EMAIL=bench@localhost", "GIT_COMMITTER_NAME=bench", "GIT_COMMITTER_EMAIL=bench@localhost")
}

func (b *pushBench) start(ctx context.Context) error {
	var log bytes.Buffer
	b.up = exec.CommandContext(ctx, b.self, "up", "--images", b.images)
	b.up.Env, b.up.Stderr = b.env(), &log
	out, err := b.up.StdoutPipe()
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := b.up.Start(); err != nil {
		return err
	}
	for s := bufio.NewScanner(out); s.Scan(); {
		switch {
		case strings.HasPrefix(s.Text(), "ready"):
			b.ready = milliseconds(begun)
		case strings.HasPrefix(s.Text(), "healthy"):
			go func() { // keep the pipe empty
				for s.Scan() {
				}
			}()
			b.idle = residentMB(b.up.Process.Pid)
			cfg, err := client.FromKubeconfig(daemon.Kubeconfig(b.data))
			if err != nil {
				return err
			}
			b.client, err = client.New(cfg)
			return err
		}
	}
	return fmt.Errorf("decree up ended: %w\n%s", b.up.Wait(), log.String())
}

func (b *pushBench) stop() {
	if b.up != nil && b.up.Process != nil {
		_ = b.up.Process.Signal(syscall.SIGTERM)
		_ = b.up.Wait()
	}
	down := exec.Command(b.self, "down", "--purge")
	down.Env = b.env()
	if out, err := down.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "decree down --purge: %v\n%s", err, out)
	}
}

func (b *pushBench) git(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...)
	cmd.Env = b.env()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("git %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (b *pushBench) run(ctx context.Context, runs int) ([]figure, error) {
	if err := b.git(ctx, b.dir, "clone", "-q", "decree://127.0.0.1:7443/"+daemon.BuiltIn, "repo"); err != nil {
		return nil, err
	}
	var accepted, first, healthy []float64
	for i := range runs + 1 {
		a, f, h, err := b.push(ctx, i)
		if err != nil {
			return nil, err
		}
		if i > 0 { // the first one warms up
			accepted, first, healthy = append(accepted, a), append(first, f), append(healthy, h)
		}
	}
	return []figure{
		summarize("start to ready", "ms", []float64{b.ready}),
		summarize("idle memory after start", "MB", []float64{b.idle}),
		summarize("push begun to accepted", "ms", accepted),
		summarize("accepted to first container running", "ms", first),
		summarize("push begun to healthy", "ms", healthy),
	}, nil
}

// push adds application number i and returns when the push was accepted (the pod's
// Deployment appeared), when its container ran and when git returned, in ms.
func (b *pushBench) push(ctx context.Context, i int) (accepted, first, healthy float64, err error) {
	repo, name := filepath.Join(b.dir, "repo"), fmt.Sprintf("bench-%d", i)
	text := fmt.Sprintf("package bench\n\nimport \"decree.dev/app\"\n\n\"%s\": app.#App & {name: %q, image: \"decree.dev/hello:v1\", port: 8080}\n", name, name)
	if err := os.WriteFile(filepath.Join(repo, name+".cue"), []byte(text), 0o644); err != nil {
		return 0, 0, 0, err
	}
	if err := errors.Join(b.git(ctx, repo, "add", "-A"), b.git(ctx, repo, "commit", "-qm", name)); err != nil {
		return 0, 0, 0, err
	}
	watching, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var acceptedAt, runningAt time.Time
	armed, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- b.observe(watching, name, armed, &acceptedAt, &runningAt) }()
	<-armed
	begun := time.Now()
	if err := b.git(ctx, repo, "push", "-q", "origin", "HEAD:main"); err != nil {
		return 0, 0, 0, err
	}
	healthy = milliseconds(begun)
	if err := <-done; err != nil {
		return 0, 0, 0, fmt.Errorf("%s: %w", name, err)
	}
	return float64(acceptedAt.Sub(begun).Microseconds()) / 1000, float64(runningAt.Sub(acceptedAt).Microseconds()) / 1000, healthy, nil
}

// observe watches pods until the application's container runs. The pod appears
// right after the commit came into force.
func (b *pushBench) observe(ctx context.Context, app string, armed chan<- struct{}, accepted, running *time.Time) error {
	deployments, _ := api.KindFor(api.Deployments)
	pods, _ := api.KindFor(api.Pods)
	_, revision, err := b.client.ListObjects(ctx, deployments, client.ListOptions{})
	if err != nil {
		close(armed)
		return err
	}
	seen := make(chan error, 1)
	go func() {
		for ev, err := range b.client.WatchObjects(ctx, deployments, client.WatchOptions{After: revision}) {
			if err != nil {
				seen <- err
				return
			}
			if ev.Type == watch.Added && ev.Object.GetName() == app {
				*accepted = time.Now()
				seen <- nil
				return
			}
		}
		seen <- ctx.Err()
	}()
	close(armed)
	for ev, err := range b.client.WatchObjects(ctx, pods, client.WatchOptions{After: revision}) {
		if err != nil {
			return err
		}
		if p, ok := ev.Object.(*corev1.Pod); ok && p.Labels["app"] == app && len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].State.Running != nil {
			*running = time.Now()
			return <-seen
		}
	}
	return ctx.Err()
}

// residentMB is the resident memory of a process in megabytes, 0 if unknown.
func residentMB(pid int) float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			var kb float64
			fmt.Sscan(rest, &kb)
			return kb / 1000
		}
	}
	return 0
}
