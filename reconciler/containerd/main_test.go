package containerd

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
)

const testImage = "test.local/busybox:1"

// daemon is the containerd that the tests share.
var daemon struct {
	dir string
	cfg SupervisorConfig
	sup *Supervisor
}

func TestMain(m *testing.M) {
	code, err := withDaemon(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func withDaemon(run func() int) (int, error) {
	if os.Getuid() != 0 {
		return 0, fmt.Errorf("these tests start containers and must run as root (run: sudo go test ./reconciler/containerd)")
	}
	for _, bin := range []string{"containerd", "containerd-shim-runc-v2", "runc", "busybox"} {
		if _, err := exec.LookPath(bin); err != nil {
			return 0, fmt.Errorf("%s is missing (run: go tool task setup)", bin)
		}
	}
	dir, err := os.MkdirTemp("", "dctr-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	daemon.dir = dir
	daemon.cfg = SupervisorConfig{Dir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), Logger: quiet()}
	if daemon.sup, err = Supervise(context.Background(), daemon.cfg); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := daemon.sup.WaitReady(ctx); err != nil {
		return 0, err
	}
	code := run()
	ctx, cancel = context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := daemon.sup.Stop(ctx); err != nil {
		return 0, err
	}
	return code, WipeContainerd(ctx, daemon.cfg)
}

func quiet() *slog.Logger {
	level := slog.LevelError
	if testing.Testing() && os.Getenv("DECREE_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// testConfig is a Runtime configuration that nothing else uses.
func testConfig(t testing.TB) Config {
	t.Helper()
	id := randomID()
	cfg := Config{
		Address: daemon.cfg.address(), Namespace: "test-" + id,
		Dir: filepath.Join(daemon.dir, "rt-"+id), RunDir: filepath.Join(daemon.dir, "r-"+id),
		CgroupParent: "/decree-test-" + id, Logger: quiet(),
	}
	return cfg
}

func openRuntime(t testing.TB, cfg Config) *Runtime {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// newRuntime returns a Runtime that holds the busybox image and is purged at the end.
func newRuntime(t testing.TB) *Runtime {
	t.Helper()
	cfg := testConfig(t)
	t.Cleanup(func() {
		r, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.Purge(ctx); err != nil {
			t.Error(err)
		}
		assertNothingLeft(t, cfg)
	})
	r := openRuntime(t, cfg)
	importBusybox(t, r)
	return r
}

func importBusybox(t testing.TB, r *Runtime) {
	t.Helper()
	names, err := r.ImportImage(t.Context(), bytes.NewReader(busyboxTar()))
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 1 || names[0] != testImage {
		t.Fatalf("imported %v, want %s", names, testImage)
	}
}

var busyboxTar = sync.OnceValue(func() []byte {
	ref, err := name.NewTag(testImage)
	if err != nil {
		panic(err)
	}
	var buf bytes.Buffer
	if err := tarball.Write(ref, busyboxImage(), &buf); err != nil {
		panic(err)
	}
	return buf.Bytes()
})

// busyboxImage has busybox with its applets, a user database and a shadowed user.
var busyboxImage = sync.OnceValue(func() v1.Image {
	path, err := exec.LookPath("busybox")
	if err != nil {
		panic(err)
	}
	binary, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	files := []tar.Header{
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, {Name: "proc/", Typeflag: tar.TypeDir, Mode: 0o555},
	}
	for _, applet := range strings.Fields("sh echo sleep cat readlink id ls wc seq yes head dd true false stty kill hostname awk grep mount nc printf ip test date") {
		files = append(files, tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777})
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range files {
		if err := tw.WriteHeader(&h); err != nil {
			panic(err)
		}
	}
	for path, data := range map[string][]byte{
		"bin/busybox": binary,
		"etc/passwd":  []byte("root:x:0:0:root:/:/bin/sh\nweb:x:1234:2345:web:/:/bin/sh\n"),
		"etc/group":   []byte("root:x:0:\nweb:x:2345:\nlogs:x:3456:web\n"),
	} {
		if err := tw.WriteHeader(&tar.Header{Name: path, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(data))}); err != nil {
			panic(err)
		}
		if _, err := tw.Write(data); err != nil {
			panic(err)
		}
	}
	if err := tw.Close(); err != nil {
		panic(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		panic(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		panic(err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		panic(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", goarch()
	file.Config.Env = []string{"PATH=/bin", "FROM=image"}
	file.Config.Entrypoint = []string{"/bin/sh", "-c"}
	file.Config.Cmd = []string{"echo from the image"}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		panic(err)
	}
	return img
})

// pod returns a pod with containers that run shell scripts.
func pod(scripts ...string) *corev1.Pod {
	id := randomID()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "pod-" + id, Namespace: "default", UID: types.UID("uid-" + id)}}
	for i, s := range scripts {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{
			Name: fmt.Sprintf("c%d", i), Image: testImage, Command: []string{"sh", "-c"}, Args: []string{s},
		})
	}
	return p
}

func containerConfig(p *corev1.Pod, i, attempt int) agent.ContainerConfig {
	c := &p.Spec.Containers[i]
	return agent.ContainerConfig{
		Pod: p, Container: c, Attempt: attempt, ImageRef: c.Image, Hostname: p.Name, Hash: "h",
		Args: append(append([]string{}, c.Command...), c.Args...),
	}
}

func createSandbox(t testing.TB, r *Runtime, p *corev1.Pod) agent.Sandbox {
	t.Helper()
	s, err := r.CreateSandbox(t.Context(), agent.SandboxConfig{Pod: p, Hostname: p.Name, HostNet: p.Spec.HostNetwork})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start makes the sandbox and starts all containers; it returns their ids.
func start(t testing.TB, r *Runtime, p *corev1.Pod) []string {
	t.Helper()
	createSandbox(t, r, p)
	var ids []string
	for i := range p.Spec.Containers {
		ids = append(ids, startContainer(t, r, containerConfig(p, i, 0)))
	}
	return ids
}

func startContainer(t testing.TB, r *Runtime, cfg agent.ContainerConfig) string {
	t.Helper()
	id, err := r.CreateContainer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	return id
}

// find returns the container with an id from List.
func find(t testing.TB, r *Runtime, id string) agent.Container {
	t.Helper()
	all, err := r.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		for _, c := range s.Containers {
			if c.ID == id {
				return c
			}
		}
	}
	t.Fatalf("container %s is not listed in %+v", id, all)
	return agent.Container{}
}

// waitFor lists at every event until cond holds.
func waitFor(t testing.TB, r *Runtime, id string, what string, cond func(agent.Container) bool) agent.Container {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		c := find(t, r, id)
		if cond(c) {
			return c
		}
		select {
		case <-r.Events():
		case <-ctx.Done():
			t.Fatalf("container %s did not become %s: %+v", id, what, c)
		}
	}
}

func waitExit(t testing.TB, r *Runtime, id string) agent.Container {
	t.Helper()
	return waitFor(t, r, id, "exited", func(c agent.Container) bool { return c.State == agent.Exited })
}

// output runs a script in a pod of its own and returns what it printed.
func output(t testing.TB, r *Runtime, p *corev1.Pod) string {
	t.Helper()
	start(t, r, p)
	return logs(t, r, p, "c0", agent.LogOptions{Follow: true, TailLines: -1})
}

func logs(t testing.TB, r *Runtime, p *corev1.Pod, container string, opts agent.LogOptions) string {
	t.Helper()
	var buf bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Logs(ctx, p.UID, container, opts, &buf); err != nil {
		t.Fatal(err)
	}
	return buf.String()
}

// execOut runs a command in a container and returns its output and exit code.
func execOut(t testing.TB, r *Runtime, id string, command ...string) (string, int) {
	t.Helper()
	var buf bytes.Buffer
	code, err := r.Exec(t.Context(), id, agent.ExecConfig{Command: command, Stdout: &buf, Stderr: &buf, Timeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return buf.String(), code
}
