package gitreplica_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitreplica"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

func TestMain(m *testing.M) {
	// Tests use a git of their own: no configuration of the machine, no prompts.
	for k, v := range map[string]string{
		"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0", "HOME": "/nonexistent",
		"GIT_AUTHOR_NAME": "Ann", "GIT_AUTHOR_EMAIL": "ann@example.org", "GIT_COMMITTER_NAME": "Ann", "GIT_COMMITTER_EMAIL": "ann@example.org",
	} {
		os.Setenv(k, v)
	}
	goleak.VerifyTestMain(m)
}

const (
	repo       = "decree"
	serverName = "decree-server"
)

// compiler compiles in this process.
type compiler struct{}

func (compiler) Compile(ctx context.Context, tree fs.FS, opts compile.Options) (*compile.Result, error) {
	return compile.Evaluate(ctx, tree, opts)
}

// cluster is three Git servers around one store: what they see of the replicated
// state is the same at every moment, and what they hold of Git is their own.
type cluster struct {
	t       *testing.T
	dir     string
	ca      *pki.Authority
	pool    *x509.CertPool
	store   replicated.Store
	limits  gitsource.Limits
	quorum  time.Duration
	servers []*server
	env     []string
	log     *slog.Logger
	// registry is for the metrics of the next server.
	registry prometheus.Registerer
}

// server is one of them.
type server struct {
	c       *cluster
	id      string
	address string
	http    *httptest.Server
	git     *gitsource.Server
	replica *gitreplica.Replica
	client  *http.Client
	stop    func()

	mu     sync.Mutex
	dead   bool
	pull   func(ctx context.Context, p gitreplica.Peer) error // instead of asking, when set
	asked  int
	mangle func(path string, body io.ReadCloser) io.ReadCloser // of what others answer
}

func newCluster(t *testing.T, n int, change ...func(*cluster)) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: t.TempDir(), quorum: 20 * time.Second, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	for _, f := range change {
		f(c)
	}
	var err error
	if c.ca, err = pki.Open(filepath.Join(c.dir, "pki"), time.Now()); err != nil {
		t.Fatal(err)
	}
	c.pool = x509.NewCertPool()
	c.pool.AppendCertsFromPEM(c.ca.CertPEM())
	c.openStore()
	c.clientFiles()
	for i := range n {
		c.servers = append(c.servers, c.start(string(rune('a'+i))))
	}
	t.Cleanup(func() {
		for _, s := range c.servers {
			s.close()
		}
	})
	return c
}

func (c *cluster) openStore() {
	s, err := raftstore.Open(raftstore.Config{
		Dir: filepath.Join(c.dir, "raft"), NodeID: "one",
		Bootstrap: &command.Bootstrap{
			ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"),
			NodeMask: 24, DNS: netip.MustParseAddr("10.97.0.10"),
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			c.t.Error(err)
		}
	})
	if err := s.WaitReady(c.ctx()); err != nil {
		c.t.Fatal(err)
	}
	c.store = replicated.Store{Store: s}
	c.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	c.create(&api.Source{ObjectMeta: metav1.ObjectMeta{Name: repo}})
}

func (c *cluster) create(o api.Object) {
	c.t.Helper()
	o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
	res, err := c.store.Propose(c.ctx(), command.Txn{Time: 1, Actor: "test", Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(o), Object: o}}})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// ctx ends with the test, or when something hangs.
func (c *cluster) ctx() context.Context {
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	c.t.Cleanup(cancel)
	return ctx
}

func (c *cluster) issue(name, group string) pki.Pair {
	c.t.Helper()
	pair, err := c.ca.Issue(pki.Request{Name: name, Groups: []string{group}, Hosts: []string{serverName, "127.0.0.1"}}, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	return pair
}

// tls is the configuration of somebody, as server and as client.
func (c *cluster) tls(name, group string) *tls.Config {
	c.t.Helper()
	cert, err := c.issue(name, group).TLS()
	if err != nil {
		c.t.Fatal(err)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: c.pool, ClientCAs: c.pool,
		ClientAuth: tls.RequireAndVerifyClientCert, ServerName: serverName,
	}
}

// clientFiles gives git the certificate of an administrator.
func (c *cluster) clientFiles() {
	pair := c.issue("ann", "system:masters")
	for name, data := range map[string][]byte{"ca.pem": c.ca.CertPEM(), "ann.pem": pair.CertPEM, "ann.key": pair.KeyPEM} {
		if err := os.WriteFile(filepath.Join(c.dir, name), data, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(c.dir, name) }
	c.env = append(os.Environ(), "GIT_SSL_CAINFO="+in("ca.pem"), "GIT_SSL_CERT="+in("ann.pem"), "GIT_SSL_KEY="+in("ann.key"))
}

// start starts a server with a folder of its own, which may exist from before.
func (c *cluster) start(id string) *server {
	c.t.Helper()
	s := &server{c: c, id: id}
	config := c.tls("system:server:"+id, "system:servers")
	s.client = gitsource.OriginClient(config)
	s.client.Transport = &mangler{s, s.client.Transport.(*http.Transport)}
	log := c.log.With("server", id)
	var err error
	s.replica, err = gitreplica.New(gitreplica.Config{
		Peers: s, Store: c.store, Log: log, Reg: c.registry, Quorum: c.quorum, Background: 30 * time.Second, Resync: time.Hour,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	receiver := &delivery.Receiver{Pipeline: &delivery.Pipeline{Compiler: compiler{}, Store: c.store, Log: log}, Watch: time.Second}
	s.git, err = gitsource.NewServer(gitsource.ServerConfig{
		Dir: filepath.Join(c.dir, id), Receiver: receiver, References: receiver, Replicas: s.replica, Logger: log, Limits: c.limits,
		Identity: func(r *http.Request) string { return r.TLS.PeerCertificates[0].Subject.CommonName },
		FromServer: func(r *http.Request) bool {
			return slices.Contains(r.TLS.PeerCertificates[0].Subject.Organization, "system:servers")
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	s.replica.Attach(s.git)
	if err := s.git.Init(c.t.Context(), repo); err != nil {
		c.t.Fatal(err)
	}
	s.http = httptest.NewUnstartedServer(s.git)
	s.http.TLS = config
	s.http.EnableHTTP2 = true
	s.http.StartTLS()
	s.address = s.http.Listener.Addr().String()
	s.stop = sync.OnceFunc(func() {
		s.http.CloseClientConnections()
		s.http.Close()
		s.replica.Close()
		s.client.CloseIdleConnections()
		s.client.Transport.(*mangler).base.CloseIdleConnections()
	})
	return s
}

// close ends the server; what was under way breaks off.
func (s *server) close() { s.stop() }

// kill makes the server one that nobody reaches.
func (s *server) kill() {
	s.mu.Lock()
	s.dead = true
	s.mu.Unlock()
	s.close()
}

// run keeps the server up to date until the test ends.
func (s *server) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.replica.Run(ctx) }()
	s.c.t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			s.c.t.Errorf("Run ended with %v", err)
		}
	})
}

// Servers implements gitreplica.Peers.
func (s *server) Servers() []gitreplica.Peer {
	var list []gitreplica.Peer
	for _, o := range s.c.servers {
		list = append(list, gitreplica.Peer{ID: o.id, Address: o.address, Self: o == s, Voter: true, Leader: o.id == "a"})
	}
	if !slices.Contains(s.c.servers, s) { // being started
		list = append(list, gitreplica.Peer{ID: s.id, Self: true, Voter: true})
	}
	return list
}

// Pull implements gitreplica.Peers.
func (s *server) Pull(ctx context.Context, p gitreplica.Peer, repository, hash string) error {
	i := slices.IndexFunc(s.c.servers, func(o *server) bool { return o.id == p.ID })
	o := s.c.servers[i]
	o.mu.Lock()
	dead, pull := o.dead, o.pull
	o.asked++
	o.mu.Unlock()
	switch {
	case dead:
		return fmt.Errorf("dial tcp %s: connection refused", o.address)
	case pull != nil:
		return pull(ctx, p)
	}
	return o.replica.Pull(ctx, repository, hash, s.address)
}

// Origin implements gitreplica.Peers.
func (s *server) Origin(address string) gitsource.Origin {
	return gitsource.Origin{URL: "https://" + address, Client: s.client}
}

// mangler lets a test change what other servers answer.
type mangler struct {
	s    *server
	base *http.Transport
}

func (m *mangler) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := m.base.RoundTrip(r)
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	if err == nil && m.s.mangle != nil {
		resp.Body = m.s.mangle(r.URL.Path, resp.Body)
	}
	return resp, err
}

func (s *server) onPull(f func(ctx context.Context, p gitreplica.Peer) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pull = f
}

func (s *server) onBody(f func(path string, body io.ReadCloser) io.ReadCloser) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mangle = f
}

func (s *server) url() string { return "https://" + s.address + "/git/" + repo }

// has says whether the server holds what is in force, whole, as git sees it.
func (s *server) has(hash string) bool {
	s.c.t.Helper()
	ok, err := s.git.Has(repo, hash)
	if err != nil {
		s.c.t.Fatal(err)
	}
	if ok {
		s.c.mustGit(filepath.Join(s.c.dir, s.id, repo+".git"), "fsck", "--strict", "--no-dangling", hash)
	}
	return ok
}

func (c *cluster) applied() string { return c.source().Status.Applied }
func (c *cluster) source() *api.Source {
	s, _ := api.Get[*api.Source](c.store.View(), "", repo)
	return s
}

func (c *cluster) git(dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(c.t.Context(), "git", args...)
	cmd.Dir, cmd.Env = dir, c.env
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (c *cluster) mustGit(dir string, args ...string) string {
	c.t.Helper()
	out, err := c.git(dir, args...)
	if err != nil {
		c.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

// work makes an empty work tree whose remotes are the servers.
func (c *cluster) work(name string) string {
	dir := filepath.Join(c.dir, "work-"+name)
	c.mustGit(c.dir, "init", "-q", "-b", "main", dir)
	for _, s := range c.servers {
		c.mustGit(dir, "remote", "add", s.id, s.url())
	}
	return dir
}

// commit writes an object called name into a file of the work tree, and commits it.
func (c *cluster) commit(work, name, value string) string {
	c.t.Helper()
	text := fmt.Sprintf("package shop\n%q: {apiVersion: \"v1\", kind: \"ConfigMap\", metadata: name: %q, data: x: %q}\n", name, name, value)
	if err := os.WriteFile(filepath.Join(work, name+".cue"), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.mustGit(work, "add", "-A")
	c.mustGit(work, "commit", "-q", "-m", "set "+name+" to "+value)
	return c.mustGit(work, "rev-parse", "HEAD")
}

func contains(t *testing.T, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
}

// await polls a condition that servers bring about.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("waited 30 s in vain until %s", what)
		case <-tick.C:
		}
	}
}
