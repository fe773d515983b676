package main

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// busybox is the image of the tests' pods: a shell and its tools.
const busybox = "test.local/busybox:1"

// live is a running cluster with a clone of its repository in w.dir/repo.
type live struct {
	*world
	kubectl string
}

// newLive starts a cluster that has the busybox image and examples/hello.
func newLive(t *testing.T) *live {
	t.Helper()
	w := newWorld(t)
	writeImage(t, filepath.Join(w.dir, "bin/images/busybox.tar"))
	w.up(t)
	path, err := filepath.Abs(root + "/bin/debian/usr/bin/kubectl")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v; run: go tool task setup-test", err)
	}
	l := &live{world: w, kubectl: path}
	l.must(t, "export PATH=$PWD/bin:$PATH KUBECONFIG="+filepath.Join(w.data, "admin.kubeconfig"))
	l.must(t, "git clone -q decree://127.0.0.1:7443/cluster repo")
	return l
}

// end stops the cluster and sees that nothing is left.
func (l *live) end(t *testing.T) {
	t.Helper()
	l.stop(t)
	l.must(t, "cd "+l.dir+" && decree down --purge")
	l.nothingLeft(t)
}

// push commits one file and pushes it. It returns what the push said.
func (l *live) push(t *testing.T, file, content string) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, "repo", file), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return l.must(t, "cd "+l.dir+"/repo && git add -A && git commit -qm "+file+" && git push")
}

// read returns a file of the clone.
func (l *live) read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(l.dir, "repo", file))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// script runs a script of its own, beside others, with the cluster's programs and
// credentials. It returns both outputs.
func (l *live) script(ctx context.Context, stdin io.Reader, script string) (string, error) {
	cmd := l.command("bash", "-c", script)
	bounded := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
	bounded.Dir, bounded.Stdin, bounded.WaitDelay = cmd.Dir, stdin, time.Second
	bounded.Env = append(cmd.Env, "PATH="+l.dir+"/bin:"+os.Getenv("PATH"), "KUBECONFIG="+filepath.Join(l.data, "admin.kubeconfig"), "K="+l.kubectl)
	out, err := bounded.CombinedOutput()
	return string(out), err
}

// ok runs a script that has to succeed within 20 seconds.
func (l *live) ok(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := l.script(ctx, nil, script)
	if err != nil {
		t.Errorf("%s: %v\n%s", script, err, out)
	}
	return out
}

// refused runs a script that has to fail, and returns what it says.
func (l *live) refused(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := l.script(ctx, nil, script)
	if err == nil {
		t.Errorf("%s: succeeded\n%s", script, out)
	}
	return out
}

// until repeats a looking script until its output has all parts. Unlike
// eventually it can be used by parallel tests.
func (l *live) until(t *testing.T, script string, parts ...string) string {
	t.Helper()
	return l.untilGood(t, script, func(out string) bool {
		for _, p := range parts {
			if !strings.Contains(out, p) {
				return false
			}
		}
		return true
	})
}

func (l *live) untilGood(t *testing.T, script string, good func(string) bool) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 45*time.Second)
	defer cancel()
	for {
		out, err := l.script(ctx, nil, script)
		if err == nil && good(out) {
			return out
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not as wanted after 45 s (%v):\n%s", script, err, out)
		case <-time.After(200 * time.Millisecond): // polling a command line: there is no event to await
		}
	}
}

// writeImage writes the busybox image as an archive.
func writeImage(t *testing.T, path string) {
	t.Helper()
	tag, err := name.NewTag(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(path, tag, busyboxImage(t)); err != nil {
		t.Fatal(err)
	}
}

// busyboxImage has busybox under the names of all of its applets.
func busyboxImage(t *testing.T) v1.Image {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v; run: go tool task setup", err)
	}
	binary, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	applets, err := exec.Command(path, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	add := func(h tar.Header, data []byte) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	add(tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, binary)
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			add(tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Config = v1.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}
