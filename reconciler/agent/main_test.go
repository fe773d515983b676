package agent_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/agent/fakeruntime"
	"decree.dev/decree/schemas/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// plane is a control plane in memory.
type plane struct {
	changed chan struct{}
	synced  chan struct{}

	mu       sync.Mutex
	objects  map[api.Key]api.Object
	revision uint64
	down     bool
	history  []api.Mutation
	reports  int
}

func newPlane(objects ...api.Object) *plane {
	p := &plane{changed: make(chan struct{}, 1), synced: make(chan struct{}), objects: map[api.Key]api.Object{}}
	close(p.synced)
	p.set(objects...)
	return p
}

func (p *plane) notify() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

func (p *plane) set(objects ...api.Object) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range objects {
		p.revision++
		o.SetResourceVersion(fmt.Sprint(p.revision))
		p.objects[api.KeyOf(o)] = o
	}
	p.notify()
}

func (p *plane) remove(o api.Object) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.objects, api.KeyOf(o))
	p.notify()
}

func (p *plane) View() api.Reader {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []api.Object
	for _, o := range p.objects {
		if api.KeyOf(o).Resource != api.Events {
			list = append(list, o)
		}
	}
	return api.NewSnapshot(p.revision, list...)
}

func (p *plane) Changed() <-chan struct{} { return p.changed }
func (p *plane) Synced() <-chan struct{}  { return p.synced }

func (p *plane) Report(_ context.Context, ms []api.Mutation) ([]error, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		return nil, errors.New("no server answers")
	}
	p.reports++
	errs := make([]error, len(ms))
	for i, m := range ms {
		errs[i] = p.apply(m)
	}
	p.notify()
	return errs, nil
}

func (p *plane) apply(m api.Mutation) error {
	old, ok := p.objects[m.Key]
	switch {
	case m.Verb == api.Create && ok:
		return errors.New("exists")
	case m.Verb != api.Create && !ok:
		return errors.New("not found")
	case m.UID != "" && old.GetUID() != m.UID:
		return errors.New("another uid")
	}
	p.history = append(p.history, m)
	p.revision++
	if m.Verb == api.Delete {
		delete(p.objects, m.Key)
		return nil
	}
	o := api.Clone(m.Object)
	if pod, isPod := o.(*corev1.Pod); isPod && m.Verb == api.UpdateStatus {
		keep := api.Clone(old).(*corev1.Pod)
		keep.Status = pod.Status
		o = keep
	}
	o.SetResourceVersion(fmt.Sprint(p.revision))
	p.objects[m.Key] = o
	return nil
}

func (p *plane) pod(name string) *corev1.Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	o, ok := p.objects[api.Key{Resource: api.Pods, Namespace: "default", Name: name}]
	if !ok {
		return nil
	}
	return o.(*corev1.Pod)
}

func (p *plane) node(name string) *corev1.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	o, ok := p.objects[api.Key{Resource: api.Nodes, Name: name}]
	if !ok {
		return nil
	}
	return o.(*corev1.Node)
}

// events lists "reason: message (count)" of a pod.
func (p *plane) events(name string) (out []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.objects {
		if e, ok := o.(*corev1.Event); ok && e.InvolvedObject.Name == name {
			out = append(out, fmt.Sprintf("%s: %s (%d)", e.Reason, e.Message, e.Count))
		}
	}
	return out
}

func (p *plane) setDown(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
}

// network gives every pod an address.
type network struct {
	mu       sync.Mutex
	attached map[types.UID]netip.Addr
	last     byte
	fail     error
	held     chan struct{} // not nil: services go on using pods until it is closed
}

func (n *network) Withdraw(ctx context.Context, _ types.UID) error {
	n.mu.Lock()
	held := n.held
	n.mu.Unlock()
	if held == nil {
		return nil
	}
	select {
	case <-held:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (n *network) Attach(_ context.Context, pod *corev1.Pod, _ string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		return nil, n.fail
	}
	if _, ok := n.attached[pod.UID]; !ok {
		n.last++
		n.attached[pod.UID] = netip.AddrFrom4([4]byte{10, 98, 0, n.last})
	}
	return []netip.Addr{n.attached[pod.UID]}, nil
}

func (n *network) Detach(_ context.Context, uid types.UID, _ string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.attached, uid)
	return nil
}

func (n *network) Attached(context.Context) (uids []types.UID, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for uid := range n.attached {
		uids = append(uids, uid)
	}
	return uids, nil
}

// noMounts is a Mounter for tests of other things.
type noMounts struct{}

func (noMounts) Tmpfs(string, int64) error  { return nil }
func (noMounts) Bind(uintptr, string) error { return nil }
func (noMounts) Unmount(string) error       { return nil }

// world is a node with a fake runtime, in fake time.
type world struct {
	t       *testing.T
	plane   *plane
	runtime *fakeruntime.Runtime
	network *network
	config  agent.Config
	agent   *agent.Agent
	stop    func()
}

func newWorld(t *testing.T, objects ...api.Object) *world {
	w := &world{t: t, plane: newPlane(objects...), runtime: fakeruntime.New(), network: &network{attached: map[types.UID]netip.Addr{}}}
	w.config = agent.Config{
		Node: "n1", Runtime: w.runtime, Network: w.network, ControlPlane: w.plane, Dir: t.TempDir(), Mounter: noMounts{},
		HostIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, ClusterDNS: netip.MustParseAddr("10.97.0.10"), ClusterDomain: "cluster.local",
		Logger: slog.New(slog.DiscardHandler),
	}
	return w
}

// run starts the agent; it is stopped at the end of the test, or by w.stop.
func (w *world) run() {
	w.t.Helper()
	a, err := agent.New(w.config)
	if err != nil {
		w.t.Fatal(err)
	}
	w.agent = a
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var once sync.Once
	w.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				w.t.Errorf("Run: %v", err)
			}
		})
	}
}

// assertQuiet checks that the agent does not talk without need.
func (w *world) assertQuiet(most int) {
	w.t.Helper()
	w.plane.mu.Lock()
	defer w.plane.mu.Unlock()
	n := 0
	for _, m := range w.plane.history {
		if m.Key.Resource != api.Nodes {
			n++
		}
	}
	if n > most {
		w.t.Errorf("%d reports, want at most %d", n, most)
	}
}

// after lets d of fake time pass, and everything settle.
func (w *world) after(d time.Duration) {
	time.Sleep(d) // fake time
	synctest.Wait()
}

// scenario runs f in fake time.
func scenario(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func makePod(name string, containers ...corev1.Container) *corev1.Pod {
	if len(containers) == 0 {
		containers = []corev1.Container{{Name: "main", Image: "app:1"}}
	}
	p := &corev1.Pod{}
	p.APIVersion, p.Kind = "v1", "Pod"
	p.Namespace, p.Name, p.UID = "default", name, types.UID("uid-"+name)
	p.Spec = corev1.PodSpec{NodeName: "n1", RestartPolicy: corev1.RestartPolicyAlways, Containers: containers}
	return p
}

func (w *world) status(pod, container string) corev1.ContainerStatus {
	w.t.Helper()
	p := w.plane.pod(pod)
	if p == nil {
		w.t.Fatalf("pod %s is gone", pod)
	}
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if s.Name == container {
			return s
		}
	}
	w.t.Fatalf("pod %s has no status of container %s: %+v", pod, container, p.Status)
	return corev1.ContainerStatus{}
}

func (w *world) wantEvent(pod, part string) {
	w.t.Helper()
	list := w.plane.events(pod)
	if !strings.Contains(strings.Join(list, "\n"), part) {
		w.t.Errorf("no event of pod %s has %q; they are:\n%s", pod, part, strings.Join(list, "\n"))
	}
}

func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func (w *world) calls(prefix string) (out []string) {
	for _, c := range w.runtime.Calls() {
		if strings.HasPrefix(c, prefix) {
			out = append(out, c)
		}
	}
	return out
}
