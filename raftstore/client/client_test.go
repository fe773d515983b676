package client_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
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

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// cluster is a store whose API server can be stopped and started at one address.
type cluster struct {
	t       *testing.T
	store   *raftstore.Store
	ca      *pki.Authority
	address string
	stop    func() // nil: not serving
	// refuse makes the server answer 503 this many times.
	refuse atomic.Int32
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	dir := t.TempDir()
	c := &cluster{t: t, address: "127.0.0.1:0"}
	var err error
	if c.ca, err = pki.Open(filepath.Join(dir, "pki"), time.Now()); err != nil {
		t.Fatal(err)
	}
	c.store, err = raftstore.Open(raftstore.Config{Dir: filepath.Join(dir, "store"), NodeID: "one", HistoryEvents: 20, Bootstrap: &command.Bootstrap{
		ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"), NodeMask: 24, DNS: netip.MustParseAddr("10.97.0.10"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.down()
		if err := c.store.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := c.store.WaitReady(timeout(t)); err != nil {
		t.Fatal(err)
	}
	c.up()
	return c
}

func timeout(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func (c *cluster) up() {
	c.t.Helper()
	pair, err := c.ca.Issue(pki.Server("127.0.0.1"), time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := pair.TLS()
	if err != nil {
		c.t.Fatal(err)
	}
	s, err := apiserver.New(apiserver.Config{Store: c.store, Nodes: echo{}, Log: quiet,
		TLS: &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: c.ca.Pool()},
		Mount: map[string]http.Handler{"/flaky": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if c.refuse.Add(-1) >= 0 {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","code":503,"reason":"ServiceUnavailable","message":"later"}`)
				return
			}
			_, _ = io.WriteString(w, "fine")
		})}})
	if err != nil {
		c.t.Fatal(err)
	}
	l, err := net.Listen("tcp", c.address)
	if err != nil {
		c.t.Fatal(err)
	}
	c.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	c.stop = func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Error(err)
		}
	}
}

func (c *cluster) down() {
	if c.stop != nil {
		c.stop()
		c.stop = nil
	}
}

func (c *cluster) client(r pki.Request) *client.Client {
	c.t.Helper()
	pair, err := c.ca.Issue(r, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	cl, err := client.New(client.Config{Server: "https://" + c.address, CA: c.ca.CertPEM(), Pair: pair, Log: quiet})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(cl.Close)
	return cl
}

func (c *cluster) apply(ms ...api.Mutation) {
	c.t.Helper()
	res, err := c.store.Propose(timeout(c.t), command.Txn{Actor: "controller/test", Mutations: ms})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) create(o api.Object) {
	c.t.Helper()
	c.apply(api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
}

func (c *cluster) remove(o api.Object) {
	c.t.Helper()
	zero := int64(0)
	m := api.Mutation{Verb: api.Delete, Key: api.KeyOf(o)}
	if m.Key.Resource == api.Pods {
		m.Grace = &zero
	}
	c.apply(m)
}

func typed[T api.Object](o T, namespace, name string) T {
	o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
	o.SetNamespace(namespace)
	o.SetName(name)
	return o
}

func newPod(name, node, secret string) *corev1.Pod {
	p := typed(&corev1.Pod{}, "default", name)
	p.Spec.NodeName = node
	p.Spec.Containers = []corev1.Container{{Name: "c", Image: "i"}}
	if secret != "" {
		p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: secret}}
	}
	return p
}

func newSecret(name, value string) *corev1.Secret {
	s := typed(&corev1.Secret{}, "default", name)
	s.Type = corev1.SecretTypeOpaque
	s.Data = map[string][]byte{"k": []byte(value)}
	return s
}

// echo is a node that answers with what it was asked.
type echo struct{}

func (echo) Logs(_ context.Context, node string, pod *corev1.Pod, opts *corev1.PodLogOptions, w io.Writer) error {
	_, err := fmt.Fprintf(w, "%s %s %s tail=%v", node, pod.Name, opts.Container, *opts.TailLines)
	return err
}

func (echo) Metrics(context.Context, string, http.Header) (*apiserver.Exposition, error) {
	return nil, apiserver.ErrNotFound
}

func (echo) Exec(ctx context.Context, _ string, _ *corev1.Pod, e apiserver.ExecStreams) (int, error) {
	if e.Resize != nil {
		select {
		case s := <-e.Resize:
			_, err := fmt.Fprintf(e.Stdout, "%dx%d", s.Width, s.Height)
			return 3, err
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if e.Stdin != nil {
		_, err := io.Copy(e.Stdout, e.Stdin)
		return 0, err
	}
	_, err := fmt.Fprint(e.Stderr, strings.Join(e.Command, " "))
	return 42, err
}

func TestStreams(t *testing.T) {
	c := newCluster(t)
	c.create(newPod("p", "n1", ""))
	admin := c.client(pki.Admin("admin"))
	var out, errs bytes.Buffer
	tail := int64(7)
	if err := admin.Logs(timeout(t), "default", "p", corev1.PodLogOptions{TailLines: &tail}, &out); err != nil || out.String() != "n1 p c tail=7" {
		t.Errorf("%q %v", out.String(), err)
	}
	code, err := admin.Exec(timeout(t), "default", "p", apiserver.ExecStreams{Command: []string{"false", "it"}, Stderr: &errs})
	if err != nil || code != 42 || errs.String() != "false it" {
		t.Errorf("%d %q %v", code, errs.String(), err)
	}
	out.Reset()
	code, err = admin.Exec(timeout(t), "default", "p", apiserver.ExecStreams{Command: []string{"cat"}, Stdin: strings.NewReader("in and out"), Stdout: &out})
	if err != nil || code != 0 || out.String() != "in and out" {
		t.Errorf("%d %q %v", code, out.String(), err)
	}
	out.Reset()
	sizes := make(chan apiserver.TerminalSize, 1)
	sizes <- apiserver.TerminalSize{Width: 132, Height: 43}
	close(sizes)
	code, err = admin.Exec(timeout(t), "default", "p", apiserver.ExecStreams{Command: []string{"sh"}, TTY: true, Stdout: &out, Resize: sizes})
	if err != nil || code != 3 || out.String() != "132x43" {
		t.Errorf("%d %q %v", code, out.String(), err)
	}
	if _, err := admin.Exec(timeout(t), "default", "none", apiserver.ExecStreams{Command: []string{"sh"}, Stdout: &out}); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("exec in no pod: %v", err)
	}
}

func TestReadsAndRetries(t *testing.T) {
	c := newCluster(t)
	c.create(newPod("p", "n1", ""))
	admin := c.client(pki.Admin("admin"))
	p, err := client.Get[*corev1.Pod](timeout(t), admin, "default", "p")
	if err != nil || p.Spec.NodeName != "n1" {
		t.Fatalf("%v %v", p, err)
	}
	if _, err := client.Get[*corev1.Pod](timeout(t), admin, "default", "none"); !apierrors.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	c.refuse.Store(2)
	if body, err := admin.Raw(timeout(t), "GET", "/flaky", nil, "", nil); err != nil || string(body) != "fine" {
		t.Errorf("after two refusals: %s %v", body, err)
	}
	c.refuse.Store(100)
	if _, err := admin.Raw(timeout(t), "GET", "/flaky", nil, "", nil); !apierrors.IsServiceUnavailable(err) {
		t.Errorf("refused for ever: %v", err)
	}
	c.down()
	back := make(chan struct{})
	go func() {
		defer close(back)
		<-time.After(150 * time.Millisecond) // longer than the first attempt takes
		c.up()
	}()
	if _, err := client.Get[*corev1.Pod](timeout(t), admin, "default", "p"); err != nil {
		t.Errorf("the server came back, but: %v", err)
	}
	<-back
	c.down()
	if _, err := client.Get[*corev1.Pod](timeout(t), admin, "default", "p"); err == nil || !strings.Contains(err.Error(), c.address) {
		t.Errorf("no server: %v", err)
	}
}

// running is a mirror at work.
type running struct {
	*client.Mirror
	t    *testing.T
	stop func()
}

func (c *cluster) mirror(cache string) *running {
	c.t.Helper()
	m, err := client.NewMirror(client.MirrorConfig{Client: c.client(pki.Node("n1")), Node: "n1", Select: client.NodeSelections("n1"), Cache: cache, Log: quiet})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	stopped := false
	r := &running{Mirror: m, t: c.t}
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			c.t.Errorf("run: %v", err)
		}
	}
	c.t.Cleanup(r.stop)
	return r
}

// until waits for the view to be as it should.
func (r *running) until(what string, ok func(api.Reader) bool) {
	r.t.Helper()
	ctx := timeout(r.t)
	for !ok(r.View()) {
		select {
		case <-r.Changed():
		case <-ctx.Done():
			r.t.Fatalf("never: %s", what)
		}
	}
}

func has[T api.Object](name string) func(api.Reader) bool {
	return func(v api.Reader) bool { _, ok := api.Get[T](v, "default", name); return ok }
}

func not(f func(api.Reader) bool) func(api.Reader) bool {
	return func(v api.Reader) bool { return !f(v) }
}

func TestMirror(t *testing.T) {
	c := newCluster(t)
	c.create(newSecret("s", "1"))
	c.create(newSecret("alien", "1"))
	c.create(newPod("first", "n1", ""))
	c.create(newPod("other", "n2", "alien"))
	cache := filepath.Join(t.TempDir(), "mirror")
	m := c.mirror(cache)
	select {
	case <-m.Synced():
	case <-timeout(t).Done():
		t.Fatal("never synced")
	}
	v := m.View()
	if !has[*corev1.Pod]("first")(v) || has[*corev1.Pod]("other")(v) || has[*corev1.Secret]("s")(v) {
		t.Error("the first view is wrong")
	}
	c.create(newPod("second", "n1", "s"))
	m.until("second and its secret", func(v api.Reader) bool { return has[*corev1.Pod]("second")(v) && has[*corev1.Secret]("s")(v) })
	if has[*corev1.Pod]("second")(v) {
		t.Error("an old view has changed")
	}
	c.apply(api.Mutation{Verb: api.Update, Key: api.KeyOf(newSecret("s", "")), Object: newSecret("s", "2")})
	m.until("the new secret", func(v api.Reader) bool {
		s, ok := api.Get[*corev1.Secret](v, "default", "s")
		return ok && string(s.Data["k"]) == "2"
	})
	c.remove(newPod("second", "", ""))
	m.until("no second, no secret", func(v api.Reader) bool { return !has[*corev1.Pod]("second")(v) && !has[*corev1.Secret]("s")(v) })
	if has[*corev1.Secret]("alien")(m.View()) {
		t.Error("the secret of another node's pod is here")
	}

	// The server is away, and what it kept is overtaken: nothing is lost, nothing stays.
	c.down()
	c.remove(newPod("first", "", ""))
	for i := range 30 {
		c.create(newSecret(fmt.Sprintf("noise-%d", i), ""))
	}
	c.create(newPod("third", "n1", ""))
	c.up()
	m.until("third, not first", func(v api.Reader) bool { return has[*corev1.Pod]("third")(v) && !has[*corev1.Pod]("first")(v) })

	// A new process without a server knows what the last one knew.
	m.stop()
	c.down()
	for _, r := range []string{"pods", "secrets"} {
		info, err := os.Stat(filepath.Join(cache, r+".json"))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%v %v", info, err)
		}
	}
	offline := c.mirror(cache)
	select {
	case <-offline.Synced():
	default:
		t.Error("not synced from the cache")
	}
	select {
	case <-offline.Current():
		t.Error("a cache counts as what the server says")
	default:
	}
	if !has[*corev1.Pod]("third")(offline.View()) || has[*corev1.Pod]("first")(offline.View()) {
		t.Error("the cache is wrong")
	}
	if _, err := offline.Report(timeout(t), nil); err == nil {
		t.Error("a report arrived nowhere")
	}
	// And catches up when there is one.
	c.remove(newPod("third", "", ""))
	c.up()
	offline.until("no third", not(has[*corev1.Pod]("third")))
	select {
	case <-offline.Current():
	case <-timeout(t).Done():
		t.Error("never current")
	}
}

func TestMirrorOwned(t *testing.T) {
	c := newCluster(t)
	p := newPod("p", "n1", "")
	yes := true
	p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "r", UID: "u-1", Controller: &yes}}
	c.create(p)
	m := c.mirror("")
	m.until("p", has[*corev1.Pod]("p"))
	owned := func() (n int) {
		for range m.View().Owned("u-1") {
			n++
		}
		return n
	}
	if owned() != 1 {
		t.Errorf("%d owned", owned())
	}
	c.remove(p)
	m.until("no p", not(has[*corev1.Pod]("p")))
	if owned() != 0 {
		t.Errorf("%d owned after the removal", owned())
	}
}

func TestMirrorIgnoresDamagedCache(t *testing.T) {
	c := newCluster(t)
	c.create(newPod("p", "n1", ""))
	cache := t.TempDir()
	for name, text := range map[string]string{
		"pods.json":       "{torn",
		"secrets.json":    `{"version":1,"resource":"secrets","objects":2}` + "\n" + `{"kind":"Secret","apiVersion":"v1","metadata":{"name":"x"}}` + "\n",
		"configmaps.json": `{"version":99,"resource":"configmaps"}` + "\n",
	} {
		if err := os.WriteFile(filepath.Join(cache, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m := c.mirror(cache)
	m.until("p", has[*corev1.Pod]("p"))
	m.until("no x", not(has[*corev1.Secret]("x")))
}
