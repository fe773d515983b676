package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// shellPod has two containers that go on talking and listening to signals.
const shellPod = `package hello

import apps "k8s.io/api/apps/v1"

shell: apps.#Deployment & {
	apiVersion: "apps/v1"
	kind:       "Deployment"
	metadata: name: "shell"
	spec: {
		selector: matchLabels: app: "shell"
		template: {
			metadata: labels: app: "shell"
			spec: {
				terminationGracePeriodSeconds: 1
				containers: [{
					name:  "main"
					image: "` + busybox + `"
					command: ["sh", "-c", "echo begun; trap 'exit 7' TERM; while :; do echo tick; sleep 0.2; done"]
				}, {
					name:  "side"
					image: "` + busybox + `"
					command: ["sleep", "100000"]
				}]
			}
		}
	}
}
`

// TestKubectl drives a running cluster with a real kubectl, or with several: those in
// DECREE_TEST_KUBECTL, separated like PATH, are tested as well.
func TestKubectl(t *testing.T) {
	l := newLive(t)
	l.push(t, "shell.cue", shellPod)
	for _, path := range append([]string{l.kubectl}, filepath.SplitList(os.Getenv("DECREE_TEST_KUBECTL"))...) {
		t.Run(strings.Trim(strings.ReplaceAll(path, "/", "_"), "_"), func(t *testing.T) {
			l.kubectl = path
			pod := strings.TrimSpace(l.untilGood(t, "$K get pods -l app=shell --field-selector status.phase=Running -o name", func(out string) bool { return strings.Count(out, "\n") == 1 }))
			pod = strings.TrimPrefix(pod, "pod/")
			l.until(t, "$K get pod "+pod, "2/2")
			t.Run("look", func(t *testing.T) { l.kubectlLook(t, pod) })
			t.Run("logs", func(t *testing.T) { l.kubectlLogs(t, pod) })
			t.Run("exec", func(t *testing.T) { l.kubectlExec(t, pod) })
			t.Run("terminal", func(t *testing.T) { l.kubectlTerminal(t, pod) })
			t.Run("refused", func(t *testing.T) { l.kubectlRefused(t, pod) })
			t.Run("restart", func(t *testing.T) { l.kubectlRestart(t, pod) })
			t.Run("delete", func(t *testing.T) { l.kubectlDelete(t, pod) })
		})
	}
	l.kubectl = "kubectl"
	l.end(t)
}

func (l *live) kubectlLook(t *testing.T, pod string) {
	contains(t, l.ok(t, "$K get pods -o wide"), "NOMINATED NODE", "10.98.0.", pod)
	contains(t, l.ok(t, "$K get all -A"), "pod/"+pod, "service/hello", "deployment.apps/shell", "replicaset.apps/hello-")
	contains(t, l.ok(t, "$K describe pod "+pod), "Controlled By:", "ReplicaSet/shell-", "Restart Count:  0", "Assigned default/"+pod, "Started container side")
	contains(t, l.ok(t, "$K get events"), "Started container main")
	contains(t, l.ok(t, "$K get nodes -o wide"), "Ready", "127.0.0.1", "containerd://")
	node := strings.TrimSpace(l.ok(t, "$K get nodes -o name")) // it is of the server's process: both tell of themselves
	contains(t, l.ok(t, "$K get --raw /api/v1/nodes/"+strings.TrimPrefix(node, "node/")+"/proxy/metrics"), "decree_agent_pods ", "decree_netplane_", "decree_dns_", "decree_store_", "go_goroutines ")
	contains(t, l.ok(t, "$K rollout status deployment/shell --timeout=10s"), "successfully rolled out")
	contains(t, l.ok(t, "$K wait --for=condition=Ready pod/"+pod+" --timeout=10s"), "condition met")
}

func (l *live) kubectlLogs(t *testing.T, pod string) {
	contains(t, l.ok(t, "$K logs "+pod+" -c main"), "begun\n", "tick\n")
	if out := l.ok(t, "$K logs "+pod+" -c main --tail=1 --timestamps"); !regexp.MustCompile(`^20\S+Z tick\n$`).MatchString(out) {
		t.Errorf("last line with its time: %q", out)
	}
	followed := l.ok(t, "$K logs -f "+pod+" -c main --tail=0 | head -n 3")
	if followed != "tick\ntick\ntick\n" {
		t.Errorf("followed: %q", followed)
	}
	contains(t, l.refused(t, "$K logs --previous "+pod+" -c main"), "(BadRequest)", "there is no previous log")
	contains(t, l.refused(t, "$K logs "+pod+" -c nope"), "nope is not valid for pod")
}

func (l *live) kubectlExec(t *testing.T, pod string) {
	contains(t, l.ok(t, "$K exec "+pod+" -c side -- hostname"), pod)
	contains(t, l.refused(t, "$K exec "+pod+" -c side -- sh -c 'exit 3'; code=$?; echo code $code; exit $code"), "code 3")
	contains(t, l.refused(t, "$K exec "+pod+" -c side -- /nope"), "no such file or directory")
	data := make([]byte, 5<<20)
	_, _ = rand.Read(data)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := l.script(ctx, bytes.NewReader(data), "$K exec -i "+pod+" -c side -- cat")
	if err != nil || out != string(data) {
		t.Errorf("5 MiB through stdin and stdout: %v, %d bytes came back", err, len(out))
	}
}

// kubectlTerminal needs a terminal on this side too: script makes one.
func (l *live) kubectlTerminal(t *testing.T, pod string) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := l.script(ctx, strings.NewReader("tty; stty size; exit 5\n"),
		`script -qec "stty rows 33 cols 99; $K exec -it `+pod+` -c side -- sh" /dev/null; echo "code $?"`)
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	contains(t, out, "/dev/pts/0", "33 99", "code 5")
}

func (l *live) kubectlRefused(t *testing.T, pod string) {
	git := `deployments.apps "hello" comes from git: source "cluster", hello.cue:`
	contains(t, l.refused(t, "$K scale deployment hello --replicas=3"), git)
	contains(t, l.refused(t, "$K set image deployment/hello hello=other:1"), git)
	contains(t, l.refused(t, "$K delete deployment hello"), git)
	contains(t, l.refused(t, "$K rollout restart deployment/hello"), git)
	contains(t, l.refused(t, "EDITOR=\"sed -i 's/replicas: 2/replicas: 3/'\" $K edit deployment hello"), git)
	contains(t, l.refused(t, "$K get configmap greeting -o yaml | sed s/Hello/Bye/ | $K apply -f -"), `configmaps "greeting" comes from git: source "cluster", greeting.cue:`)
	contains(t, l.refused(t, "$K label pod "+pod+" a=b"), `pods "`+pod+`" is derived from deployments.apps "shell", which comes from git`)
	contains(t, l.refused(t, "$K run new --image="+busybox), "desired state comes from Git")
	contains(t, l.refused(t, "$K port-forward "+pod+" 8080"), "does not serve pods/portforward")
}

func (l *live) kubectlRestart(t *testing.T, pod string) {
	l.ok(t, "$K exec "+pod+" -c main -- kill -TERM 1")
	l.until(t, "$K get pod "+pod, " 2/2 ", " 1 (")
	contains(t, l.ok(t, "$K logs --previous "+pod+" -c main"), "begun\ntick\n")
	contains(t, l.ok(t, "$K describe pod "+pod), "Restart Count:  1", "Exit Code:    7", "exited with 7")
}

func (l *live) kubectlDelete(t *testing.T, pod string) {
	contains(t, l.ok(t, "$K delete pod "+pod), `"`+pod+`" deleted`)
	if out := l.refused(t, "$K get pod "+pod); !strings.Contains(out, "NotFound") {
		t.Errorf("kubectl delete returned before the pod was gone: %s", out)
	}
	l.until(t, "$K get pods -l app=shell", "2/2")
}
