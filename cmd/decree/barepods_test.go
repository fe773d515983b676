package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// bare is a pod without an owner, with one container.
func bare(podName, spec, container string) string {
	return fmt.Sprintf(`%[1]s: core.#Pod & {
	apiVersion: "v1"
	kind:       "Pod"
	metadata: name: %[1]q
	spec: {
		terminationGracePeriodSeconds: 1
		%[2]s
		containers: [{name: "main", %[3]s}]
	}
}
`, podName, spec, container)
}

// TestBarePods pushes pods that no controller owns: one that ends, one whose image
// needs credentials, the same without, one with volumes, and one that fits nowhere.
func TestBarePods(t *testing.T) {
	l := newLive(t)
	address, _ := privateRegistry(t, l)
	auth := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, address, base64.StdEncoding.EncodeToString([]byte("robot:secret")))
	image := func(script string) string {
		return fmt.Sprintf(`image: %q, command: ["sh", "-c", %q]`, busybox, script)
	}
	private := fmt.Sprintf(`image: "%s/team/app:v1", imagePullPolicy: "Always", command: ["sleep", "1000"]`, address)
	text := fmt.Sprintf(`package hello

import core "k8s.io/api/core/v1"

pull: core.#Secret & {
	apiVersion: "v1"
	kind:       "Secret"
	metadata: name: "pull"
	type: "kubernetes.io/dockerconfigjson"
	stringData: ".dockerconfigjson": %q
}
settings: core.#ConfigMap & {
	apiVersion: "v1"
	kind:       "ConfigMap"
	metadata: name: "settings"
	data: mode: "fast"
}
`, auth)
	text += bare("once", `restartPolicy: "Never"`, image("echo said once; exit 3"))
	text += bare("private", `imagePullSecrets: [{name: "pull"}]`, private)
	text += bare("stranger", "", private)
	text += bare("nowhere", `nodeSelector: disk: "ssd"`, image("sleep 1000"))
	text += bare("volumes", `volumes: [{name: "scratch", emptyDir: {}}, {name: "settings", configMap: name: "settings"}, {name: "pull", secret: secretName: "pull"}]
		initContainers: [{name: "first", volumeMounts: [{name: "scratch", mountPath: "/scratch"}], `+image("echo from init > /scratch/file")+`}]`,
		image("cat /scratch/file; echo $(cat /settings/mode); sleep 1000")+`
			volumeMounts: [{name: "scratch", mountPath: "/scratch"}, {name: "settings", mountPath: "/settings"}, {name: "pull", mountPath: "/pull"}]
			startupProbe: {exec: command: ["test", "-f", "/scratch/started"], periodSeconds: 1, failureThreshold: 60}`)
	l.push(t, "pods.cue", text)

	l.until(t, "$K get pod once", "0/1", "Error", " 0 ")
	contains(t, l.ok(t, "$K logs once"), "said once")
	l.until(t, "$K get pod private", "1/1", "Running")
	l.until(t, "$K get pod stranger", "0/1", "ImagePull")
	contains(t, l.ok(t, "$K describe pod stranger"), "check the pull secret")
	contains(t, l.ok(t, "decree status"), "nowhere", "does not match the nodeSelector disk=ssd")
	l.until(t, "$K get pod volumes", "0/1", "Running") // its startup probe has not passed
	contains(t, l.ok(t, "$K logs volumes"), "from init\nfast")
	contains(t, l.ok(t, "$K exec volumes -- cat /pull/.dockerconfigjson"), address)
	l.ok(t, "$K exec volumes -- touch /scratch/started")
	l.until(t, "$K get pod volumes", "1/1", "Running")
	contains(t, l.ok(t, "$K get events --field-selector involvedObject.name=once"), "Assigned default/once")

	l.must(t, "git rm -q pods.cue && git commit -qm 'no pods' -m 'Decree-Allow-Deletions: all' && git push")
	l.untilGood(t, "$K get pods -o name", func(out string) bool { return strings.Count(out, "\n") == lines(strings.ReplaceAll(out, "pod/", "")) })
	l.end(t)
}

// TestBombIsNotNoticed pushes a text of 1 GB to a running cluster that serves requests.
func TestBombIsNotNoticed(t *testing.T) {
	l := newLive(t)
	ip := strings.TrimSpace(l.must(t, "decree get service hello -o jsonpath={.spec.clusterIP}"))
	s := startLoad(t, l, "http://"+ip+"/")
	var bomb strings.Builder
	bomb.WriteString("package hello\n\nx0: \"0123456789abcdef\"\n")
	for i := range 26 {
		fmt.Fprintf(&bomb, "x%d: \"\\(x%d)\\(x%d)\"\n", i+1, i, i)
	}
	before := l.ok(t, "decree get pods -o name")
	looked := make(chan time.Duration, 1)
	done := make(chan struct{})
	go func() { // the API goes on answering too
		var worst time.Duration
		for {
			start := time.Now()
			_ = l.ok(t, "$K get --raw /readyz")
			worst = max(worst, time.Since(start))
			select {
			case <-done:
				looked <- worst
				return
			default:
			}
		}
	}()
	path := filepath.Join(l.dir, "repo", "bomb.cue")
	if err := os.WriteFile(path, []byte(bomb.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	out, code := l.run(t, "cd "+l.dir+"/repo && git add -A && git commit -qm bomb && git push")
	close(done)
	if code == 0 {
		t.Errorf("the bomb was accepted:\n%s", out)
	}
	contains(t, out, "than the limit of", "nothing has changed") // of memory, or of time on a busy machine
	if worst := <-looked; worst > 5*time.Second {
		t.Errorf("the API took %s to answer meanwhile", worst)
	}
	s.check(t)
	after := l.ok(t, "decree get pods -o name")
	if after != before {
		t.Errorf("pods changed from\n%s\nto\n%s", before, after)
	}
	l.end(t)
}
