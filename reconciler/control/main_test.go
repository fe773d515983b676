package control_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/control"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gate is the real store; it counts transactions, and may lose watches.
type gate struct {
	replicated.Store

	mu       sync.Mutex
	accepted map[string]int // by actor
	rejected map[string]int
	batches  int // of changes until a watch is lost, 0 for never
	lost     int
	broken   bool // every watch is lost at once
}

func (g *gate) Propose(ctx context.Context, t command.Txn) (command.Result, error) {
	res, err := g.Store.Propose(ctx, t)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil && res.Rejected == nil {
		g.accepted[t.Actor]++
	} else {
		g.rejected[t.Actor]++
	}
	return res, err
}

func (g *gate) Changes(ctx context.Context, after uint64, f func([]control.Change)) error {
	g.mu.Lock()
	left := g.batches
	if g.broken {
		defer g.mu.Unlock()
		g.lost++
		return raftstore.ErrClosed
	}
	g.mu.Unlock()
	if left == 0 {
		return g.Store.Changes(ctx, after, f)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := g.Store.Changes(ctx, after, func(changes []control.Change) {
		if left--; left < 0 {
			cancel(raftstore.ErrCompacted) // what it has just seen is lost as well
			return
		}
		f(changes)
	})
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lost++
	return err
}

// counts returns the transactions since the last call.
func (g *gate) counts() (accepted, rejected map[string]int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	accepted, rejected = g.accepted, g.rejected
	g.accepted, g.rejected = map[string]int{}, map[string]int{}
	return accepted, rejected
}

func total(m map[string]int) (n int) {
	for v := range maps.Values(m) {
		n += v
	}
	return n
}

type clock struct{}

func (clock) LastContacts() map[string]time.Time { return nil }

// world is a cluster of one server with controllers, and a node that starts every
// pod at once.
type world struct {
	t     testing.TB
	store *gate
	log   *slog.Logger
	stop  func() // the controllers
}

func newWorld(t testing.TB, change ...func(*raftstore.Config)) *world {
	t.Helper()
	cfg := raftstore.Config{
		Dir: filepath.Join(t.TempDir(), "raft"), NodeID: "one",
		Bootstrap: &command.Bootstrap{
			ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"),
			NodeMask: 24, DNS: netip.MustParseAddr("10.97.0.10"),
		},
	}
	for _, c := range change {
		c(&cfg)
	}
	s, err := raftstore.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{t: t, log: slog.New(slog.DiscardHandler)}
	w.store = &gate{Store: replicated.Store{Store: s}}
	w.store.counts()
	if err := s.WaitReady(w.ctx()); err != nil {
		t.Fatal(err)
	}
	w.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	w.node("n1")
	return w
}

func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	w.t.Cleanup(cancel)
	return ctx
}

// start runs the controllers until stop or the end of the test.
func (w *world) start() {
	c := &control.Controllers{Store: w.store, Contacts: clock{}, Log: w.log}
	w.stop = w.run("controllers", c.Run)
}

func (w *world) run(name string, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			w.t.Errorf("%s ended with %v", name, err)
		}
	})
	w.t.Cleanup(stop)
	return stop
}

func (w *world) propose(actor string, ms ...api.Mutation) *command.Rejection {
	w.t.Helper()
	res, err := w.store.Propose(w.ctx(), command.Txn{Time: time.Now().UnixMilli(), Actor: actor, Mutations: ms})
	if err != nil {
		w.t.Fatal(err)
	}
	return res.Rejected
}

func (w *world) mutate(ms ...api.Mutation) {
	w.t.Helper()
	if r := w.propose("test", ms...); r != nil {
		w.t.Fatal(r)
	}
}

func (w *world) create(o api.Object) {
	w.t.Helper()
	o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
	api.Default(o)
	w.mutate(api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
}

// change updates the Deployment "web", as a commit does: whatever its status is.
func (w *world) change(f func(*appsv1.Deployment)) {
	w.t.Helper()
	d := api.Clone(w.web())
	f(d)
	w.mutate(api.Mutation{Verb: api.Update, Key: api.KeyOf(d), Object: d, UID: d.UID})
}

func (w *world) web() *appsv1.Deployment {
	w.t.Helper()
	d, ok := api.Get[*appsv1.Deployment](w.store.View(), "default", "web")
	if !ok {
		w.t.Fatal("no deployment")
	}
	return d
}

func (w *world) node(name string, change ...func(*corev1.Node)) {
	w.t.Helper()
	room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100"), corev1.ResourceMemory: resource.MustParse("100Gi"), corev1.ResourcePods: resource.MustParse("1000")}
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
		Capacity: room, Allocatable: room,
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
	}}
	for _, c := range change {
		c(n)
	}
	w.create(n)
	w.run("node "+name, func(ctx context.Context) error { return w.kubelet(ctx, name) })
}

// kubelet makes every pod of a node ready, and removes those that shall go.
func (w *world) kubelet(ctx context.Context, node string) error {
	for {
		view := w.store.View()
		var ms []api.Mutation
		for p := range api.List[*corev1.Pod](view, "") {
			switch {
			case p.Spec.NodeName != node:
			case p.DeletionTimestamp != nil:
				ms = append(ms, api.Mutation{Verb: api.Delete, Key: api.KeyOf(p), UID: p.UID, Grace: new(int64)})
			case !api.PodReady(p) && p.Annotations["test/never-ready"] == "":
				ms = append(ms, readiness(p, true))
			}
		}
		for _, m := range ms { // each on its own, as agents that report for one pod each
			if _, err := w.store.Propose(ctx, command.Txn{Time: time.Now().UnixMilli(), Actor: "node", Mutations: []api.Mutation{m}}); err != nil && ctx.Err() == nil {
				return err
			}
		}
		if err := w.store.Await(ctx, view.Revision(), api.Pods); err != nil {
			return err
		}
	}
}

func readiness(p *corev1.Pod, ready bool) api.Mutation {
	p = api.Clone(p)
	p.Status.Phase, p.Status.PodIP = corev1.PodRunning, address(p)
	p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}}
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	api.SetPodCondition(p, corev1.PodCondition{Type: corev1.PodReady, Status: status}, time.Now())
	return api.Mutation{Verb: api.UpdateStatus, Key: api.KeyOf(p), Object: p, UID: p.UID}
}

// address gives every pod another one.
func address(p *corev1.Pod) string {
	sum := sha256.Sum256([]byte(p.UID))
	return netip.AddrFrom4([4]byte{10, 98, sum[0], sum[1]}).String()
}

// await waits until the state satisfies ok.
func (w *world) await(what string, ok func(api.Reader) bool) {
	w.t.Helper()
	ctx := w.ctx()
	for {
		view := w.store.View()
		if ok(view) {
			return
		}
		if err := w.store.Await(ctx, view.Revision(), ""); err != nil {
			w.t.Fatalf("waiting until %s: %v\n%s", what, err, w.describe())
		}
	}
}

func (w *world) describe() string {
	var b strings.Builder
	view := w.store.View()
	for d := range api.List[*appsv1.Deployment](view, "") {
		fmt.Fprintf(&b, "%s %+v\n", d.Name, d.Status)
	}
	for rs := range api.List[*appsv1.ReplicaSet](view, "") {
		fmt.Fprintf(&b, "%s wants %d, %+v\n", rs.Name, *rs.Spec.Replicas, rs.Status)
	}
	for p := range api.List[*corev1.Pod](view, "") {
		fmt.Fprintf(&b, "%s on %q ready %v deleted %v\n", p.Name, p.Spec.NodeName, api.PodReady(p), p.DeletionTimestamp)
	}
	return b.String()
}

// settled says that the Deployment "web" has n pods of its newest template, all
// ready, nothing else, and that everything which counts them says so.
func settled(r api.Reader, n int32) bool {
	d, ok := api.Get[*appsv1.Deployment](r, "default", "web")
	if !ok {
		return false
	}
	s := d.Status
	if s.ObservedGeneration != d.Generation || s.Replicas != n || s.UpdatedReplicas != n || s.ReadyReplicas != n || s.AvailableReplicas != n {
		return false
	}
	for rs := range api.Owned[*appsv1.ReplicaSet](r, d.UID) {
		if rs.Status.Replicas != *rs.Spec.Replicas || rs.Status.ReadyReplicas != *rs.Spec.Replicas {
			return false
		}
	}
	pods := 0
	for p := range api.List[*corev1.Pod](r, "") {
		if p.Spec.Containers[0].Image != d.Spec.Template.Spec.Containers[0].Image || !api.PodReady(p) {
			return false
		}
		pods++
	}
	endpoints := 0
	for s := range api.List[*discoveryv1.EndpointSlice](r, "default") {
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && *e.Conditions.Ready {
				endpoints++
			}
		}
	}
	_, served := api.Get[*corev1.Service](r, "default", "web")
	return pods == int(n) && (!served || endpoints == int(n))
}

func (w *world) awaitSettled(n int32) {
	w.t.Helper()
	w.await(fmt.Sprintf("web has settled at %d", n), func(r api.Reader) bool { return settled(r, n) })
}

// quiet fails if the state still moves although everything has settled.
func (w *world) quiet() {
	w.t.Helper()
	// What was under way when it settled may still be written, events for example.
	ctx, cancel := context.WithTimeout(w.ctx(), 2*time.Second)
	defer cancel()
	for {
		still, done := context.WithTimeout(ctx, 200*time.Millisecond)
		revision := w.store.View().Revision()
		err := w.store.Await(still, revision, "")
		done()
		switch {
		case ctx.Err() != nil:
			w.t.Fatal("the state does not come to rest")
		case err != nil:
			return
		}
	}
}

func deployment(replicas int32) *appsv1.Deployment {
	labels := map[string]string{"app": "web"}
	return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}, Spec: appsv1.DeploymentSpec{
		Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "web", Image: "web:1"}},
		}},
	}}
}

func service() *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}, Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80}},
	}}
}

func actors(m map[string]int) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%s %d", k, m[k]))
	}
	return strings.Join(parts, ", ")
}
