package apiserver_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) {
	// client-go leaves the readers of a cancelled WebSocket session behind.
	const left = "k8s.io/client-go/tools/remotecommand."
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction(left+"(*streamProtocolV2).copyStdout.func1"),
		goleak.IgnoreAnyFunction(left+"watchErrorStream.func1"),
		goleak.IgnoreAnyFunction(left+"(*heartbeat).start"),
		goleak.IgnoreAnyFunction(left+"(*wsStreamExecutor).StreamWithContext.func1"))
}

// fixture is a server on loopback with a real store, and certificates for it.
type fixture struct {
	t          testing.TB
	store      *raftstore.Store
	server     *apiserver.Server
	ca         *pki.Authority
	url        string
	kubeconfig string
	nodes      *fakeNodes
	sources    *fakeSources
	logs       *syncBuffer
	heard      sync.Map // node -> time.Time
}

// LastContact is when the server last told that a node has reported.
func (f *fixture) LastContact(node string) time.Time {
	t, _ := f.heard.Load(node)
	last, _ := t.(time.Time)
	return last
}

// syncBuffer collects the log of a server.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newFixture(t testing.TB, change ...func(*apiserver.Config)) *fixture {
	t.Helper()
	dir := t.TempDir()
	f := &fixture{t: t, nodes: newFakeNodes(), sources: &fakeSources{}, logs: &syncBuffer{}, kubeconfig: filepath.Join(dir, "kubeconfig")}
	f.store = openStore(t, filepath.Join(dir, "store"))
	var err error
	if f.ca, err = pki.Open(filepath.Join(dir, "pki"), time.Now()); err != nil {
		t.Fatal(err)
	}
	serverPair, err := f.ca.Issue(pki.Server("127.0.0.1", "localhost"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := serverPair.TLS()
	if err != nil {
		t.Fatal(err)
	}
	cfg := apiserver.Config{
		Store: f.store, Nodes: f.nodes, Sources: f.sources, Version: "0.1.0",
		Heard: func(node string, at time.Time) { f.heard.Store(node, at) },
		TLS:   &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: f.ca.Pool()},
		Log:   slog.New(slog.NewTextHandler(f.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, c := range change {
		c(&cfg)
	}
	if f.server, err = apiserver.New(cfg); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.url = "https://" + l.Addr().String()
	serve(t, f.server, l)
	admin, err := f.ca.Issue(pki.Admin("admin"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := (pki.Kubeconfig{Server: f.url, CA: f.ca.CertPEM(), User: "admin", Pair: admin}).Write(f.kubeconfig); err != nil {
		t.Fatal(err)
	}
	return f
}

func serve(t testing.TB, s *apiserver.Server, l net.Listener) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func openStore(t testing.TB, dir string) *raftstore.Store {
	t.Helper()
	s, err := raftstore.Open(raftstore.Config{Dir: dir, NodeID: "one", Bootstrap: &command.Bootstrap{
		ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"),
		PodCIDR:     netip.MustParsePrefix("10.98.0.0/16"),
		NodeMask:    24,
		DNS:         netip.MustParseAddr("10.97.0.10"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.WaitReady(timeout(t)); err != nil {
		t.Fatal(err)
	}
	return s
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// as returns a client with a certificate of its own.
func (f *fixture) as(r pki.Request) *client.Client {
	f.t.Helper()
	pair, err := f.ca.Issue(r, time.Now())
	if err != nil {
		f.t.Fatal(err)
	}
	c, err := client.New(client.Config{Server: f.url, CA: f.ca.CertPEM(), Pair: pair, Retries: -1, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(c.Close)
	return c
}

func (f *fixture) admin() *client.Client { return f.as(pki.Admin("admin")) }

// apply proposes mutations and fails the test if they are rejected.
func (f *fixture) apply(ms ...api.Mutation) uint64 {
	f.t.Helper()
	res, err := f.store.Propose(timeout(f.t), command.Txn{Actor: "controller/test", Mutations: ms})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return res.Revision
}

func (f *fixture) create(objects ...api.Object) uint64 {
	f.t.Helper()
	var ms []api.Mutation
	for _, o := range objects {
		ms = append(ms, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	return f.apply(ms...)
}

// push brings objects into force as a commit of a source does.
func (f *fixture) push(source, commit string, objects ...api.Object) {
	f.t.Helper()
	rev := &api.Revision{Spec: api.RevisionSpec{Source: source, Commit: commit, Result: api.RevisionApplied, Subject: "first", Author: "Ann <ann@example.org>"}}
	rev.SetGroupVersionKind(api.GroupVersion.WithKind("Revision"))
	rev.Name = source + "-" + commit[:12]
	txn := command.Txn{Actor: "git/" + source, Commit: &command.Commit{Source: source, Revision: rev}}
	for i, o := range objects {
		api.Origin{Source: source, Commit: commit, Pos: api.Position{File: "apps/web.cue", Line: 14 + i}}.Set(o)
		txn.Mutations = append(txn.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	res, err := f.store.Propose(timeout(f.t), txn)
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

const commitHash = "3f2a1c9d00aa11bb22cc33dd44ee55ff66778899"

func typed[T api.Object](o T, namespace, name string) T {
	o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
	o.SetNamespace(namespace)
	o.SetName(name)
	return o
}

func newPod(name, node string) *corev1.Pod {
	p := typed(&corev1.Pod{}, "default", name)
	p.Labels = map[string]string{"app": "web"}
	p.Spec.NodeName = node
	p.Spec.Containers = []corev1.Container{{Name: "web", Image: "registry.example/web:1"}}
	return p
}

func newNode(name string) *corev1.Node {
	n := typed(&corev1.Node{}, "", name)
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "AgentReady", LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()}}
	n.Status.NodeInfo.KubeletVersion = "v1.37.0"
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	return n
}

func newConfigMap(name, value string) *corev1.ConfigMap {
	c := typed(&corev1.ConfigMap{}, "default", name)
	c.Data = map[string]string{"value": value}
	return c
}

func newSecret(name, value string) *corev1.Secret {
	s := typed(&corev1.Secret{}, "default", name)
	s.Data = map[string][]byte{"password": []byte(value)}
	s.Type = corev1.SecretTypeOpaque
	return s
}

func newDeployment(name string) *appsv1.Deployment {
	d := typed(&appsv1.Deployment{}, "default", name)
	replicas := int32(2)
	d.Spec.Replicas = &replicas
	d.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}
	d.Spec.Template.Labels = map[string]string{"app": name}
	d.Spec.Template.Spec.Containers = []corev1.Container{{Name: "web", Image: "registry.example/web:1"}}
	return d
}

// running sets the status of a pod that runs.
func (f *fixture) running(name string) {
	f.t.Helper()
	p, ok := api.Get[*corev1.Pod](f.store.View(), "default", name)
	if !ok {
		f.t.Fatalf("no pod %s", name)
	}
	p = api.Clone(p)
	started := true
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.98.0.2",
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		ContainerStatuses: []corev1.ContainerStatus{{Name: "web", Ready: true, Started: &started, Image: "registry.example/web:1", RestartCount: 1,
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}}}}
	f.apply(api.Mutation{Verb: api.UpdateStatus, Key: api.KeyOf(p), Object: p})
}

// fakeNodes stands for the nodes' runtimes: logs come from a channel, exec runs a
// few built-in commands.
type fakeNodes struct {
	mu      sync.Mutex
	last    *corev1.PodLogOptions
	lines   chan string   // a followed log
	started chan struct{} // receives when an exec of "wait" has begun
	ended   chan error    // receives why "wait" ended
}

func newFakeNodes() *fakeNodes {
	return &fakeNodes{lines: make(chan string), started: make(chan struct{}, 1), ended: make(chan error, 1)}
}

func (n *fakeNodes) Logs(ctx context.Context, node string, pod *corev1.Pod, opts *corev1.PodLogOptions, w io.Writer) error {
	n.mu.Lock()
	n.last = opts
	n.mu.Unlock()
	if opts.Previous {
		return fmt.Errorf("previous container %s: %w", opts.Container, apiserver.ErrNotFound)
	}
	if _, err := fmt.Fprintf(w, "%s on %s\n", pod.Name, node); err != nil {
		return err
	}
	for opts.Follow {
		select {
		case line, ok := <-n.lines:
			if !ok {
				return nil
			}
			if _, err := fmt.Fprintln(w, line); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (n *fakeNodes) Exec(ctx context.Context, _ string, _ *corev1.Pod, e apiserver.ExecStreams) (int, error) {
	switch e.Command[0] {
	case "cat":
		_, err := io.Copy(e.Stdout, e.Stdin)
		return 0, err
	case "fail":
		_, _ = fmt.Fprintln(e.Stderr, "it went wrong")
		return 7, nil
	case "broken":
		return 0, errors.New("the runtime is gone")
	case "size":
		select {
		case size := <-e.Resize:
			_, err := fmt.Fprintf(e.Stdout, "%dx%d", size.Width, size.Height)
			return 0, err
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	case "wait":
		n.started <- struct{}{}
		<-ctx.Done()
		n.ended <- ctx.Err()
		return 0, ctx.Err()
	case "flood":
		_, err := e.Stdout.Write([]byte(strings.Repeat("0123456789abcde\n", 1<<16)))
		return 0, err
	}
	_, err := fmt.Fprintln(e.Stdout, strings.Join(e.Command, " "))
	return 0, err
}

// Metrics implements apiserver.Nodes: what is said of a node depends on its name.
func (n *fakeNodes) Metrics(ctx context.Context, node string, accept http.Header) (*apiserver.Exposition, error) {
	switch node {
	case "away":
		return nil, apierrors.NewServiceUnavailable("the agent of this node is not connected")
	case "slow":
		<-ctx.Done()
		return nil, ctx.Err()
	case "large":
		return nil, apiserver.ErrTooLarge
	case "page":
		return &apiserver.Exposition{Type: "text/html; charset=utf-8", Body: []byte("<script>")}, nil
	}
	e := &apiserver.Exposition{Type: "text/plain; version=0.0.4", Encoding: accept.Get("Accept-Encoding")}
	e.Body = fmt.Appendf(nil, "# %s reads %s of %s\n", accept.Get("User-Agent"), accept.Get("Accept"), node)
	return e, nil
}

// fakeSources records what it was asked.
type fakeSources struct {
	mu    sync.Mutex
	asked []string
}

func (s *fakeSources) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, fmt.Sprintf(format, args...))
}

func (s *fakeSources) Sync(_ context.Context, source, user string) error {
	s.note("sync %s by %s", source, user)
	return nil
}

func (s *fakeSources) Suspend(_ context.Context, source, user, reason string) error {
	s.note("suspend %s by %s: %s", source, user, reason)
	return nil
}

func (s *fakeSources) Resume(_ context.Context, source, user string) error {
	s.note("resume %s by %s", source, user)
	return nil
}

func (s *fakeSources) Plan(_ context.Context, source string, tree fs.FS) (*apiserver.Plan, error) {
	p := &apiserver.Plan{}
	err := fs.WalkDir(tree, ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			p.Changes = append(p.Changes, api.Change{Verb: "create", Key: api.Key{Resource: api.ConfigMaps, Name: source}, File: path})
		}
		return err
	})
	return p, err
}

// raw sends a request without the client's help.
func (f *fixture) raw(c *http.Client, method, path, accept string) (int, string) {
	f.t.Helper()
	req, err := http.NewRequestWithContext(timeout(f.t), method, f.url+path, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	resp, err := c.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// http returns a plain HTTP client, with or without a certificate.
func (f *fixture) http(r *pki.Request) *http.Client {
	cfg := &tls.Config{RootCAs: f.ca.Pool()}
	if r != nil {
		pair, err := f.ca.Issue(*r, time.Now())
		if err != nil {
			f.t.Fatal(err)
		}
		cert, err := pair.TLS()
		if err != nil {
			f.t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	tr := &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}
	f.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}
