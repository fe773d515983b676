package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwatch "k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// controlPlane is servers in network namespaces of their own, joined by a bridge: each
// can be killed, stopped, or cut off.
type controlPlane struct {
	t       *testing.T
	binary  string
	dir     string
	prefix  string // of namespaces and links
	servers []*serverProcess
	agents  []*serverProcess
}

type serverProcess struct {
	name, netns, link, address, data string
	cmd                              *exec.Cmd
	ended                            chan struct{}
}

// planes counts: the links of one that has ended go a little later than it does.
var planes atomic.Int32

const planeSubnet = "10.213.77."

// newControlPlane starts n servers that vote.
func newControlPlane(t *testing.T, n int) *controlPlane {
	t.Helper()
	p := &controlPlane{t: t, binary: program(t), dir: t.TempDir(), prefix: fmt.Sprintf("dt%d%c", os.Getpid()%10000, 'a'+rune(planes.Add(1)))}
	t.Cleanup(p.remove)
	p.ip("link", "add", p.prefix, "type", "bridge")
	p.ip("addr", "add", planeSubnet+"254/24", "dev", p.prefix)
	p.ip("link", "set", p.prefix, "up")
	for i := range n {
		p.add(i)
	}
	p.start(p.servers[0])
	token := p.token("server", "")
	for _, s := range p.servers[1:] {
		p.start(s, "--join", p.servers[0].address, "--token", token)
	}
	p.settled(n)
	return p
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
		exec.Command("ip", "link", "del", s.link).Run()
		exec.Command("ip", "netns", "del", s.netns).Run()
	}
	exec.Command("ip", "link", "del", p.prefix).Run()
}

// start runs a server and does not wait for it.
func (p *controlPlane) start(s *serverProcess, flags ...string) {
	p.t.Helper()
	p.launch(s, "server", append([]string{"--address", s.address}, flags...)...)
}

// launch runs the program on a machine.
func (p *controlPlane) launch(s *serverProcess, verb string, flags ...string) {
	p.t.Helper()
	log, err := os.OpenFile(s.data+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	args := append([]string{"--net=/run/netns/" + s.netns, p.binary, verb, "--data", s.data, "--node", s.name, "--log-level", "info"}, flags...)
	// Not `ip netns exec`, which hides /sys/fs/cgroup.
	s.cmd = exec.Command("nsenter", args...)
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

func value(name string) *corev1.ConfigMap {
	o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Data: map[string]string{"v": name}}
	o.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMap"))
	return o
}

// create writes an object until a server acknowledges it. The key makes sure that it
// happens once however often it is tried; a second time it would be refused.
func create(ctx context.Context, peers *peer.Client, addresses []string, name string) error {
	o := value(name)
	data, err := command.EncodeTxn(&command.Txn{
		Key: name, Time: time.Now().UnixMilli(), Actor: "test", Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(o), Object: o}},
	})
	if err != nil {
		return err
	}
	for i := 0; ctx.Err() == nil; i++ {
		one, cancel := context.WithTimeout(ctx, 2*time.Second)
		r, err := peers.Propose(one, addresses[i%len(addresses)], data)
		cancel()
		if err == nil {
			return r.Err()
		}
		if i%len(addresses) == 0 {
			time.Sleep(5 * time.Millisecond) // nobody leads: asking faster helps nobody
		}
	}
	return context.Cause(ctx)
}

// follower checks what one watcher sees: every object once, in order, whatever server
// it is connected to.
type follower struct {
	seen     map[string]bool
	revision uint64
	relists  int
}

// follow lists and watches, changing servers after every error, until ctx ends.
func (f *follower) follow(ctx context.Context, p *controlPlane, at int) error {
	k, _ := api.KindFor(api.ConfigMaps)
	f.seen = map[string]bool{}
	for ctx.Err() == nil {
		s := p.servers[at%len(p.servers)]
		at++
		c, err := p.client(s)
		if err != nil {
			return err
		}
		if err := f.once(ctx, c, k); err != nil {
			c.Close()
			return fmt.Errorf("watching at %s: %w", s.name, err)
		}
		c.Close()
		time.Sleep(20 * time.Millisecond) // who reconnects in a loop helps nobody
	}
	return nil
}

func (f *follower) once(ctx context.Context, c *client.Client, k *api.Kind) error {
	if f.revision == 0 {
		one, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		list, revision, err := client.List[*corev1.ConfigMap](one, c, client.ListOptions{Namespace: "default"})
		if err != nil {
			return nil // another server
		}
		now := map[string]bool{}
		for _, o := range list {
			now[o.Name] = true
		}
		for name := range f.seen {
			if !now[name] {
				return fmt.Errorf("%s was seen, and a list at %d lacks it", name, revision)
			}
		}
		f.seen, f.revision = now, revision
		f.relists++
	}
	for e, err := range c.WatchObjects(ctx, k, client.WatchOptions{After: f.revision, ListOptions: client.ListOptions{Namespace: "default"}}) {
		switch {
		case err != nil && strings.Contains(err.Error(), "too old"), err != nil && strings.Contains(err.Error(), "not kept"):
			f.revision = 0
			return nil
		case err != nil:
			return nil // another server
		case e.Revision <= f.revision && e.Type != apiwatch.Bookmark:
			return fmt.Errorf("revision %d after %d", e.Revision, f.revision)
		case e.Type == apiwatch.Added:
			if name := e.Object.GetName(); f.seen[name] {
				return fmt.Errorf("%s came twice, now at %d", name, e.Revision)
			}
			f.seen[e.Object.GetName()] = true
		case e.Type == apiwatch.Deleted, e.Type == apiwatch.Modified:
			return fmt.Errorf("%s %s: nobody did that", e.Type, e.Object.GetName())
		}
		f.revision = max(f.revision, e.Revision)
	}
	return nil
}

// rounds is how many faults TestServersFaults makes.
const rounds = 100

// TestServersFaults makes one fault after the other while clients write and watch:
// kill -9, SIGSTOP, cut links, and the lead that moves. Nothing that was acknowledged
// may be lost, nothing may happen twice, and every watcher sees everything once.
func TestServersFaults(t *testing.T) {
	p := newControlPlane(t, 3)
	peers := p.peers()
	addresses := []string{p.servers[0].address, p.servers[1].address, p.servers[2].address}
	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var acknowledged sync.Map
	var count atomic.Int64
	for w := range 4 {
		clients.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("w%d-%d", w, n)
				err := create(t.Context(), peers, addresses, name)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				acknowledged.Store(name, true)
				count.Add(1)
				time.Sleep(2 * time.Millisecond) // enough writes for a history, few enough to list it
			}
		})
	}
	watching, unwatch := context.WithCancel(t.Context())
	followers := make([]*follower, 3)
	var watchers sync.WaitGroup
	for i := range followers {
		followers[i] = &follower{}
		watchers.Go(func() {
			if err := followers[i].follow(watching, p, i); err != nil {
				t.Error(err)
			}
		})
	}
	faults := map[string]int{}
	for round := 0; round < rounds && !t.Failed(); round++ {
		before := count.Load()
		begun := time.Now()
		kind := p.fault()
		faults[kind]++
		for end := time.Now().Add(30 * time.Second); count.Load() < before+5; time.Sleep(5 * time.Millisecond) { // the writers go on
			if time.Now().After(end) {
				t.Fatalf("round %d: no write is acknowledged any more", round)
			}
		}
		t.Logf("round %d: %s, %s", round, kind, time.Since(begun))
	}
	stop()
	clients.Wait()
	p.settled(3)
	p.compare(&acknowledged)
	time.Sleep(2 * time.Second) // a watcher that is between two servers gets there
	unwatch()
	watchers.Wait()
	for i, f := range followers {
		acknowledged.Range(func(name, _ any) bool {
			if !f.seen[name.(string)] {
				t.Errorf("watcher %d never saw %s", i, name)
			}
			return true
		})
	}
	t.Logf("%d writes acknowledged during %v", count.Load(), faults)
}

// fault makes one, waits a moment, and mends it.
func (p *controlPlane) fault() string {
	s := p.servers[rand.IntN(len(p.servers))]
	moment := time.Duration(50+rand.IntN(700)) * time.Millisecond // the random moment is the test
	switch kind := rand.IntN(4); kind {
	case 0:
		p.kill(s)
		time.Sleep(moment / 4)
		p.start(s)
		p.settled(len(p.servers))
		return "kill"
	case 1:
		_ = s.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(moment)
		_ = s.cmd.Process.Signal(syscall.SIGCONT)
		return "stop"
	case 2:
		p.ip("link", "set", s.link, "down")
		time.Sleep(moment)
		p.ip("link", "set", s.link, "up")
		return "cut"
	default:
		if c, err := p.client(s); err == nil {
			// It may lead already, or be behind: then nothing happens.
			_, _ = c.Raw(context.Background(), http.MethodPost, "/decree/v1/lead", url.Values{"to": {s.name}}, "", nil)
			c.Close()
		}
		return "lead"
	}
}

// compare makes sure that all servers have the same state, with all that was
// acknowledged.
func (p *controlPlane) compare(acknowledged *sync.Map) {
	p.t.Helper()
	var first map[string]string
	for _, s := range p.servers {
		c, err := p.client(s)
		if err != nil {
			p.t.Fatal(err)
		}
		list, _, err := client.List[*corev1.ConfigMap](p.t.Context(), c, client.ListOptions{Namespace: "default"})
		c.Close()
		if err != nil {
			p.t.Fatalf("%s: %v", s.name, err)
		}
		state := map[string]string{}
		for _, o := range list {
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

// TestServersLife walks a cluster through its life: a token that is wrong, a server that
// is replaced, one whose disk is damaged, one that is removed, keys and CA that rotate,
// and a snapshot that becomes another cluster.
func TestServersLife(t *testing.T) {
	p := newControlPlane(t, 3)
	peers := p.peers()
	addresses := []string{p.servers[0].address, p.servers[1].address, p.servers[2].address}
	for i := range 20 {
		if err := create(t.Context(), peers, addresses, "a"+strconv.Itoa(i)); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("wrong tokens", func(t *testing.T) { p.t = t; p.wrongTokens(t) })
	t.Run("damaged disk", func(t *testing.T) {
		p.t = t
		s := p.servers[2]
		p.kill(s)
		damage(t, filepath.Join(s.data, "raft", "raft.db"))
		p.start(s)
		p.settled(3)
		p.compare(&sync.Map{})
		if aside, _ := filepath.Glob(filepath.Join(s.data, "raft", "damaged-*")); len(aside) != 1 {
			t.Errorf("the damaged files are not kept: %v", aside)
		}
	})
	t.Run("lost disk", func(t *testing.T) {
		p.t = t
		s := p.servers[1]
		p.kill(s)
		if err := os.RemoveAll(s.data); err != nil {
			t.Fatal(err)
		}
		p.start(s, "--join", p.servers[0].address, "--token", p.token("server", "s2"))
		p.settled(3)
		p.compare(&sync.Map{})
	})
	t.Run("removed", func(t *testing.T) {
		p.t = t
		s := p.servers[2]
		if err := p.ask(http.MethodDelete, "members/s3", "", nil); err != nil {
			t.Fatal(err)
		}
		p.settled(2)
		p.kill(s)
		p.start(s)
		select {
		case <-s.ended:
		case <-time.After(30 * time.Second):
			t.Fatal("a removed server goes on")
		}
		if log, _ := os.ReadFile(s.data + ".log"); !strings.Contains(string(log), "was removed from the cluster") {
			t.Error("a removed server does not say why it ends")
		}
		if err := os.RemoveAll(s.data); err != nil {
			t.Fatal(err)
		}
		p.start(s, "--join", p.servers[0].address, "--token", p.token("server", ""))
		p.settled(3)
	})
	t.Run("keys", func(t *testing.T) { p.t = t; p.rotateKeys(t) })
	t.Run("CA", func(t *testing.T) { p.t = t; p.rotateCA(t) })
	t.Run("stale", func(t *testing.T) { p.t = t; p.stale(t) })
	t.Run("snapshot", func(t *testing.T) { p.t = t; p.snapshot(t) })
	p.t = t
}

// damage flips a bit in every page of a file.
func damage(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := 2*4096 + 100; i < len(data); i += 4096 {
		data[i] ^= 0x40
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p *controlPlane) wrongTokens(t *testing.T) {
	agent, good := p.token("agent", ""), p.token("server", "")
	parts := strings.Split(good, ".")
	hash := []byte(parts[len(parts)-1])
	slices.Reverse(hash)
	otherCA := strings.Join(append(slices.Clone(parts[:len(parts)-1]), string(hash)), ".")
	otherSecret := strings.Join(append([]string{parts[0], parts[1], strings.Repeat("A", len(parts[2]))}, parts[3:]...), ".")
	for what, try := range map[string]struct{ token, want string }{
		"an agent's token":     {agent, "token"},
		"another CA's hash":    {otherCA, "not a server of the cluster that the token was made for"},
		"another secret":       {otherSecret, "token"},
		"no token at all":      {"", "token"},
		"something else":       {"hello", "token"},
		"the name of a server": {good, "member already"},
	} {
		data := filepath.Join(t.TempDir(), "x")
		node := "s9"
		if what == "the name of a server" {
			node = "s1"
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		out, err := exec.CommandContext(ctx, p.binary, "server", "--data", data, "--node", node, "--address", "127.0.0.1:0", "--join", p.servers[0].address, "--token", try.token).CombinedOutput()
		cancel()
		if err == nil || ctx.Err() == context.DeadlineExceeded || !strings.Contains(string(out), try.want) {
			t.Errorf("%s: %v, want %q:\n%s", what, err, try.want, out)
		}
	}
	if rows := p.settled(3); len(rows) != 3 {
		t.Errorf("%+v", rows)
	}
}

func (p *controlPlane) rotateKeys(t *testing.T) {
	if err := p.ask(http.MethodPost, "keys", "", nil); err != nil {
		t.Fatal(err)
	}
	var keys struct {
		Epoch   int64
		Servers []struct{ Epoch int64 }
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // see ask
		if err := p.ask(http.MethodGet, "keys", "", &keys); err != nil {
			t.Fatal(err)
		}
		done := len(keys.Servers) == 3
		for _, s := range keys.Servers {
			done = done && s.Epoch == keys.Epoch
		}
		if done {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("keys are not rotated: %+v", keys)
		}
	}
	for _, s := range p.servers { // what is on disk can be read with the new keys
		p.kill(s)
		p.start(s)
		p.settled(3)
	}
	p.compare(&sync.Map{})
}

func (p *controlPlane) rotateCA(t *testing.T) {
	var before, now struct {
		Stage string
		CAs   []struct {
			Fingerprint string
			Active      bool
			Machines    int
		}
	}
	if err := p.ask(http.MethodGet, "ca", "", &before); err != nil {
		t.Fatal(err)
	}
	if err := p.ask(http.MethodPost, "ca", "", nil); err != nil {
		t.Fatal(err)
	}
	for _, s := range p.servers { // at their start they ask whom to trust; by themselves within minutes
		p.kill(s)
		p.start(s)
		p.settled(3)
	}
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(100 * time.Millisecond) { // see ask
		if err := p.ask(http.MethodGet, "ca", "", &now); err != nil {
			t.Fatal(err)
		}
		if len(now.CAs) == 2 && now.CAs[1].Active {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the new CA does not sign: %+v", now)
		}
	}
	for _, s := range p.servers {
		p.kill(s)
		p.start(s)
		p.settled(3)
	}
	for end := time.Now().Add(60 * time.Second); now.CAs[1].Machines < 3; time.Sleep(100 * time.Millisecond) { // see ask
		if err := p.ask(http.MethodGet, "ca", "", &now); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(end) {
			t.Fatalf("the servers have no certificates of the new CA: %+v", now)
		}
	}
	if now.CAs[0].Fingerprint != before.CAs[0].Fingerprint {
		t.Error("the old CA is given up before the day that kubeconfigs have is over")
	}
}

// stale: without a quorum nothing is written and nothing is read as if it were new; who
// asks for what is at hand gets it, and is told how old it may be.
func (p *controlPlane) stale(t *testing.T) {
	get := func(flags ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, p.binary, append([]string{"get", "configmaps"}, flags...)...)
		cmd.Env = append(os.Environ(), "DECREE_KUBECONFIG="+filepath.Join(p.servers[2].data, "admin.kubeconfig"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	p.kill(p.servers[0])
	p.kill(p.servers[1])
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) { // see ask
		if _, err := get(); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a server without a quorum answers as if it had one")
		}
	}
	out, err := get("--stale")
	if err != nil || !strings.Contains(out, "a19") || !strings.Contains(out, "since the leader was heard of") && !strings.Contains(out, "this server leads") {
		t.Errorf("a stale read: %v\n%s", err, out)
	}
	p.start(p.servers[0])
	p.start(p.servers[1])
	p.settled(3)
}

func (p *controlPlane) snapshot(t *testing.T) {
	file, data := filepath.Join(t.TempDir(), "c.decree"), filepath.Join(t.TempDir(), "restored")
	run := func(kubeconfig string, args ...string) string {
		t.Helper()
		cmd := exec.Command(p.binary, args...)
		cmd.Env = append(os.Environ(), "DECREE_KUBECONFIG="+kubeconfig)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("decree %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	old := filepath.Join(p.servers[0].data, "admin.kubeconfig")
	run(old, "snapshot", "save", file, "--plaintext")
	run(old, "snapshot", "verify", file, "--plaintext")
	s := p.add(len(p.servers))
	s.data = data
	run(old, "snapshot", "restore", file, "--plaintext", "--data", data, "--node", s.name, "--address", s.address)
	p.start(s)
	restored := filepath.Join(data, "admin.kubeconfig")
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // see ask
		if _, err := os.Stat(restored); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the restored server does not start")
		}
	}
	if out := run(restored, "get", "configmaps"); !strings.Contains(out, "a19") {
		t.Errorf("the restored cluster lacks what was saved:\n%s", out)
	}
	cfg, err := client.FromKubeconfig(old)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Server, cfg.Retries = "https://"+s.address, -1
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Raw(t.Context(), http.MethodGet, "/version", nil, "", nil); err == nil {
		t.Error("credentials of the old cluster work in the restored one")
	}
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
