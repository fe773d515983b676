package apiserver_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// kubectls are the kubectl binaries to test with: Debian's, which `task setup-test`
// unpacks, and the one in PATH if there is one.
func kubectls(t *testing.T) map[string]string {
	t.Helper()
	debian, err := filepath.Abs("../../bin/debian/usr/bin/kubectl")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{"debian": debian}
	if _, err := os.Stat(debian); err != nil {
		t.Fatalf("%v; run: go tool task setup-test", err)
	}
	if path, err := exec.LookPath("kubectl"); err == nil {
		found["path"] = path
	}
	return found
}

// kubectl is one binary at work on one fixture.
type kubectl struct {
	f      *fixture
	t      *testing.T
	binary string
	home   string
}

func (k *kubectl) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, k.binary, args...)
	cmd.Env = []string{"HOME=" + k.home, "KUBECONFIG=" + k.f.kubeconfig, "PATH=" + os.Getenv("PATH")}
	return cmd
}

func (k *kubectl) try(stdin string, args ...string) (stdout, stderr string, err error) {
	var out, errs bytes.Buffer
	cmd := k.command(timeout(k.t), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// run expects success without noise.
func (k *kubectl) run(args ...string) string {
	k.t.Helper()
	out, errs, err := k.try("", args...)
	if err != nil || errs != "" {
		k.t.Fatalf("kubectl %s: %v\nstderr: %s\nstdout: %s\nserver: %s", strings.Join(args, " "), err, errs, out, k.f.logs)
	}
	return out
}

func want(t *testing.T, text string, parts ...string) {
	t.Helper()
	squeezed := strings.Join(strings.Fields(text), " ")
	for _, p := range parts {
		if !strings.Contains(squeezed, p) {
			t.Errorf("missing %q in:\n%s", p, text)
		}
	}
}

func TestKubectl(t *testing.T) {
	for name, binary := range kubectls(t) {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.create(newNode("n1"), typed(&api.Source{}, "", "shop"))
			dep := newDeployment("web")
			f.push("shop", commitHash, dep)
			rs := replicaSetOf(f, "web")
			f.create(rs)
			pod := newPod("web-1", "n1")
			own(f, pod, rs.Name)
			f.create(pod, newPod("web-2", "n1"), newConfigMap("settings", "1"))
			f.create(eventFor(f, "web-1"))
			f.running("web-1")
			k := &kubectl{f: f, t: t, binary: binary, home: t.TempDir()}
			t.Run("read", k.testRead)
			t.Run("describe", k.testDescribe)
			t.Run("watch", k.testWatch)
			t.Run("logs", k.testLogs)
			t.Run("exec", k.testExec)
			t.Run("write", k.testWrite)
			t.Run("delete", k.testDelete)
		})
	}
}

func (k *kubectl) testRead(t *testing.T) {
	k.t = t
	want(t, k.run("get", "pods"), "NAME READY STATUS RESTARTS AGE web-1 1/1 Running 1 ")
	want(t, k.run("get", "pods", "-o", "wide"), "IP NODE NOMINATED NODE READINESS GATES", "10.98.0.2 n1 <none> <none>")
	want(t, k.run("get", "po", "web-1", "-o", "json"), `"nodeName": "n1"`, `"kind": "Pod"`)
	want(t, k.run("get", "pods", "-o", "yaml"), "kind: List", "nodeName: n1")
	want(t, k.run("get", "pods", "-o", "name"), "pod/web-1 pod/web-2")
	want(t, k.run("get", "pods", "-A", "-l", "app=web", "--field-selector", "status.phase=Running", "--no-headers"), "default web-1 1/1 Running")
	want(t, k.run("get", "pods", "--show-labels", "--sort-by", ".metadata.name"), "app=web")
	want(t, k.run("get", "pods", "--chunk-size=1"), "web-1", "web-2")
	want(t, k.run("get", "all"), "pod/web-1", "deployment.apps/web 0/2")
	want(t, k.run("get", "nodes"), "n1 Ready <none>")
	want(t, k.run("get", "events"), "LAST SEEN TYPE REASON OBJECT MESSAGE", "Normal Started pod/web-1 Started container web")
	want(t, k.run("get", "revisions"), "shop 3f2a1c9 Applied")
	want(t, k.run("api-resources"), "deployments deploy apps", "sources src decree.dev", "pods po")
	want(t, k.run("api-versions"), "apps/v1", "decree.dev/v1", "v1")
	version, _, _ := k.try("", "version", "-o", "json") // newer clients warn of the distance
	want(t, version, `"gitVersion": "v1.37.0+decree.0.1.0"`)
	_, errs, err := k.try("", "get", "pod", "absent")
	if err == nil || !strings.Contains(errs, `Error from server (NotFound): pods "absent" not found`) {
		t.Errorf("get absent: %v, %s", err, errs)
	}
}

func (k *kubectl) testDescribe(t *testing.T) {
	k.t = t
	want(t, k.run("describe", "pod", "web-1"), "Node: n1", "Status: Running", "Controlled By: ReplicaSet/web-5d", "Started container web")
	want(t, k.run("describe", "deployment", "web"), "Name: web", "Replicas: 2 desired", "decree.dev/file: apps/web.cue:14")
	want(t, k.run("describe", "node", "n1"), "Name: n1", "default web-1")
	want(t, k.run("describe", "source"))
	want(t, k.run("describe", "configmap", "settings"), "Name: settings")
}

func (k *kubectl) testWatch(t *testing.T) {
	k.t = t
	ctx, cancel := context.WithCancel(timeout(t))
	defer cancel()
	cmd := k.command(ctx, "get", "pods", "-w", "--no-headers", "-o", "wide")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for i := 0; i < 2 && lines.Scan(); i++ { // what exists
	}
	k.f.create(newPod("web-3", "n1"))
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "web-3 ") {
		t.Errorf("watch shows %q", lines.Text())
	}
	k.f.running("web-3")
	if !lines.Scan() || !strings.Contains(lines.Text(), "Running") {
		t.Errorf("watch shows %q", lines.Text())
	}
	cancel()
	_ = cmd.Wait()
}

func (k *kubectl) testLogs(t *testing.T) {
	k.t = t
	want(t, k.run("logs", "web-1", "--tail=5", "--timestamps", "--since=1h"), "web-1 on n1")
	k.f.nodes.mu.Lock()
	opts := k.f.nodes.last
	k.f.nodes.mu.Unlock()
	if opts.Container != "web" || !opts.Timestamps || *opts.TailLines != 5 || *opts.SinceSeconds != 3600 {
		t.Errorf("options %+v", opts)
	}
	if _, errs, err := k.try("", "logs", "web-1", "--previous"); err == nil || !strings.Contains(errs, "(NotFound)") {
		t.Errorf("previous: %v %s", err, errs)
	}
	if _, errs, err := k.try("", "logs", "web-1", "-c", "none"); err == nil || !strings.Contains(errs, "none") {
		t.Errorf("wrong container: %v %s", err, errs)
	}
	cmd := k.command(timeout(t), "logs", "-f", "web-1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for _, line := range []string{"web-1 on n1", "one", "two"} {
		if line[0] != 'w' {
			k.f.nodes.lines <- line // arrives before the next one is sent
		}
		if !lines.Scan() || lines.Text() != line {
			t.Errorf("log shows %q, want %q", lines.Text(), line)
		}
	}
	close(k.f.nodes.lines)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func (k *kubectl) testExec(t *testing.T) {
	k.t = t
	want(t, k.run("exec", "web-1", "--", "echo", "hello there"), "echo hello there")
	if out, _, err := k.try("from stdin", "exec", "-i", "web-1", "-c", "web", "--", "cat"); err != nil || out != "from stdin" {
		t.Errorf("exec cat: %q, %v", out, err)
	}
	if out := k.run("exec", "web-1", "--", "flood"); len(out) != 1<<20 {
		t.Errorf("%d bytes arrived, want %d", len(out), 1<<20)
	}
	_, errs, err := k.try("", "exec", "web-1", "--", "fail")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || !strings.Contains(errs, "it went wrong") {
		t.Errorf("exec fail: %v, %s", err, errs)
	}
	if _, errs, err = k.try("", "exec", "web-1", "--", "broken"); err == nil || !strings.Contains(errs, "the runtime is gone") {
		t.Errorf("exec broken: %v, %s", err, errs)
	}
	ctx, cancel := context.WithCancel(timeout(t))
	cmd := k.command(ctx, "exec", "web-1", "--", "wait")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-k.f.nodes.started
	cancel() // kubectl is killed: the process in the container must end
	if err := <-k.f.nodes.ended; err == nil {
		t.Error("the exec goes on without its client")
	}
	_ = cmd.Wait()
}

func (k *kubectl) testWrite(t *testing.T) {
	k.t = t
	refused := func(stdin, message string, args ...string) {
		t.Helper()
		out, errs, err := k.try(stdin, args...)
		if err == nil || !strings.Contains(errs, message) {
			t.Errorf("kubectl %s: %v, %s%s; want %s", strings.Join(args, " "), err, errs, out, message)
		}
	}
	place := `deployments.apps "web" comes from git: source "shop", apps/web.cue:14 at 3f2a1c9`
	elsewhere := "desired state comes from Git: write it in a source and push"
	manifest := k.run("get", "deployment", "web", "-o", "yaml")
	refused(strings.Replace(manifest, "replicas: 2", "replicas: 3", 1), place, "apply", "-f", "-")
	refused("", place, "scale", "deployment", "web", "--replicas=5")
	refused("", place, "label", "deployment", "web", "a=b")
	refused("", place, "delete", "deployment", "web")
	refused("", `pods "web-1" is derived from deployments.apps "web", which comes from git: source "shop", apps/web.cue:14`, "label", "pod", "web-1", "a=b")
	refused("", elsewhere, "create", "configmap", "new", "--from-literal=a=b")
	refused("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: new}\n", elsewhere, "apply", "-f", "-")
	if _, ok := k.f.store.View().Get(api.Key{Resource: api.ConfigMaps, Namespace: "default", Name: "new"}); ok {
		t.Error("a config map was created")
	}
	refused("", "nodes are kept by Decree itself", "create", "-f", "-", "--validate=false", "--raw", "/api/v1/nodes")
}

func (k *kubectl) testDelete(t *testing.T) {
	k.t = t
	key := api.Key{Resource: api.Pods, Namespace: "default", Name: "web-2"}
	want(t, k.run("delete", "pod", "web-2", "--wait=false"), `pod "web-2" deleted`)
	o, ok := k.f.store.View().Get(key)
	if ok && o.GetDeletionTimestamp() == nil {
		t.Error("the pod is not terminating")
	}
	want(t, k.run("get", "pods"), "web-2 0/1 Terminating")
	done := make(chan string)
	go func() {
		out, errs, err := k.try("", "delete", "pod", "web-2")
		if err != nil {
			out += errs
		}
		done <- out
	}()
	grace := int64(0)
	k.f.apply(api.Mutation{Verb: api.Delete, Key: key, Grace: &grace}) // the node is done with it
	<-done
	if _, ok := k.f.store.View().Get(key); ok {
		t.Error("the pod is still there")
	}
}

func eventFor(f *fixture, pod string) *corev1.Event {
	e := typed(&corev1.Event{}, "default", pod+".1")
	e.InvolvedObject = corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: "default", Name: pod, FieldPath: "spec.containers{web}"}
	if o, ok := f.store.View().Get(api.Key{Resource: api.Pods, Namespace: "default", Name: pod}); ok {
		e.InvolvedObject.UID = o.GetUID()
	}
	e.Type, e.Reason, e.Message, e.Count = "Normal", "Started", "Started container web", 1
	e.Source = corev1.EventSource{Component: "agent", Host: "n1"}
	e.FirstTimestamp, e.LastTimestamp = metav1.Now(), metav1.Now()
	return e
}

func replicaSetOf(f *fixture, deployment string) *appsv1.ReplicaSet {
	d, _ := api.Get[*appsv1.Deployment](f.store.View(), "default", deployment)
	rs := typed(&appsv1.ReplicaSet{}, "default", deployment+"-5d")
	rs.Spec.Selector, rs.Spec.Template = d.Spec.Selector, d.Spec.Template
	rs.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment"))}
	return rs
}

// own makes the replica set the controller of the pod.
func own(f *fixture, pod *corev1.Pod, replicaSet string) {
	f.t.Helper()
	rs, ok := api.Get[*appsv1.ReplicaSet](f.store.View(), "default", replicaSet)
	if !ok {
		f.t.Fatalf("no replica set %s", replicaSet)
	}
	pod.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(rs, appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))}
}
