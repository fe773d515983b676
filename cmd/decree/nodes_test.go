package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/raftstore/client"
)

// TestTwoNodes: the pods of one push run on two machines, which reach all of them, each
// other's too, by their own addresses and by their service.
func TestTwoNodes(t *testing.T) {
	p := newControlPlane(t, 1)
	s := p.servers[0]
	nodes := []*serverProcess{p.agent("n1", 101, s), p.agent("n2", 102, s)}
	p.push(s, "hello")
	c, err := p.client(s)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	pods, _, err := client.List[*corev1.Pod](t.Context(), c, client.ListOptions{Namespace: "default"})
	if err != nil || len(pods) != 2 || pods[0].Spec.NodeName == pods[1].Spec.NodeName {
		t.Fatalf("%d pods, both on one node, or an error: %v", len(pods), err)
	}
	services, _, err := client.List[*corev1.Service](t.Context(), c, client.ListOptions{Namespace: "default"})
	if err != nil || len(services) != 1 {
		t.Fatalf("%d services, %v", len(services), err)
	}
	for _, n := range nodes {
		for _, pod := range pods {
			fetch(t, n.netns, pod.Status.PodIP+":8080")
		}
		answers := map[string]bool{}
		for range 40 {
			answers[fetch(t, n.netns, services[0].Spec.ClusterIP+":80")] = true
		}
		if len(answers) != 2 {
			t.Errorf("on %s the service answers %v: want both pods", n.name, answers)
		}
	}

	// A host port leads from a node's own address to the pod there, for everybody.
	const door = `package hello

door: {apiVersion: "v1", kind: "Pod", metadata: name: "door", spec: {nodeSelector: "kubernetes.io/hostname": "n2", containers: [
	{name: "web", image: "decree.dev/hello:v1", ports: [{containerPort: 8080, hostPort: 80}], readinessProbe: httpGet: port: 8080},
]}}
`
	if err := os.WriteFile(filepath.Join(p.dir, "repo/door.cue"), []byte(door), 0o644); err != nil {
		t.Fatal(err)
	}
	p.commit(s, "door")
	for _, from := range []string{nodes[0].netns, nodes[1].netns, s.netns} {
		fetch(t, from, planeSubnet+"102:80")
	}
	for node, pods := range map[string]string{"n1": "1", "n2": "2"} { // n2 has the one with the host port, too
		out, err := scrape(p, s, node)
		for _, want := range []string{"\ndecree_agent_pods " + pods + "\n", "\ndecree_netplane_", "\ndecree_dns_", "\ndecree_ingress_", "\ngo_goroutines ", "\nprocess_resident_memory_bytes "} {
			if err != nil || !strings.Contains(out, want) {
				t.Errorf("metrics of %s: %v, %q is missing in\n%s", node, err, want, out)
			}
		}
	}
	if out, err := scrape(p, s, "n3"); err == nil || !strings.Contains(out, `nodes "n3" not found`) {
		t.Errorf("metrics of a node that is not there: %v, %s", err, out)
	}
	testNetcheck(t, p, s, nodes)
}

// scrape asks for the metrics of a node, as people do who come from Kubernetes.
func scrape(p *controlPlane, at *serverProcess, node string) (string, error) {
	kubectl := filepath.Join(root, "bin/debian/usr/bin/kubectl")
	return p.attempt(at, kubectl, "--kubeconfig", filepath.Join(at.data, "admin.kubeconfig"), "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics")
}

// testNetcheck: all is well on two nodes; a link that is cut fails in both directions, and
// nothing else does; a node without pods takes part; one without an agent is named.
func testNetcheck(t *testing.T, p *controlPlane, s *serverProcess, nodes []*serverProcess) {
	check := func() (r netcheck.Report, err error) {
		t.Helper()
		out, err := p.attempt(s, p.binary, "netcheck", "-o", "json")
		if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
			t.Fatalf("netcheck: %v, %v\n%s", err, jerr, out)
		}
		return r, err
	}
	r, err := check()
	kinds := map[netcheck.Kind]int{}
	for _, c := range r.Checks {
		if kinds[c.Kind]++; c.Error != "" || c.Latency <= 0 {
			t.Errorf("%+v", c)
		}
	}
	want := map[netcheck.Kind]int{netcheck.NodeToNode: 2, netcheck.NodeToPod: 4, netcheck.PodToPod: 2, netcheck.PodToService: 2, netcheck.NodeToDNS: 2, netcheck.PodToDNS: 2}
	if err != nil || !r.OK || !maps.Equal(kinds, want) || len(r.Nodes) != 2 || r.Nodes[0].Pod == "" {
		t.Fatalf("%v, %v, %+v", err, kinds, r)
	}
	if out := p.run(s, p.binary, "netcheck"); !strings.Contains(out, "POD TO POD ON   n1") || !strings.Contains(out, "all well") {
		t.Errorf("for people:\n%s", out)
	}

	testUDP(t, p, s, nodes, check)

	neighbour := func(verb string, rest ...string) {
		p.run(s, append([]string{"ip", "-n", nodes[0].netns, "neigh", verb, planeSubnet + "102", "dev", "eth0"}, rest...)...)
	}
	neighbour("replace", "lladdr", "02:00:00:00:00:01", "nud", "permanent")
	r, err = check()
	if err == nil || r.OK || !strings.Contains(strings.Join(r.Advice, "\n"), "n2 does not reach n1") {
		t.Errorf("a link is cut: %v, %+v", err, r)
	}
	for _, c := range r.Checks {
		across := c.From != c.To && c.Kind != netcheck.PodToService && c.Kind != netcheck.NodeToDNS && c.Kind != netcheck.PodToDNS
		if across != (c.Error != "") && c.Kind != netcheck.PodToService { // the service has a pod on either side
			t.Errorf("with a link cut: %+v", c)
		}
	}
	neighbour("del")

	// Without pods, nodes lend the check a namespace of their own, and take it back.
	p.run(s, "git", "-C", filepath.Join(p.dir, "repo"), "rm", "-q", "hello.cue", "door.cue")
	p.run(s, "git", "-C", filepath.Join(p.dir, "repo"), "commit", "-qm", "nothing\n\nDecree-Allow-Deletions: all")
	p.run(s, "git", "-C", filepath.Join(p.dir, "repo"), "push", "-q", "origin", "HEAD:main")
	for end := time.Now().Add(60 * time.Second); r.Nodes[0].Pod != "" || r.Nodes[1].Pod != ""; { // see ask
		if r, err = check(); time.Now().After(end) {
			t.Fatalf("the pods stay: %+v", r)
		}
	}
	if err != nil || !r.OK || len(r.Nodes[1].Addresses) != 1 || len(r.Checks) != 12 {
		t.Errorf("without pods: %v, %+v", err, r)
	}
	for _, n := range nodes {
		if left, err := os.ReadDir(filepath.Join(n.data, "network", "check")); err != nil || len(left) > 0 {
			t.Errorf("%s keeps namespaces of checks: %v, %v", n.name, left, err)
		}
	}
	p.kill(nodes[1])
	if r, err = check(); err == nil || r.OK || !strings.Contains(r.Nodes[1].Error, "agent is not connected") {
		t.Errorf("without an agent: %v, %+v", err, r)
	}
	if out, err := scrape(p, s, "n2"); err == nil || !strings.Contains(out, "agent of this node is not connected") {
		t.Errorf("metrics of a node without an agent: %v, %s", err, out)
	}

	// It says more of itself when it is back.
	p.launch(nodes[1], "agent", append(nodes[1].flags, "--zone", "west")...)
	labels := "-o=jsonpath={.metadata.labels.topology\\.kubernetes\\.io/zone} {.metadata.annotations.net\\.decree\\.dev/networks}"
	expected, got := "west "+planeSubnet+"0/24", ""
	for end := time.Now().Add(60 * time.Second); got != expected; { // see ask
		if got = strings.TrimSpace(p.run(s, p.binary, "get", "node", "n2", labels)); time.Now().After(end) {
			t.Fatalf("node n2 says %q of itself, want %q", got, expected)
		}
	}
	if r, err = check(); err != nil || !r.OK {
		t.Errorf("with its agent again: %v, %+v", err, r)
	}
}

// testUDP: what a service that takes UDP does with a datagram comes back through what balances
// it, also from another node: an answer, nothing, and that nobody listens.
func testUDP(t *testing.T, p *controlPlane, s *serverProcess, nodes []*serverProcess, check func() (netcheck.Report, error)) {
	const loud = `package hello

loud: {apiVersion: "v1", kind: "Service", metadata: name: "loud", spec: {selector: app: "hello", ports: [{port: 9, targetPort: 8080, protocol: "UDP"}]}}
`
	path := filepath.Join(p.dir, "repo/loud.cue")
	if err := os.WriteFile(path, []byte(loud), 0o644); err != nil {
		t.Fatal(err)
	}
	var conns []net.PacketConn
	var ended sync.WaitGroup
	var quiet atomic.Bool
	stop := func() {
		for _, c := range conns {
			c.Close()
		}
		ended.Wait()
	}
	defer stop()
	for _, n := range nodes { // in the pods' own networks, whatever runs in them
		sandboxes, err := filepath.Glob(filepath.Join(n.run, "sandboxes/*/*/net"))
		if err != nil || len(sandboxes) == 0 {
			t.Fatalf("no pods on %s: %v", n.name, err)
		}
		for _, sandbox := range sandboxes {
			err := netspace.Do(sandbox, func() error {
				c, err := net.ListenPacket("udp", ":8080")
				if err == nil {
					conns = append(conns, c)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range conns {
		ended.Go(func() {
			for buf := make([]byte, 9); ; {
				_, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				if !quiet.Load() {
					_, _ = c.WriteTo([]byte("what?"), from) // the check tells
				}
			}
		})
	}
	p.commit(s, "loud")
	// until has the check repeated until it says of the service from both nodes what is wanted.
	until := func(what string, want func(netcheck.Check) bool) (r netcheck.Report, err error) {
		t.Helper()
		for end := time.Now().Add(60 * time.Second); time.Now().Before(end); { // see ask
			r, err = check()
			tried := slices.DeleteFunc(slices.Clone(r.Checks), func(c netcheck.Check) bool { return c.To != "default/loud:9/UDP" })
			if len(tried) == 2 && want(tried[0]) && want(tried[1]) {
				return r, err
			}
		}
		t.Fatalf("%s: %+v", what, r)
		return r, err
	}
	if r, err := until("an answer", func(c netcheck.Check) bool { return c.Error == "" && c.Latency > 0 && !c.Silent }); err != nil || !r.OK {
		t.Errorf("a service that answers: %v, %+v", err, r)
	}
	quiet.Store(true)
	if r, err := until("silence", func(c netcheck.Check) bool { return c.Error == "" && c.Latency == 0 && c.Silent }); err != nil || !r.OK {
		t.Errorf("a service that has nothing to say: %v, %+v", err, r)
	}
	stop()
	r, err := until("refusal", func(c netcheck.Check) bool { return strings.Contains(c.Error, "connection refused") && !c.Silent })
	if err == nil || r.OK || !strings.Contains(strings.Join(r.Advice, "\n"), "decree describe service loud -n default") {
		t.Errorf("a service that nobody listens at: %v, %+v", err, r)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	p.commit(s, "no longer loud")
}

// fetch asks a web server from a network namespace, on a new connection.
func fetch(t *testing.T, name, at string) (answer string) {
	t.Helper()
	dial := func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = netspace.Do("/run/netns/"+name, func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return c, err
	}
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	r, err := c.Get("http://" + at)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %q, %v", name, r.Status, body, err)
	}
	return string(body)
}

// agent starts a node on a machine of its own, and ends and purges it after the test.
func (p *controlPlane) agent(name string, host int, server *serverProcess) *serverProcess {
	t := p.t
	t.Helper()
	images, err := filepath.Abs(root + "/bin/images")
	if err == nil {
		_, err = os.Stat(filepath.Join(images, "hello.tar"))
	}
	if err != nil {
		t.Fatalf("%v; run: go tool task build", err)
	}
	a := p.machine(name, host)
	p.agents = append(p.agents, a)
	run := shortFolder(t)
	a.run = run
	t.Cleanup(func() {
		_ = a.cmd.Process.Signal(syscall.SIGTERM)
		<-a.ended
		p.run(server, "nsenter", "--net=/run/netns/"+a.netns, p.binary, "down", "--data", a.data, "--run", run, "--purge")
	})
	a.flags = []string{"--join", server.address, "--run", run, "--images", images}
	p.launch(a, "agent", append(a.flags, "--token", p.token("agent", ""))...)
	p.ready(name, server)
	return a
}

// ready waits until a node takes pods.
func (p *controlPlane) ready(name string, server *serverProcess) {
	p.t.Helper()
	c, err := p.client(server)
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) { // see ask
		nodes, _, err := client.List[*corev1.Node](p.t.Context(), c, client.ListOptions{})
		if err != nil {
			continue
		}
		for _, n := range nodes {
			for _, condition := range n.Status.Conditions {
				if n.Name == name && condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue {
					return
				}
			}
		}
	}
	p.t.Fatalf("node %s is not ready", name)
}

// attempt runs a program as the administrator of a server's machine.
func (p *controlPlane) attempt(at *serverProcess, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "DECREE_KUBECONFIG="+filepath.Join(at.data, "admin.kubeconfig"), "HOME="+p.dir,
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run is attempt for what must succeed.
func (p *controlPlane) run(at *serverProcess, args ...string) string {
	p.t.Helper()
	out, err := p.attempt(at, args...)
	if err != nil {
		p.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

// push makes an example the content of the cluster's repository, and waits until it is
// healthy.
func (p *controlPlane) push(at *serverProcess, example string) {
	p.t.Helper()
	repo := filepath.Join(p.dir, "repo")
	p.run(at, "git", "clone", "-q", "decree://"+at.address+"/cluster", repo)
	manifests, err := filepath.Glob(filepath.Join(root, "examples", example, "*.cue"))
	if err == nil && len(manifests) == 0 {
		err = errors.New("there are none")
	}
	if err != nil {
		p.t.Fatalf("manifests of %s: %v", example, err)
	}
	p.run(at, append([]string{"cp", "-t", repo}, manifests...)...)
	p.commit(at, example)
}

// commit pushes what is in the clone, and waits until it is healthy.
func (p *controlPlane) commit(at *serverProcess, message string) {
	p.t.Helper()
	repo := filepath.Join(p.dir, "repo")
	p.run(at, "git", "-C", repo, "add", "-A")
	p.run(at, "git", "-C", repo, "commit", "-qm", message)
	if out := p.run(at, "git", "-C", repo, "push", "origin", "HEAD:main"); !strings.Contains(out, "healthy after") {
		p.t.Fatalf("the push did not end healthy:\n%s", out)
	}
}

// shortFolder is a folder whose name leaves room for sockets below it.
func shortFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "decree-a-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
