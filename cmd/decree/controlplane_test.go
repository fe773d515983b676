package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
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

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
)

// controlPlane is servers in network namespaces of their own, joined by a bridge: each
// can be killed, stopped, or cut off.
type controlPlane struct {
	t       *testing.T
	binary  string
	dir     string
	prefix  string   // of namespaces and links
	flags   []string // of every server
	servers []*serverProcess
	agents  []*serverProcess
}

type serverProcess struct {
	name, netns, link, address, data string
	binary                           string   // "": that of all
	run                              string   // of an agent: where its sandboxes are
	flags                            []string // of an agent, to start it once more
	cmd                              *exec.Cmd
	ended                            chan struct{}
}

// planes counts: the links of one that has ended go a little later than it does.
var planes atomic.Int32

// planeSubnet is where the servers of this process are: several may run at a time.
var planeSubnet = fmt.Sprintf("10.213.%d.", os.Getpid()%250)

// newControlPlane starts n servers that vote, with flags beside those that they need.
func newControlPlane(t *testing.T, n int, flags ...string) *controlPlane {
	t.Helper()
	p := &controlPlane{t: t, binary: program(t), dir: t.TempDir(), flags: flags, prefix: fmt.Sprintf("dt%d%c", os.Getpid()%10000, 'a'+rune(planes.Add(1)))}
	t.Cleanup(p.remove)
	p.ip("link", "add", p.prefix, "type", "bridge")
	p.ip("addr", "add", planeSubnet+"254/24", "dev", p.prefix)
	p.ip("link", "set", p.prefix, "up")
	for i := range n {
		p.add(i)
	}
	p.found()
	return p
}

// newLocalPlane starts n servers that vote on the loopback of this machine.
func newLocalPlane(t *testing.T, n int, flags ...string) *controlPlane {
	t.Helper()
	p := &controlPlane{t: t, binary: program(t), dir: t.TempDir(), flags: flags}
	t.Cleanup(p.remove)
	for i := range n {
		name := fmt.Sprint("s", i+1)
		p.servers = append(p.servers, &serverProcess{name: name, address: fmt.Sprint("127.0.0.1:", 7443+i), data: filepath.Join(p.dir, name)})
	}
	p.found()
	return p
}

// found starts all servers: the first one founds the cluster, the others join it.
func (p *controlPlane) found() {
	p.t.Helper()
	p.start(p.servers[0])
	token := p.token("server", "")
	for _, s := range p.servers[1:] {
		p.start(s, "--join", p.servers[0].address, "--token", token)
	}
	p.settled(len(p.servers))
}

func (p *controlPlane) ip(args ...string) {
	p.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		p.t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// add makes the machine of another server.
func (p *controlPlane) add(i int) *serverProcess {
	p.t.Helper()
	s := p.machine(fmt.Sprint("s", i+1), i+1)
	p.servers = append(p.servers, s)
	return s
}

// machine makes a namespace with an address.
func (p *controlPlane) machine(name string, host int) *serverProcess {
	p.t.Helper()
	s := &serverProcess{
		name: name, netns: fmt.Sprint(p.prefix, "-", name), link: fmt.Sprint(p.prefix, "v", name),
		address: fmt.Sprint(planeSubnet, host, ":7443"), data: filepath.Join(p.dir, name),
	}
	p.ip("netns", "add", s.netns)
	p.ip("link", "add", s.link, "type", "veth", "peer", "name", "eth0", "netns", s.netns)
	p.ip("link", "set", s.link, "master", p.prefix, "up")
	p.ip("-n", s.netns, "addr", "add", fmt.Sprint(planeSubnet, host, "/24"), "dev", "eth0")
	p.ip("-n", s.netns, "link", "set", "eth0", "up")
	p.ip("-n", s.netns, "link", "set", "lo", "up")
	return s
}

func (p *controlPlane) remove() {
	for _, s := range slices.Concat(p.servers, p.agents) {
		p.kill(s)
		if p.t.Failed() {
			log, _ := os.ReadFile(s.data + ".log")
			p.t.Logf("log of %s:\n%s", s.name, log[max(0, len(log)-3000):])
		}
		if s.netns != "" {
			exec.Command("ip", "link", "del", s.link).Run()
			exec.Command("ip", "netns", "del", s.netns).Run()
		}
	}
	if p.prefix != "" {
		exec.Command("ip", "link", "del", p.prefix).Run()
	}
}

// start runs a server and does not wait for it.
func (p *controlPlane) start(s *serverProcess, flags ...string) {
	p.t.Helper()
	p.launch(s, "server", slices.Concat([]string{"--address", s.address}, p.flags, flags)...)
}

// launch runs the program on a machine.
func (p *controlPlane) launch(s *serverProcess, verb string, flags ...string) {
	p.t.Helper()
	log, err := os.OpenFile(s.data+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	args := append([]string{cmp.Or(s.binary, p.binary), verb, "--data", s.data, "--node", s.name, "--log-level", "info"}, flags...)
	if s.netns != "" { // not by `ip netns exec`, which hides /sys/fs/cgroup
		args = append([]string{"nsenter", "--net=/run/netns/" + s.netns}, args...)
	}
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	s.ended = make(chan struct{})
	cmd, ended := s.cmd, s.ended
	go func() { defer close(ended); _ = cmd.Wait() }()
}

// kill ends a server without a warning. nsenter has become the server itself.
func (p *controlPlane) kill(s *serverProcess) {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGCONT)
	_ = s.cmd.Process.Kill()
	<-s.ended
}

// client connects as the administrator of a server's machine.
func (p *controlPlane) client(s *serverProcess) (*client.Client, error) {
	cfg, err := client.FromKubeconfig(filepath.Join(s.data, "admin.kubeconfig"))
	if err != nil {
		return nil, err
	}
	cfg.Timeout, cfg.Retries = 5*time.Second, -1
	return client.New(cfg)
}

// ask sends a request to the first server that answers.
func (p *controlPlane) ask(method, path, body string, out any) error {
	var last error
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) { // other processes bring no event here
		for _, s := range p.servers {
			c, err := p.client(s)
			if err != nil {
				last = err
				continue
			}
			data, err := c.Raw(context.Background(), method, "/decree/v1/"+path, nil, "application/json", []byte(body))
			c.Close()
			if err == nil {
				if out != nil {
					err = json.Unmarshal(data, out)
				}
				return err
			}
			last = err
		}
	}
	return last
}

func (p *controlPlane) token(role, node string) string {
	p.t.Helper()
	var t struct{ Token string }
	if err := p.ask(http.MethodPost, "tokens", fmt.Sprintf(`{"role":%q,"node":%q}`, role, node), &t); err != nil {
		p.t.Fatal(err)
	}
	return t.Token
}

func (p *controlPlane) members() (rows []membership.Server) {
	p.t.Helper()
	if err := p.ask(http.MethodGet, "members", "", &rows); err != nil {
		p.t.Fatal(err)
	}
	return rows
}

// settled waits until n servers vote and are well, and nobody else is left.
func (p *controlPlane) settled(n int) []membership.Server {
	p.t.Helper()
	var rows []membership.Server
	begun := time.Now()                                                                                 // what was seen before says nothing
	for end := begun.Add(90 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) { // see ask
		rows = p.members()
		well := 0
		for _, r := range rows {
			fresh := r.ContactMillis >= 0 && r.ContactMillis < time.Since(begun).Milliseconds()
			if fresh && r.State == "healthy" && (r.Role == "voter" || r.Role == "leader") {
				well++
			}
		}
		if well == n && len(rows) == n {
			return rows
		}
	}
	p.t.Fatalf("%d servers should vote and be well: %+v", n, rows)
	return nil
}

// peers speaks to servers as one of them.
func (p *controlPlane) peers() *peer.Client {
	p.t.Helper()
	keeper, err := pki.OpenKeeper(filepath.Join(p.servers[0].data, "pki", "server"), nil)
	if err != nil {
		p.t.Fatal(err)
	}
	c := peer.NewClient(func() *tls.Config { return keeper.ClientTLS() })
	p.t.Cleanup(c.Close)
	return c
}

// compare makes sure that all servers have the same state, with all that was
// acknowledged.
func (p *controlPlane) compare(acknowledged *sync.Map) {
	p.t.Helper()
	var first map[string]string
	for _, s := range p.servers {
		state := map[string]string{}
		for _, o := range p.values(s) {
			state[o.Name] = o.ResourceVersion + " " + string(o.UID)
		}
		acknowledged.Range(func(name, _ any) bool {
			if state[name.(string)] == "" {
				p.t.Errorf("%s was acknowledged, and %s lacks it", name, s.name)
			}
			return true
		})
		if first == nil {
			first = state
		}
		for name, at := range first {
			if state[name] != at {
				p.t.Errorf("%s is %q on %s and %q on %s", name, at, p.servers[0].name, state[name], s.name)
			}
		}
		if len(state) != len(first) {
			p.t.Errorf("%s has %d objects, %s has %d", s.name, len(state), p.servers[0].name, len(first))
		}
	}
}

// values are the objects that tests write, as one server has them.
func (p *controlPlane) values(s *serverProcess) []*corev1.ConfigMap {
	p.t.Helper()
	c, err := p.client(s)
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	list, _, err := client.List[*corev1.ConfigMap](p.t.Context(), c, client.ListOptions{Namespace: "default"})
	if err != nil {
		p.t.Fatalf("%s: %v", s.name, err)
	}
	return list
}

// program is decree: this test binary under that name.
func program(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("decree")
	if err != nil {
		t.Fatal(err)
	}
	return path
}
