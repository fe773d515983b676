package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/containerd"
)

// benchImage is what `go tool task build` packs.
const benchImage = "decree.dev/hello:v1"

// benchPodStart runs a containerd of its own and starts containers in turns: by the
// plain containerd client, and by the agent's runtime with its security, limits and
// logs. Ratios are of neighbouring runs.
func benchPodStart(ctx context.Context, runs int) ([]figure, error) {
	dir, err := os.MkdirTemp("/tmp", "decree-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	cfg := containerd.SupervisorConfig{Dir: filepath.Join(dir, "containerd"), RunDir: filepath.Join(dir, "run"), Logger: slog.New(slog.DiscardHandler)}
	sup, err := containerd.Supervise(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_ = sup.Stop(ctx)
		_ = containerd.WipeContainerd(ctx, cfg)
	}()
	if err := sup.WaitReady(ctx); err != nil {
		return nil, err
	}
	rt, err := containerd.New(containerd.Config{
		Address: sup.Address(), Namespace: "bench", Dir: filepath.Join(dir, "runtime"), RunDir: filepath.Join(dir, "ns"),
		CgroupParent: "/decree-bench", Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	defer rt.Close()
	defer rt.Purge(context.WithoutCancel(ctx))
	if err := importBenchImage(ctx, rt); err != nil {
		return nil, err
	}
	client, err := ctrd.New(sup.Address())
	if err != nil {
		return nil, err
	}
	defer client.Close()
	raw := &rawStarts{client: client, ctx: namespaces.WithNamespace(ctx, "bench")}
	if raw.image, err = client.GetImage(raw.ctx, benchImage); err != nil {
		return nil, err
	}
	return inTurns(ctx, raw, rt, runs)
}

// inTurns starts one container by each way, again and again.
func inTurns(ctx context.Context, raw *rawStarts, rt *containerd.Runtime, runs int) ([]figure, error) {
	var rawMS, oursMS, podMS, ratios, podRatios []float64
	for i := range runs + 1 {
		r, err := raw.start()
		if err != nil {
			return nil, fmt.Errorf("raw containerd: %w", err)
		}
		sandbox, container, err := startPod(ctx, rt, i)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			continue // warms up
		}
		rawMS, oursMS, podMS = append(rawMS, r), append(oursMS, container), append(podMS, sandbox+container)
		ratios, podRatios = append(ratios, container/r), append(podRatios, (sandbox+container)/r)
	}
	return []figure{
		summarize("raw containerd create+start", "ms", rawMS),
		summarize("container create+start", "ms", oursMS),
		summarize("container, ratio to raw", "x", ratios),
		summarize("pod: sandbox and container", "ms", podMS),
		summarize("pod, ratio to raw", "x", podRatios),
	}, nil
}

func importBenchImage(ctx context.Context, rt *containerd.Runtime) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(filepath.Dir(self), "images", "hello.tar"))
	if err != nil {
		return fmt.Errorf("%w: run go tool task build first", err)
	}
	defer f.Close()
	if _, err := rt.ImportImage(ctx, f); err != nil {
		return err
	}
	// Unpacking is not what is measured.
	_, err = rt.PullImage(ctx, benchImage, corev1.PullIfNotPresent, nil)
	return err
}

// rawStarts starts containers with the plain client and its defaults.
type rawStarts struct {
	client *ctrd.Client
	ctx    context.Context
	image  ctrd.Image
}

func (r *rawStarts) start() (ms float64, err error) {
	const id = "raw"
	begun := time.Now()
	c, err := r.client.NewContainer(r.ctx, id, ctrd.WithNewSnapshot(id, r.image), ctrd.WithNewSpec(oci.WithImageConfig(r.image)))
	if err != nil {
		return 0, err
	}
	task, err := c.NewTask(r.ctx, cio.NullIO)
	if err != nil {
		return 0, err
	}
	if err := task.Start(r.ctx); err != nil {
		return 0, err
	}
	ms = milliseconds(begun)
	if _, err := task.Delete(r.ctx, ctrd.WithProcessKill); err != nil {
		return 0, err
	}
	return ms, c.Delete(r.ctx, ctrd.WithSnapshotCleanup)
}

// startPod starts a pod of one container as the agent does, and removes it.
func startPod(ctx context.Context, rt *containerd.Runtime, i int) (sandboxMS, containerMS float64, err error) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{UID: types.UID(fmt.Sprintf("bench-%d", i)), Namespace: "default", Name: fmt.Sprintf("bench-%d", i)},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "hello", Image: benchImage}}},
	}
	begun := time.Now()
	if _, err := rt.CreateSandbox(ctx, agent.SandboxConfig{Pod: pod, Hostname: pod.Name}); err != nil {
		return 0, 0, err
	}
	sandboxMS = milliseconds(begun)
	ref, err := rt.PullImage(ctx, benchImage, corev1.PullIfNotPresent, nil)
	if err != nil {
		return 0, 0, err
	}
	begun = time.Now()
	id, err := rt.CreateContainer(ctx, agent.ContainerConfig{Pod: pod, Container: &pod.Spec.Containers[0], ImageRef: ref, Hostname: pod.Name, Hash: "bench"})
	if err != nil {
		return 0, 0, err
	}
	if err := rt.StartContainer(ctx, id); err != nil {
		return 0, 0, err
	}
	containerMS = milliseconds(begun)
	if err := rt.RemoveContainer(ctx, id); err != nil {
		return 0, 0, err
	}
	return sandboxMS, containerMS, rt.RemoveSandbox(ctx, pod.UID)
}
