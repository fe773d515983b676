package delivery_test

import (
	"context"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// forge is the built-in repository of a world, on the network, and a clone of it.
type forge struct {
	*world
	env  []string
	url  string
	work string
}

func (w *world) forge(watch time.Duration) *forge {
	w.t.Helper()
	server, err := gitsource.NewServer(gitsource.ServerConfig{
		Dir: filepath.Join(w.dir, "git"), Logger: slog.New(slog.NewTextHandler(w.log, nil)),
		Receiver: &delivery.Receiver{Pipeline: w.pipeline, Watch: watch},
		Identity: func(*http.Request) string { return "ann" },
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := server.Init(w.ctx(), "decree"); err != nil {
		w.t.Fatal(err)
	}
	h := httptest.NewTLSServer(server)
	w.t.Cleanup(h.Close)
	f := &forge{world: w, url: h.URL + "/git/decree.git", work: filepath.Join(w.dir, "work")}
	f.env = []string{"GIT_SSL_CAINFO=" + w.certificate(h)}
	mustGit(w.t, f.env, w.dir, "init", "-q", "-b", "main", f.work)
	mustGit(w.t, f.env, f.work, "remote", "add", "origin", f.url)
	return f
}

// certificate writes the server's certificate into a file.
func (w *world) certificate(h *httptest.Server) string {
	name := filepath.Join(w.dir, fmt.Sprintf("ca-%p.pem", h))
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw})
	if err := os.WriteFile(name, data, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return name
}

// write makes a commit in a work tree and returns its hash.
func write(t *testing.T, work, name, text string) string {
	t.Helper()
	path := filepath.Join(work, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	mustGit(t, nil, work, "add", "-A")
	mustGit(t, nil, work, "commit", "-q", "--allow-empty", "-m", "write "+name)
	return mustGit(t, nil, work, "rev-parse", "HEAD")
}

func (f *forge) push() (string, error) { return git(f.t, f.env, f.work, "push", "origin", "main") }

func (f *forge) mustPush() string {
	f.t.Helper()
	out, err := f.push()
	if err != nil {
		f.t.Fatalf("push: %v\n%s", err, out)
	}
	return out
}

const webApp = `package shop
import "decree.dev/app"
web: app.#App & {name: "web", image: "decree.dev/hello:v1", port: 8080, replicas: 2}
`

// heal plays controller and node: it makes the Deployment "web" healthy step by step.
func (w *world) heal(steps ...int32) {
	key := api.Key{Resource: api.Deployments, Namespace: "default", Name: "web"}
	w.await("there is a deployment", func(r api.Reader) bool { _, ok := r.Get(key); return ok })
	for _, ready := range steps {
		d, _ := api.Get[*appsv1.Deployment](w.store.View(), "default", "web")
		d = api.Clone(d)
		d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: 2, UpdatedReplicas: 2, ReadyReplicas: ready, AvailableReplicas: ready}
		w.mutate(api.Guarded(api.UpdateStatus, d))
	}
}

func TestPushToHealthy(t *testing.T) {
	f := newWorld(t).forge(20 * time.Second)
	hash := write(t, f.work, "shop.cue", webApp)
	go f.heal(0, 1, 2)
	out := f.mustPush()
	contains(t, out, "remote: ", `deployments.apps "default/web"`, hash[:7]+" is in force", "2 of 2 ready", "healthy after")
	if f.source("decree").Status.Applied != hash {
		t.Error("it is not in force")
	}
	if r := f.revisions("decree")[0]; r.Pusher != "ann" || !strings.HasPrefix(r.Author, "Ann") {
		t.Errorf("%+v", r)
	}
	if got := mustGit(t, f.env, f.work, "ls-remote", "origin", "refs/heads/main"); !strings.HasPrefix(got, hash) {
		t.Errorf("main is at %s", got)
	}
}

func TestPushOfBarePod(t *testing.T) {
	f := newWorld(t).forge(20 * time.Second)
	write(t, f.work, "pod.cue", `package shop
pod: {apiVersion: "v1", kind: "Pod", metadata: name: "one", spec: containers: [{name: "c", image: "decree.dev/hello:v1"}]}
`)
	go func() {
		key := api.Key{Resource: api.Pods, Namespace: "default", Name: "one"}
		f.await("there is a pod", func(r api.Reader) bool { _, ok := r.Get(key); return ok })
		o, _ := f.store.View().Get(key)
		p := api.Clone(o.(*corev1.Pod))
		p.Status.Phase = corev1.PodRunning
		api.SetPodCondition(p, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue}, time.Now())
		f.mutate(api.Guarded(api.UpdateStatus, p))
	}()
	contains(t, f.mustPush(), `pods "default/one": ready`, "healthy after")
}

func TestPushThatDoesNotBecomeHealthy(t *testing.T) {
	f := newWorld(t).forge(100 * time.Millisecond)
	hash := write(t, f.work, "shop.cue", webApp)
	go f.heal(1)
	contains(t, f.mustPush(), "1 ready", "not healthy after 100ms", "stays in force")
	if f.source("decree").Status.Applied != hash {
		t.Error("it is not in force")
	}
}

func TestRefusedPush(t *testing.T) {
	f := newWorld(t).forge(time.Second)
	good := write(t, f.work, "shop.cue", "package shop\n"+configMap("a", "1"))
	f.mustPush()
	revision := f.store.View().Revision()
	write(t, f.work, "shop.cue", "package shop\n"+strings.ReplaceAll(configMap("a", "1"), `"1"`, "1"))
	for range 2 {
		out, err := f.push()
		if err == nil {
			t.Fatal("it was accepted")
		}
		contains(t, out, "shop.cue:2:", "refused, nothing has changed", "remote rejected")
	}
	if now := f.store.View().Revision(); now != revision+1 {
		t.Errorf("two refused pushes moved the state from %d to %d", revision, now)
	}
	if f.source("decree").Status.Applied != good {
		t.Error("another commit is in force")
	}
	// The next good one follows the last good one.
	write(t, f.work, "shop.cue", "package shop\n"+configMap("a", "2"))
	f.mustPush()
	if revs := f.revisions("decree"); len(revs) != 3 || revs[2].Parent != good {
		t.Errorf("%+v", revs)
	}
}

func TestPushToSuspendedSource(t *testing.T) {
	f := newWorld(t).forge(time.Second)
	src := api.Clone(f.source("decree"))
	src.Status.Suspended = &api.Suspension{By: "bob", At: metav1.Now()}
	f.mutate(api.Guarded(api.UpdateStatus, src))
	write(t, f.work, "shop.cue", "package shop\n"+configMap("a", "1"))
	out, err := f.push()
	if err == nil {
		t.Fatal("it was accepted")
	}
	contains(t, out, "suspended by bob", "decree source resume decree")
	if len(f.revisions("decree")) != 0 || f.exists(api.ConfigMaps, "a") {
		t.Error("something has changed")
	}
}

func TestPusherGoesAwayDuringRollout(t *testing.T) {
	f := newWorld(t).forge(time.Hour)
	hash := write(t, f.work, "shop.cue", webApp)
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "git", "push", "origin", "main")
	cmd.Dir, cmd.Env = f.work, append(os.Environ(), f.env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.await("the commit is in force", func(r api.Reader) bool {
		src, _ := api.Get[*api.Source](r, "", "decree")
		return src.Status.Applied == hash
	})
	cancel()
	_ = cmd.Wait()
	// Nobody waits for the rollout any more: the next push is taken.
	write(t, f.work, "shop.cue", "package shop\n"+configMap("a", "1"))
	f.mustPush()
	if !f.exists(api.ConfigMaps, "a") || f.exists(api.Deployments, "web") {
		t.Error("the second push is not in force")
	}
}

// Two people push from the same parent: the second is told to fetch.
func TestPushFromOldParent(t *testing.T) {
	f := newWorld(t).forge(time.Second)
	write(t, f.work, "base.cue", "package shop\n"+configMap("base", "1"))
	f.mustPush()
	other := filepath.Join(f.dir, "other")
	mustGit(t, f.env, f.dir, "clone", "-q", f.url, other)
	write(t, f.work, "left.cue", "package shop\n"+configMap("left", "1"))
	f.mustPush()
	write(t, other, "right.cue", "package shop\n"+configMap("right", "1"))
	if out, err := git(t, f.env, other, "push", "origin", "main"); err == nil {
		t.Fatalf("accepted:\n%s", out)
	}
	mustGit(t, f.env, other, "pull", "-q", "--rebase", "origin", "main")
	mustGit(t, f.env, other, "push", "-q", "origin", "main")
	if !f.exists(api.ConfigMaps, "left") || !f.exists(api.ConfigMaps, "right") {
		t.Error("something was lost")
	}
}
