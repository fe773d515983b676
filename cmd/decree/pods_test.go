package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"decree.dev/decree/netplane/netspace"
)

// deployment is a manifest of one Deployment with the given pod spec.
func deployment(name, spec string) string {
	return fmt.Sprintf(`
%q: {
	apiVersion: "apps/v1"
	kind:       "Deployment"
	metadata: name: %[1]q
	spec: {
		selector: matchLabels: app: %[1]q
		template: {
			metadata: labels: app: %[1]q
			spec: {%s}
		}
	}
}
`, name, spec)
}

// shell is a container that runs a script.
func shell(name, script string, more ...string) string {
	return fmt.Sprintf(`{name: %q, image: %q, command: ["sh", "-c", %q], %s}`, name, busybox, script, strings.Join(more, ", "))
}

// manifests are the pods that TestPods looks at, all pushed at once.
func manifests(host, digest string) string {
	const forever = "trap exit TERM; while :; do sleep 0.1; done"
	auth := base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `{"auths":{%q:{"username":"robot","password":"secret"}}}`, host))
	pulled := func(name, image, policy, more string) string {
		return deployment(name, fmt.Sprintf(`containers: [{name: "main", image: %q, imagePullPolicy: %q, command: ["sleep", "1000"]}], terminationGracePeriodSeconds: 1, %s`, image, policy, more))
	}
	return `package pods

config: {apiVersion: "v1", kind: "ConfigMap", metadata: name: "config", data: {colour: "blue", other: "x"}}
secret: {apiVersion: "v1", kind: "Secret", metadata: name: "secret", stringData: password: "hunter2"}
login: {apiVersion: "v1", kind: "Secret", metadata: name: "login", type: "kubernetes.io/dockerconfigjson", data: ".dockerconfigjson": "` + auth + `"}
webService: {apiVersion: "v1", kind: "Service", metadata: name: "web", spec: {selector: app: "web", ports: [{port: 80, targetPort: 8080}]}}
` + deployment("shared", `
	initContainers: [`+shell("init", "echo from-init >/data/init", `volumeMounts: [{name: "data", mountPath: "/data"}]`)+`]
	containers: [`+shell("one", "echo from-one >/data/one; "+forever,
		`env: [{name: "COLOUR", valueFrom: configMapKeyRef: {name: "config", key: "colour"}}, {name: "PASSWORD", valueFrom: secretKeyRef: {name: "secret", key: "password"}}, {name: "POD", valueFrom: fieldRef: fieldPath: "metadata.name"}, {name: "MIX", value: "$(COLOUR)-$(POD)"}]`,
		`resources: {requests: {cpu: "100m", memory: "16Mi"}, limits: {cpu: "250m", memory: "32Mi"}}`,
		`volumeMounts: [{name: "data", mountPath: "/data"}, {name: "config", mountPath: "/config"}, {name: "secret", mountPath: "/secret", readOnly: true}]`)+`,
		`+shell("two", "httpd -f -p 9000 -h /data", `volumeMounts: [{name: "data", mountPath: "/data", readOnly: true}]`)+`]
	volumes: [{name: "data", emptyDir: {}}, {name: "config", configMap: name: "config"}, {name: "secret", secret: {secretName: "secret", defaultMode: 256}}]`) +
		deployment("alive", `containers: [`+shell("main", "touch /tmp/ok; "+forever, `livenessProbe: {exec: command: ["test", "-e", "/tmp/ok"], periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 2}`)+`], terminationGracePeriodSeconds: 1`) +
		deployment("web", `containers: [`+shell("main", "touch /tmp/ready; hostname >/tmp/index.html; httpd -f -p 8080 -h /tmp",
			`readinessProbe: {exec: command: ["test", "-e", "/tmp/ready"], periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 1}`)+`], terminationGracePeriodSeconds: 1`) +
		deployment("slow", `containers: [`+shell("main", "sleep 3; touch /tmp/up; "+forever,
			`startupProbe: {exec: command: ["test", "-e", "/tmp/up"], periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 20}`,
			`livenessProbe: {exec: command: ["test", "-e", "/tmp/up"], periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 1}`)+`]`) +
		deployment("crash", `containers: [`+shell("main", "echo no; exit 4")+`]`) +
		deployment("polite", `containers: [`+shell("main", "trap 'echo term; sleep 0.5; echo bye; exit' TERM; echo up; while :; do sleep 0.1; done",
			`lifecycle: preStop: exec: command: ["sh", "-c", "echo hook >/proc/1/fd/1"]`)+`]`) +
		`once: {apiVersion: "v1", kind: "Pod", metadata: name: "once", spec: {restartPolicy: "Never", containers: [` + shell("main", "echo done; exit 3") + `]}}
` + pulled("absent", host+"/team/none:v1", "IfNotPresent", `imagePullSecrets: [{name: "login"}]`) +
		pulled("locked", host+"/team/app:v1", "Always", "") +
		pulled("tag", host+"/team/app:v1", "Always", `imagePullSecrets: [{name: "login"}]`) +
		pulled("digest", host+"/team/app@"+digest, "IfNotPresent", `imagePullSecrets: [{name: "login"}]`) +
		pulled("never", host+"/team/other:v1", "Never", "")
}

// privateRegistry serves an image inside the world's network, to those who log in.
func privateRegistry(t *testing.T, l *live) (host, digest string) {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); !ok || user != "robot" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	})}
	netns := filepath.Join("/run/netns", l.netns)
	var listener net.Listener
	if err := netspace.Do(netns, func() (err error) {
		listener, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(listener) }()
	t.Cleanup(func() { srv.Close(); <-served })
	host = listener.Addr().String()
	ref, err := name.ParseReference(host+"/team/app:v1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	inside := &http.Transport{DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = netspace.Do(netns, func() (err error) { conn, err = (&net.Dialer{}).DialContext(ctx, network, address); return err })
		return conn, err
	}}
	defer inside.CloseIdleConnections()
	img := busyboxImage(t)
	if err := remote.Write(ref, img, remote.WithTransport(inside), remote.WithAuth(&authn.Basic{Username: "robot", Password: "secret"})); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return host, d.String()
}

// TestPods pushes pods of every sort at once and looks at each.
func TestPods(t *testing.T) {
	l := newLive(t)
	host, digest := privateRegistry(t, l)
	l.must(t, "cd "+l.dir+"/repo && git rm -q hello.cue greeting.cue")
	if err := os.WriteFile(filepath.Join(l.dir, "repo/pods.cue"), []byte(manifests(host, digest)), 0o644); err != nil {
		t.Fatal(err)
	}
	// The push does not become healthy, as some of these pods never do: do not wait.
	contains(t, l.must(t, "git add -A && git commit -qm pods && { timeout 5 git push 2>&1 || true; }"), "is in force")
	if t.Failed() {
		return
	}
	var group sync.WaitGroup // not t.Parallel: most of the time is waiting
	for name, check := range map[string]func(*testing.T, *live){
		"shared": sharedPod, "isolation": isolation, "liveness": liveness, "readiness": readiness, "startup": startup,
		"crash": crashLoop, "never": neverRestarted, "termination": termination, "pulls": pulls, "names": names,
	} {
		group.Go(func() { t.Run(name, func(t *testing.T) { check(t, l) }) })
	}
	group.Wait()
	l.end(t)
}

// in is the beginning of a script that runs a command in a deployment's pod.
func in(app, container string) string {
	return "$K exec deployment/" + app + " -c " + container + " -- "
}

func sharedPod(t *testing.T, l *live) {
	l.until(t, "$K get pods -l app=shared", "2/2")
	one, two := in("shared", "one"), in("shared", "two")
	for _, ns := range []string{"net", "ipc", "uts"} {
		if a, b := l.ok(t, one+"readlink /proc/self/ns/"+ns), l.ok(t, two+"readlink /proc/self/ns/"+ns); a != b {
			t.Errorf("%s is not shared: %s %s", ns, a, b)
		}
	}
	if a, b := l.ok(t, one+"readlink /proc/self/ns/pid"), l.ok(t, two+"readlink /proc/self/ns/pid"); a == b {
		t.Error("processes are shared")
	}
	contains(t, l.ok(t, one+"wget -qO- http://127.0.0.1:9000/one"), "from-one") // the other's server
	contains(t, l.ok(t, two+"cat /data/init /data/one"), "from-init\nfrom-one\n")
	contains(t, l.refused(t, two+"touch /data/x"), "Read-only file system")
	pod := strings.TrimPrefix(strings.TrimSpace(l.ok(t, "$K get pods -l app=shared -o name")), "pod/")
	contains(t, l.ok(t, one+"sh -c 'hostname; echo $COLOUR $PASSWORD $MIX'"), pod+"\n", "blue hunter2 blue-"+pod)
	contains(t, l.ok(t, one+"sh -c 'cat /config/colour /config/other /secret/password; stat -Lc %a /secret/password'"), "bluexhunter2400")
	contains(t, l.refused(t, one+"sh -c 'echo x >/secret/password'"), "Read-only file system")
	cgroup := l.ok(t, one+"cat /proc/self/cgroup")
	limits := l.ok(t, one+"sh -c 'cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max'")
	if !strings.HasPrefix(limits, "33554432\n25000") {
		t.Errorf("limits in the container: %q, its cgroups:\n%s", limits, cgroup)
	}
}

func isolation(t *testing.T, l *live) {
	l.until(t, "$K get pods -l app=shared", "2/2")
	status := l.ok(t, in("shared", "one")+"cat /proc/self/status")
	if !regexp.MustCompile(`(?m)^NoNewPrivs:\s1$`).MatchString(status) || !regexp.MustCompile(`(?m)^Seccomp:\s2$`).MatchString(status) {
		t.Errorf("no new privileges, seccomp:\n%s", status)
	}
	// Neither CAP_SYS_ADMIN (21) nor CAP_NET_ADMIN (12) nor CAP_SYS_PTRACE (19).
	m := regexp.MustCompile(`(?m)^CapEff:\s([0-9a-f]{16})$`).FindStringSubmatch(status)
	var caps uint64
	if m != nil {
		_, _ = fmt.Sscanf(m[1], "%x", &caps)
	}
	if m == nil || caps&(1<<21|1<<12|1<<19) != 0 {
		t.Errorf("capabilities: %v", m)
	}
	contains(t, l.refused(t, in("shared", "one")+"mount -t tmpfs none /tmp"), "denied")
	contains(t, l.refused(t, in("shared", "one")+"sh -c 'echo 1 >/proc/sys/kernel/panic'"), "Read-only")
}

func liveness(t *testing.T, l *live) {
	l.until(t, "$K get pods -l app=alive", "1/1")
	// The container may be gone before its command has said how it ended.
	l.ok(t, in("alive", "main")+"rm /tmp/ok || [ $? = 137 ]")
	l.until(t, "$K get pods -l app=alive", "1/1", " 1 (")
	contains(t, l.ok(t, "$K describe pod -l app=alive"), "Liveness probe failed", "failed its liveness probe 2 times", "Restart Count:  1")
}

func readiness(t *testing.T, l *live) {
	const endpoint = "$K get endpointslices -l kubernetes.io/service-name=web -o jsonpath='{.items[*].endpoints[*].conditions.ready}'"
	l.until(t, endpoint, "true")
	ip := l.ok(t, "$K get service web -o jsonpath={.spec.clusterIP}")
	contains(t, l.ok(t, "curl -sS --max-time 5 http://"+ip+"/"), "web-")
	l.ok(t, in("web", "main")+"mv /tmp/ready /tmp/not-ready")
	l.until(t, endpoint, "false")
	contains(t, l.ok(t, "$K get pods -l app=web"), "0/1", "Running")
	l.untilGood(t, "curl -sS --max-time 5 http://"+ip+"/ 2>&1 || true", func(out string) bool { return strings.Contains(out, "after 0 ms") || strings.Contains(out, "refused") })
	l.ok(t, in("web", "main")+"mv /tmp/not-ready /tmp/ready")
	l.until(t, "curl -sS --max-time 5 http://"+ip+"/", "web-")
}

func startup(t *testing.T, l *live) {
	l.until(t, "$K get pods -l app=slow", "1/1")
	if out := l.ok(t, "$K get pods -l app=slow -o jsonpath='{.items[*].status.containerStatuses[*].restartCount}'"); out != "0" {
		t.Errorf("liveness was probed before the startup probe succeeded: %s restarts", out)
	}
}

func crashLoop(t *testing.T, l *live) {
	l.until(t, "$K get pods -l app=crash", "CrashLoopBackOff")
	contains(t, l.ok(t, "$K describe pod -l app=crash"), "Exit Code:    4", "Back-off", "CrashLoopBackOff")
	contains(t, l.ok(t, "$K logs --previous deployment/crash"), "no\n")
}

func neverRestarted(t *testing.T, l *live) {
	l.until(t, "$K get pod once", "Error", " 0 ")
	contains(t, l.ok(t, "$K logs once"), "done\n")
	contains(t, l.ok(t, "$K get pod once -o jsonpath='{.status.phase} {.status.containerStatuses[0].state.terminated.exitCode}'"), "Failed 3")
}

func termination(t *testing.T, l *live) {
	l.until(t, "$K logs deployment/polite", "up")
	pod := strings.TrimSpace(l.ok(t, "$K get pods -l app=polite -o name"))
	out := l.ok(t, "$K logs -f "+pod+" & sleep 0.5; $K delete --wait=false "+pod+" >/dev/null; wait")
	if out != "up\nhook\nterm\nbye\n" {
		t.Errorf("the log until the end: %q", out)
	}
	l.until(t, "$K get "+pod+" 2>&1 || true", "NotFound")
}

func pulls(t *testing.T, l *live) {
	for _, app := range []string{"tag", "digest"} {
		l.until(t, "$K get pods -l app="+app, "1/1")
	}
	for app, words := range map[string][]string{
		"absent": {"ImagePullBackOff", "team/none:v1", "not found"},
		"locked": {"ImagePullBackOff", "team/app:v1", "check the pull secret"},
		"never":  {"ErrImageNeverPull", "team/other:v1"},
	} {
		l.until(t, "$K get pods -l app="+app, words[0])
		contains(t, l.ok(t, "$K describe pod -l app="+app), words[1:]...)
	}
}

func names(t *testing.T, l *live) {
	l.until(t, "$K get pods -l app=shared", "2/2")
	one := in("shared", "one")
	ip := l.ok(t, "$K get service web -o jsonpath={.spec.clusterIP}")
	for _, name := range []string{"web.default.svc.cluster.local", "web"} {
		contains(t, l.ok(t, one+"nslookup -type=a "+name+" || true"), ip)
	}
	contains(t, l.ok(t, one+"nslookup "+ip), "web.default.svc.cluster.local")
	begun := time.Now()
	contains(t, l.refused(t, one+"nslookup -type=a outside.example.com."), "SERVFAIL")
	if took := time.Since(begun); took > 8*time.Second {
		t.Errorf("a name that nobody can resolve took %s", took)
	}
}
