package containerd

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
)

// BenchmarkStart compares, taking turns on one containerd: raw, the containerd client
// creating and starting a container with its default options; ours, the same by this
// package, security and logs included; ours-pod, with the sandbox of a new pod; and
// ours-second, a second container in a pod.
func BenchmarkStart(b *testing.B) {
	r := newRuntime(b)
	ctx := r.ns(b.Context())
	image, err := r.client.GetImage(ctx, testImage)
	if err != nil {
		b.Fatal(err)
	}
	took := map[string][]time.Duration{}
	measure := func(name string, f func()) {
		begin := time.Now()
		f()
		took[name] = append(took[name], time.Since(begin))
	}
	for b.Loop() {
		measure("raw", func() { rawStart(b, ctx, r.client, image) })
		rawRemove(b, ctx, r.client)

		p := pod("sleep 1000", "sleep 1000")
		measure("sandbox", func() { createSandbox(b, r, p) })
		var ids []string
		for i, name := range []string{"ours", "second"} {
			measure(name, func() { ids = append(ids, startContainer(b, r, containerConfig(p, i, 0))) })
		}
		measure("remove", func() {
			for _, id := range ids {
				if err := r.RemoveContainer(b.Context(), id); err != nil {
					b.Fatal(err)
				}
			}
			if err := r.RemoveSandbox(b.Context(), p.UID); err != nil {
				b.Fatal(err)
			}
		})
	}
	for name, ds := range took {
		slices.Sort(ds)
		b.ReportMetric(float64(ds[len(ds)/2])/1e6, name+"-ms")
	}
	raw, ours := took["raw"], took["ours"]
	b.ReportMetric(float64(ours[len(ours)/2])/float64(raw[len(raw)/2]), "ours/raw")
	b.ReportMetric(0, "ns/op")
}

const rawID = "raw-container"

func rawStart(b *testing.B, ctx context.Context, client *ctrd.Client, image ctrd.Image) {
	b.Helper()
	c, err := client.NewContainer(ctx, rawID, ctrd.WithNewSnapshot(rawID, image),
		ctrd.WithNewSpec(oci.WithImageConfigArgs(image, []string{"sleep 1000"})))
	if err != nil {
		b.Fatal(err)
	}
	task, err := c.NewTask(ctx, cio.NullIO)
	if err != nil {
		b.Fatal(err)
	}
	if err := task.Start(ctx); err != nil {
		b.Fatal(err)
	}
}

func rawRemove(b *testing.B, ctx context.Context, client *ctrd.Client) {
	b.Helper()
	c, err := client.LoadContainer(ctx, rawID)
	if err != nil {
		b.Fatal(err)
	}
	task, err := c.Task(ctx, nil)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := task.Delete(ctx, ctrd.WithProcessKill); err != nil {
		b.Fatal(err)
	}
	if err := c.Delete(ctx, ctrd.WithSnapshotCleanup); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkSupervise measures from nothing to a containerd that answers.
func BenchmarkSupervise(b *testing.B) {
	i := 0
	for b.Loop() {
		i++
		cfg := SupervisorConfig{Dir: fmt.Sprintf("%s/b%d", b.TempDir(), i), RunDir: fmt.Sprintf("%s/b%d", daemon.dir, i), Logger: quiet()}
		sup, err := Supervise(context.Background(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		if err := sup.WaitReady(b.Context()); err != nil {
			b.Fatal(err)
		}
		client, err := ctrd.New(sup.Address())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := client.Version(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		client.Close()
		if err := sup.Stop(b.Context()); err != nil {
			b.Fatal(err)
		}
		if err := WipeContainerd(b.Context(), cfg); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
