package containerd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent"
)

// testRegistry is an OCI registry on loopback that wants a password.
type testRegistry struct {
	*httptest.Server
	host  string
	blobs atomic.Int32 // downloads
}

func newRegistry(t *testing.T) *testRegistry {
	t.Helper()
	reg := &testRegistry{}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	reg.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if user, password, ok := req.BasicAuth(); !ok || user != "robot" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			reg.blobs.Add(1)
		}
		inner.ServeHTTP(w, req)
	}))
	t.Cleanup(reg.Close)
	reg.host = strings.TrimPrefix(reg.URL, "http://")
	return reg
}

func (reg *testRegistry) push(t *testing.T, repo string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(reg.host+"/"+repo, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithAuth(&authn.Basic{Username: "robot", Password: "secret"})); err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest.String()
}

func TestPull(t *testing.T) {
	r := newRuntime(t)
	reg := newRegistry(t)
	first := reg.push(t, "team/app:v1", busyboxImage())
	image := reg.host + "/team/app:v1"
	good := []agent.RegistryAuth{{Host: "other.example", Username: "x", Password: "y"}, {Host: reg.host, Username: "robot", Password: "secret"}}
	wrong := agent.RegistryAuth{Host: reg.host, Username: "robot", Password: "guess"}
	pull := func(image string, policy corev1.PullPolicy, auth ...agent.RegistryAuth) (string, error) {
		t.Helper()
		return r.PullImage(t.Context(), image, policy, auth)
	}
	if _, err := pull(image, corev1.PullNever, good...); !errors.Is(err, agent.ErrImageNeverPull) {
		t.Errorf("never: %v", err)
	}
	for what, auth := range map[string][]agent.RegistryAuth{"wrong": {wrong}, "none": nil} {
		if _, err := pull(image, corev1.PullIfNotPresent, auth...); !errors.Is(err, agent.ErrImageUnauthorized) || strings.Contains(err.Error(), "guess") {
			t.Errorf("%s credentials: %v", what, err)
		}
	}
	if _, err := pull(reg.host+"/team/app:v9", corev1.PullIfNotPresent, good...); !errors.Is(err, agent.ErrImageNotFound) {
		t.Errorf("missing tag: %v", err)
	}
	want := reg.host + "/team/app@" + first
	ref, err := pull(image, corev1.PullIfNotPresent, append([]agent.RegistryAuth{wrong}, good...)...)
	if err != nil || ref != want {
		t.Fatalf("pull with a wrong and a right password: %q, %v; want %q", ref, err, want)
	}
	fetched := reg.blobs.Load()
	for _, policy := range []corev1.PullPolicy{corev1.PullAlways, corev1.PullIfNotPresent, corev1.PullNever} {
		if ref, err := pull(image, policy, good...); err != nil || ref != want {
			t.Errorf("%s again: %q, %v", policy, ref, err)
		}
	}
	if now := reg.blobs.Load(); now != fetched {
		t.Errorf("%d blobs were fetched again", now-fetched)
	}
	movedTag(t, r, reg, image, want, good)

	p := pod("echo pulled")
	p.Spec.Containers[0].Image = want
	if got := output(t, r, p); got != "pulled\n" {
		t.Errorf("container of the first image by digest: %q", got)
	}
	reg.Close()
	if _, err := pull(image, corev1.PullAlways, good...); !errors.Is(err, agent.ErrRegistryUnreachable) {
		t.Errorf("registry gone, always: %v", err)
	}
	if _, err := pull(image, corev1.PullIfNotPresent, good...); err != nil {
		t.Errorf("registry gone, image present: %v", err)
	}
}

// movedTag pushes another image with the same tag.
func movedTag(t *testing.T, r *Runtime, reg *testRegistry, image, old string, auth []agent.RegistryAuth) {
	t.Helper()
	img, err := mutate.Config(busyboxImage(), v1.Config{Cmd: []string{"echo", "second"}})
	if err != nil {
		t.Fatal(err)
	}
	second := reg.push(t, "team/app:v1", img)
	if ref, err := r.PullImage(t.Context(), image, corev1.PullIfNotPresent, auth); err != nil || ref != old {
		t.Errorf("moved tag, if not present: %q, %v", ref, err)
	}
	if ref, err := r.PullImage(t.Context(), image, corev1.PullAlways, auth); err != nil || !strings.HasSuffix(ref, second) {
		t.Errorf("moved tag, always: %q, %v; want %s", ref, err, second)
	}
	if ref, err := r.PullImage(t.Context(), old, corev1.PullNever, auth); err != nil || ref != old {
		t.Errorf("the old image by digest: %q, %v", ref, err)
	}
}

func TestPlainHTTPOnlyOnLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost:5000": true, "127.0.0.1:5000": true, "[::1]:5000": true, "127.9.9.9": true, "localhost": true,
		"registry.example": false, "10.0.0.1:5000": false, "127.0.0.1.example:5000": false, "docker.io": false,
	} {
		if got, err := isLoopback(host); err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", host, got, err, want)
		}
	}
}

func TestPullFromDeadPort(t *testing.T) {
	r := newRuntime(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	l.Close()
	if _, err := r.PullImage(t.Context(), host+"/a:b", corev1.PullIfNotPresent, nil); !errors.Is(err, agent.ErrRegistryUnreachable) {
		t.Errorf("nobody listens: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.PullImage(ctx, host+"/a:b", corev1.PullIfNotPresent, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestPackImage(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	var one, two bytes.Buffer
	for _, w := range []io.Writer{&one, &two} {
		if err := PackImage(busybox, "example/tool:v1", []string{"id"}, w); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("the same input gave two archives")
	}
	r := newRuntime(t)
	names, err := r.ImportImage(t.Context(), &one)
	if err != nil || len(names) != 1 || names[0] != "docker.io/example/tool:v1" {
		t.Fatalf("import: %v, %v", names, err)
	}
	p := pod("")
	c := &p.Spec.Containers[0]
	c.Image, c.Command, c.Args = "example/tool:v1", nil, nil
	if got := output(t, r, p); got != "uid=65532(nonroot) gid=65532(nonroot) groups=65532(nonroot)\n" {
		t.Errorf("packed image: %q", got)
	}
	dynamic, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	if err := PackImage(dynamic, "example/tool:v1", nil, io.Discard); err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("a dynamic program: %v", err)
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := PackImage(script, "example/tool:v1", nil, io.Discard); err == nil {
		t.Error("a script was packed")
	}
	if _, err := r.ImportImage(t.Context(), strings.NewReader("no archive")); err == nil {
		t.Error("garbage was imported")
	}
}

func TestImages(t *testing.T) {
	r := newRuntime(t)
	all, err := r.Images(t.Context())
	if err != nil || len(all) != 1 || all[0].Name != testImage || !strings.HasPrefix(all[0].Digest, "sha256:") {
		t.Errorf("images: %+v, %v", all, err)
	}
}
