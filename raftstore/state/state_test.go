package state_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// world is a state with its log, as a test drives it.
type world struct {
	t      *testing.T
	s      *state.State
	index  uint64
	now    int64
	events []state.Event // of the last transaction
}

func bootstrap() *command.Bootstrap {
	return &command.Bootstrap{
		ClusterID:   "test",
		ServiceCIDR: netip.MustParsePrefix("10.97.0.0/29"),
		PodCIDR:     netip.MustParsePrefix("10.98.0.0/22"),
		NodeMask:    24,
		DNS:         netip.MustParseAddr("10.97.0.2"),
	}
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, s: state.New(), now: 1_700_000_000_500}
	w.must(command.Txn{Bootstrap: bootstrap()})
	return w
}

func (w *world) do(txn command.Txn) command.Result {
	w.t.Helper()
	w.index++
	if txn.Time == 0 {
		txn.Time = w.now
	}
	before, hash := w.s, w.s.Hash()
	next, result, events := state.Reduce(w.s, w.index, txn)
	if before.Hash() != hash {
		w.t.Fatal("Reduce changed its input")
	}
	if result.Rejected != nil && (next != before || len(events) > 0) {
		w.t.Fatalf("a rejected transaction changed something: %v", result.Rejected)
	}
	if result.Revision != next.Revision() {
		w.t.Fatalf("result has revision %d, the state %d", result.Revision, next.Revision())
	}
	w.s, w.events = next, events
	return result
}

func (w *world) must(txn command.Txn) {
	w.t.Helper()
	if r := w.do(txn); r.Rejected != nil {
		w.t.Fatalf("rejected (%s): %v", r.Rejected.Code, r.Rejected)
	}
}

// refuse expects a rejection that says all of these words.
func (w *world) refuse(code command.Code, txn command.Txn, words ...string) {
	w.t.Helper()
	r := w.do(txn)
	if r.Rejected == nil || r.Rejected.Code != code {
		w.t.Fatalf("got %+v, want a rejection with code %s", r.Rejected, code)
	}
	for _, word := range words {
		if !strings.Contains(r.Rejected.Error(), word) {
			w.t.Fatalf("rejection %q does not say %q", r.Rejected, word)
		}
	}
}

func fetch[T api.Object](w *world, namespace, name string) T {
	w.t.Helper()
	o, ok := api.Get[T](w.s, namespace, name)
	if !ok {
		w.t.Fatalf("%T %s/%s is absent", o, namespace, name)
	}
	return o
}

func mutation(v api.Verb, o api.Object) api.Mutation {
	m := api.Mutation{Verb: v, Key: api.KeyOf(o), Object: o}
	if v == api.Delete {
		m.Object = nil
	}
	return m
}

func txn(v api.Verb, objects ...api.Object) command.Txn {
	t := command.Txn{Actor: "controller/test"}
	for _, o := range objects {
		t.Mutations = append(t.Mutations, mutation(v, o))
	}
	return t
}

func meta(o api.Object, name string) {
	kind := api.KindOf(o)
	o.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind)
	o.SetName(name)
	if kind.Namespaced {
		o.SetNamespace("default")
	}
}

func service(name string, edits ...func(*corev1.Service)) *corev1.Service {
	o := &corev1.Service{Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP}}
	meta(o, name)
	for _, edit := range edits {
		edit(o)
	}
	return o
}

func ip(a string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Spec.ClusterIP = a }
}

func node(name string) *corev1.Node {
	o := &corev1.Node{}
	meta(o, name)
	return o
}

func pod(name, nodeName string) *corev1.Pod {
	o := &corev1.Pod{Spec: corev1.PodSpec{NodeName: nodeName, Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
	meta(o, name)
	return o
}

func configMap(name, value string) *corev1.ConfigMap {
	o := &corev1.ConfigMap{Data: map[string]string{"value": value}}
	meta(o, name)
	return o
}

func from[T api.Object](o T, source string) T {
	api.Origin{Source: source, Commit: "3f2a1c9000", Pos: api.Position{File: source + "/web.cue", Line: 14}}.Set(o)
	return o
}

func sourceObject(name string) *api.Source {
	o := &api.Source{}
	meta(o, name)
	return o
}

func commit(source, parent, hash string, mutations ...api.Mutation) command.Txn {
	revision := &api.Revision{Spec: api.RevisionSpec{Source: source, Commit: hash, Result: api.RevisionApplied}}
	meta(revision, "")
	return command.Txn{Actor: "git/" + source, Commit: &command.Commit{Source: source, Parent: parent, Revision: revision}, Mutations: mutations}
}

func TestNothingBeforeBootstrap(t *testing.T) {
	w := &world{t: t, s: state.New()}
	w.refuse(command.Invalid, txn(api.Create, configMap("a", "1")), "no settings")
	bad := bootstrap()
	bad.DNS = netip.MustParseAddr("10.1.1.1")
	w.refuse(command.Invalid, command.Txn{Bootstrap: bad}, "DNS")
	w.must(command.Txn{Bootstrap: bootstrap()})
	w.refuse(command.Exists, command.Txn{Bootstrap: bootstrap()}, "id is test")
}

func TestBootstrapSettings(t *testing.T) {
	for name, edit := range map[string]func(*command.Bootstrap){
		"no id":             func(b *command.Bootstrap) { b.ClusterID = "" },
		"no service range":  func(b *command.Bootstrap) { b.ServiceCIDR = netip.Prefix{} },
		"not a network":     func(b *command.Bootstrap) { b.PodCIDR = netip.MustParsePrefix("10.98.0.1/22") },
		"too small":         func(b *command.Bootstrap) { b.ServiceCIDR = netip.MustParsePrefix("10.97.0.2/31") },
		"overlap":           func(b *command.Bootstrap) { b.PodCIDR = netip.MustParsePrefix("10.96.0.0/12") },
		"mask too wide":     func(b *command.Bootstrap) { b.NodeMask = 21 },
		"mask too narrow":   func(b *command.Bootstrap) { b.NodeMask = 32 },
		"dns at the end":    func(b *command.Bootstrap) { b.DNS = netip.MustParseAddr("10.97.0.7") },
		"dns missing":       func(b *command.Bootstrap) { b.DNS = netip.Addr{} },
		"dns other family":  func(b *command.Bootstrap) { b.DNS = netip.MustParseAddr("::1") },
		"too many nodes":    func(b *command.Bootstrap) { b.PodCIDR, b.NodeMask = netip.MustParsePrefix("fd00::/32"), 64 },
		"IPv4 within IPv6":  func(b *command.Bootstrap) { b.ServiceCIDR = netip.MustParsePrefix("::ffff:10.97.0.0/120") },
		"one address range": func(b *command.Bootstrap) { b.ServiceCIDR = netip.MustParsePrefix("10.97.0.2/32") },
	} {
		t.Run(name, func(t *testing.T) {
			b := bootstrap()
			edit(b)
			if err := state.CheckBootstrap(b); err == nil {
				t.Fatal("accepted")
			}
		})
	}
	if err := state.CheckBootstrap(bootstrap()); err != nil {
		t.Fatal(err)
	}
}

func TestCreateAssigns(t *testing.T) {
	w := newWorld(t)
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{UID: "mine", ResourceVersion: "77", Generation: 9, CreationTimestamp: metav1.Unix(1, 0)}}
	meta(d, "web")
	w.must(txn(api.Create, d, configMap("c", "1")))
	got := fetch[*appsv1.Deployment](w, "default", "web")
	if len(got.UID) != 36 || got.UID[14] != '8' || got.ResourceVersion != "2" || got.Generation != 1 {
		t.Fatalf("got %+v", got.ObjectMeta)
	}
	if !got.CreationTimestamp.Time.Equal(time.Unix(1_700_000_000, 0)) {
		t.Fatalf("created %v", got.CreationTimestamp)
	}
	if d.UID != "mine" {
		t.Fatal("the transaction's object was modified")
	}
	if c := fetch[*corev1.ConfigMap](w, "default", "c"); c.Generation != 0 || c.UID == got.UID || c.ResourceVersion != "3" {
		t.Fatalf("got %+v", c.ObjectMeta)
	}
	if len(w.events) != 2 || w.events[0].Revision != 2 || w.events[1].Revision != 3 || w.events[0].Old != nil || w.events[0].New != api.Object(got) {
		t.Fatalf("events %+v", w.events)
	}
}

func TestTimeNeverGoesBack(t *testing.T) {
	w := newWorld(t)
	late := txn(api.Create, configMap("a", "1"))
	late.Time = 1_000
	w.must(late)
	if got := fetch[*corev1.ConfigMap](w, "default", "a").CreationTimestamp; !got.Time.Equal(time.Unix(1_700_000_000, 0)) {
		t.Fatalf("created %v", got)
	}
}

func TestPlainRejections(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, configMap("a", "1")))
	with := func(edit func(*api.Mutation)) command.Txn {
		m := mutation(api.Update, configMap("a", "2"))
		edit(&m)
		return command.Txn{Mutations: []api.Mutation{m}}
	}
	for name, c := range map[string]struct {
		code command.Code
		txn  command.Txn
		says string
	}{
		"exists":           {command.Exists, txn(api.Create, configMap("a", "2")), "exists"},
		"update absent":    {command.NotFound, txn(api.Update, configMap("b", "2")), "does not exist"},
		"status absent":    {command.NotFound, txn(api.UpdateStatus, pod("b", "")), "does not exist"},
		"delete absent":    {command.NotFound, txn(api.Delete, configMap("b", "2")), "does not exist"},
		"twice":            {command.Invalid, txn(api.Update, configMap("a", "2"), configMap("a", "3")), "twice"},
		"no object":        {command.Invalid, with(func(m *api.Mutation) { m.Object = nil }), "without an object"},
		"typed nil":        {command.Invalid, with(func(m *api.Mutation) { m.Object = (*corev1.ConfigMap)(nil) }), "without an object"},
		"other key":        {command.Invalid, with(func(m *api.Mutation) { m.Key.Name = "z" }), "carries"},
		"other kind":       {command.Invalid, with(func(m *api.Mutation) { m.Object = pod("a", "") }), "carries"},
		"unknown resource": {command.Invalid, with(func(m *api.Mutation) { m.Key.Resource = "teapots" }), "teapots"},
		"unknown verb":     {command.Invalid, with(func(m *api.Mutation) { m.Verb = 99 }), "verb"},
		"no verb":          {command.Invalid, with(func(m *api.Mutation) { m.Verb = 0 }), "verb"},
		"revision":         {command.Conflict, with(func(m *api.Mutation) { m.Revision = 7 }), "revision 7"},
		"uid":              {command.Conflict, with(func(m *api.Mutation) { m.UID = "x" }), "replaced"},
		"no namespace":     {command.Invalid, with(func(m *api.Mutation) { m.Key.Namespace = ""; m.Object.SetNamespace("") }), "namespace"},
		"no name":          {command.Invalid, with(func(m *api.Mutation) { m.Key.Name = ""; m.Object.SetName("") }), "name"},
		"zero byte":        {command.Invalid, with(func(m *api.Mutation) { m.Key.Name = "a\x00b"; m.Object.SetName("a\x00b") }), "not a name"},
		"slash":            {command.Invalid, with(func(m *api.Mutation) { m.Key.Name = "a/b"; m.Object.SetName("a/b") }), "not a name"},
		"namespaced node":  {command.Invalid, txn(api.Create, func() api.Object { n := node("n"); n.Namespace = "x"; return n }()), "no namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			w.t = t
			w.refuse(c.code, c.txn, c.says)
		})
	}
}

func TestAllOrNothing(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, configMap("a", "1")))
	hash := w.s.Hash()
	bad := txn(api.Create, configMap("b", "1"), service("s"), node("n"))
	bad.Key = "k"
	bad.Mutations = append(bad.Mutations, mutation(api.Create, configMap("a", "1")))
	w.refuse(command.Exists, bad)
	if w.s.Hash() != hash {
		t.Fatal("half a transaction was applied")
	}
}

func TestPreconditionsHold(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, configMap("a", "1")))
	got := fetch[*corev1.ConfigMap](w, "default", "a")
	m := mutation(api.Update, configMap("a", "2"))
	m.Revision, m.UID = 2, got.UID
	w.must(command.Txn{Mutations: []api.Mutation{m}})
	w.refuse(command.Conflict, command.Txn{Mutations: []api.Mutation{m}}, "revision 2 is expected, it is at 3")
}

func TestUpdateKeepsAndGenerationCounts(t *testing.T) {
	w := newWorld(t)
	d := &appsv1.Deployment{}
	meta(d, "web")
	w.must(txn(api.Create, d))
	created := fetch[*appsv1.Deployment](w, "default", "web")

	status := api.Clone(d)
	status.Status.ReadyReplicas = 3
	status.Labels = map[string]string{"ignored": "yes"}
	w.must(txn(api.UpdateStatus, status))
	got := fetch[*appsv1.Deployment](w, "default", "web")
	if got.Status.ReadyReplicas != 3 || got.Labels != nil || got.Generation != 1 || got.ResourceVersion != "3" {
		t.Fatalf("after a status update: %+v", got)
	}

	spec := api.Clone(d)
	replicas := int32(4)
	spec.Spec.Replicas = &replicas
	w.must(txn(api.Update, spec))
	got = fetch[*appsv1.Deployment](w, "default", "web")
	if got.Status.ReadyReplicas != 3 || got.Generation != 2 || got.UID != created.UID || !got.CreationTimestamp.Equal(&created.CreationTimestamp) {
		t.Fatalf("after an update: %+v", got)
	}

	labels := api.Clone(spec)
	labels.Labels = map[string]string{"a": "b"}
	w.must(txn(api.Update, labels))
	if got = fetch[*appsv1.Deployment](w, "default", "web"); got.Generation != 2 || got.Labels["a"] != "b" {
		t.Fatalf("after a change of labels: %+v", got.ObjectMeta)
	}

	revision := w.s.Revision()
	w.must(txn(api.Update, labels))
	w.must(txn(api.UpdateStatus, status))
	if w.s.Revision() != revision || len(w.events) != 0 {
		t.Fatal("an update that changes nothing took a revision")
	}
}

func TestServiceAddresses(t *testing.T) {
	w := newWorld(t) // 10.97.0.1 to .6, .2 is DNS
	w.must(txn(api.Create, service("a"), service("headless", ip("None"))))
	a := fetch[*corev1.Service](w, "default", "a")
	if a.Spec.ClusterIP != "10.97.0.1" || !slices.Equal(a.Spec.ClusterIPs, []string{"10.97.0.1"}) || a.Spec.IPFamilies[0] != corev1.IPv4Protocol {
		t.Fatalf("got %+v", a.Spec)
	}
	if got := fetch[*corev1.Service](w, "default", "headless").Spec.ClusterIP; got != "None" {
		t.Fatalf("headless has %s", got)
	}
	w.must(txn(api.Create, service("b"), service("x", func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalName = corev1.ServiceTypeExternalName, "example.org"
	})))
	if got := fetch[*corev1.Service](w, "default", "b").Spec.ClusterIP; got != "10.97.0.3" {
		t.Fatalf("b has %s, want the first after DNS", got)
	}
	if got := fetch[*corev1.Service](w, "default", "x").Spec.ClusterIP; got != "" {
		t.Fatalf("an external name has %s", got)
	}
	w.must(txn(api.Create, service("six", ip("10.97.0.6"))))
	w.refuse(command.Invalid, txn(api.Create, service("c", ip("10.97.0.1"))), `in use by services "default/a"`)
	w.refuse(command.Invalid, txn(api.Create, service("c", ip("10.97.0.2"))), "DNS")
	w.refuse(command.Invalid, txn(api.Create, service("c", ip("10.97.0.7"))), "not in the service range")
	w.refuse(command.Invalid, txn(api.Create, service("c", ip("10.1.0.1"))), "not in the service range 10.97.0.0/29")
	w.refuse(command.Invalid, txn(api.Create, service("c", ip("web"))), "not an IP address")
	w.refuse(command.Invalid, txn(api.Create, service("c", func(s *corev1.Service) { s.Spec.ClusterIPs = []string{"10.97.0.4", "10.97.0.5"} })), "one is possible")

	w.must(txn(api.Create, service("four"), service("five")))
	w.refuse(command.Invalid, txn(api.Create, service("seven")), "no address is left", "10.97.0.0/29")
	w.must(txn(api.Delete, service("b")))
	w.must(txn(api.Create, service("seven")))
	if got := fetch[*corev1.Service](w, "default", "seven").Spec.ClusterIP; got != "10.97.0.3" {
		t.Fatalf("the released address is not used again: %s", got)
	}
}

func TestServiceUpdate(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, service("a")))
	w.must(txn(api.Update, service("a", func(s *corev1.Service) { s.Spec.Selector = map[string]string{"x": "y"} })))
	a := fetch[*corev1.Service](w, "default", "a")
	if a.Spec.ClusterIP != "10.97.0.1" || a.Spec.IPFamilyPolicy == nil || a.Generation != 2 {
		t.Fatalf("got %+v", a.Spec)
	}
	w.must(txn(api.Update, service("a", ip("10.97.0.5"))))
	w.must(txn(api.Create, service("b", ip("10.97.0.1")))) // released
	w.refuse(command.Invalid, txn(api.Update, service("a", ip("10.97.0.1"))), "in use")
	w.must(txn(api.Update, service("a", ip("None"))))
	w.must(txn(api.Create, service("c", ip("10.97.0.5"))))
	w.must(txn(api.Update, service("a")))
	if got := fetch[*corev1.Service](w, "default", "a").Spec.ClusterIP; !strings.HasPrefix(got, "10.97.0.") {
		t.Fatalf("not headless any more, but has %q", got)
	}
	w.must(txn(api.Update, service("c", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName })))
	w.must(txn(api.Create, service("d", ip("10.97.0.5"))))
	w.refuse(command.Invalid, txn(api.Update, service("c", ip("10.97.0.5"), func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName })), "ExternalName")
}

func TestSwapOfAddressesInOneTransaction(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, service("a", ip("10.97.0.4"))))
	swap := txn(api.Delete, service("a"))
	swap.Mutations = append(swap.Mutations, mutation(api.Create, service("b", ip("10.97.0.4"))))
	w.must(swap)
}

func TestNodeRanges(t *testing.T) {
	w := newWorld(t) // four ranges
	for i, want := range []string{"10.98.0.0/24", "10.98.1.0/24"} {
		name := fmt.Sprint("n", i)
		w.must(txn(api.Create, node(name)))
		if n := fetch[*corev1.Node](w, "", name); n.Spec.PodCIDR != want || !slices.Equal(n.Spec.PodCIDRs, []string{want}) {
			t.Fatalf("got %+v", n.Spec)
		}
	}
	chosen := func(name, cidr string) *corev1.Node {
		n := node(name)
		n.Spec.PodCIDR = cidr
		return n
	}
	w.refuse(command.Invalid, txn(api.Create, chosen("n2", "10.98.1.0/24")), `in use by nodes "n1"`)
	w.refuse(command.Invalid, txn(api.Create, chosen("n2", "10.98.1.0/25")), "not a /24")
	w.refuse(command.Invalid, txn(api.Create, chosen("n2", "10.99.0.0/24")), "not a /24 of the pod range")
	w.refuse(command.Invalid, txn(api.Create, chosen("n2", "nonsense")), "not a network")
	w.must(txn(api.Create, chosen("n2", "10.98.3.0/24"), node("n3")))
	w.refuse(command.Invalid, txn(api.Create, node("n4")), "no /24 is left")
	labelled := node("n0")
	labelled.Labels = map[string]string{"a": "b"}
	w.must(txn(api.Update, labelled))
	if n := fetch[*corev1.Node](w, "", "n0"); n.Spec.PodCIDR != "10.98.0.0/24" || n.Labels["a"] != "b" {
		t.Fatalf("got %+v", n)
	}
	w.must(txn(api.Delete, node("n0")))
	w.must(txn(api.Create, node("n4")))
	if n := fetch[*corev1.Node](w, "", "n4"); n.Spec.PodCIDR != "10.98.0.0/24" {
		t.Fatalf("got %+v", n.Spec)
	}
}

func TestIPv6(t *testing.T) {
	w := &world{t: t, s: state.New()}
	w.must(command.Txn{Bootstrap: &command.Bootstrap{
		ClusterID: "six", ServiceCIDR: netip.MustParsePrefix("fd00:97::/108"), PodCIDR: netip.MustParsePrefix("fd00:98::/48"), NodeMask: 64, DNS: netip.MustParseAddr("fd00:97::a"),
	}})
	w.must(txn(api.Create, service("a"), service("b", ip("fd00:97:0::ff")), node("n0"), node("n1")))
	if a := fetch[*corev1.Service](w, "default", "a").Spec; a.ClusterIP != "fd00:97::1" || a.IPFamilies[0] != corev1.IPv6Protocol {
		t.Fatalf("got %+v", a)
	}
	if b := fetch[*corev1.Service](w, "default", "b").Spec.ClusterIP; b != "fd00:97::ff" {
		t.Fatalf("got %s", b)
	}
	if n := fetch[*corev1.Node](w, "", "n1").Spec.PodCIDR; n != "fd00:98:0:1::/64" {
		t.Fatalf("got %s", n)
	}
}

func TestPodBindAndDelete(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, pod("a", ""), pod("b", "")))
	w.must(txn(api.Delete, pod("b", ""))) // not bound: gone at once
	if _, ok := api.Get[*corev1.Pod](w.s, "default", "b"); ok {
		t.Fatal("an unbound pod is still there")
	}
	w.must(txn(api.Update, pod("a", "n1")))
	w.must(txn(api.Update, pod("a", ""))) // keeps its node
	w.refuse(command.Conflict, txn(api.Update, pod("a", "n2")), `bound to nodes "n1"`)
	running := pod("a", "elsewhere")
	running.Status.Phase = corev1.PodRunning
	w.must(txn(api.UpdateStatus, running))
	a := fetch[*corev1.Pod](w, "default", "a")
	if a.Spec.NodeName != "n1" || a.Status.Phase != corev1.PodRunning {
		t.Fatalf("got %+v", a)
	}

	w.must(txn(api.Delete, a))
	a = fetch[*corev1.Pod](w, "default", "a")
	if !a.DeletionTimestamp.Time.Equal(time.Unix(1_700_000_030, 0)) || *a.DeletionGracePeriodSeconds != 30 {
		t.Fatalf("got %+v", a.ObjectMeta)
	}
	revision := w.s.Revision()
	w.must(txn(api.Delete, a)) // on its way already
	if w.s.Revision() != revision {
		t.Fatal("a second deletion took a revision")
	}
	w.must(txn(api.Update, pod("a", ""))) // keeps the deletion
	if fetch[*corev1.Pod](w, "default", "a").DeletionTimestamp == nil {
		t.Fatal("an update revived the pod")
	}
	deleteWith := func(grace int64) command.Txn {
		m := mutation(api.Delete, a)
		m.Grace = &grace
		return command.Txn{Mutations: []api.Mutation{m}}
	}
	w.must(deleteWith(60)) // never later
	w.must(deleteWith(5))
	if a = fetch[*corev1.Pod](w, "default", "a"); *a.DeletionGracePeriodSeconds != 5 {
		t.Fatalf("got %+v", a.ObjectMeta)
	}
	w.refuse(command.Invalid, deleteWith(-1), "grace")
	w.must(deleteWith(0))
	if _, ok := api.Get[*corev1.Pod](w.s, "default", "a"); ok {
		t.Fatal("still there")
	}
}

func TestOwned(t *testing.T) {
	w := newWorld(t)
	owned := func(name string, uid types.UID, controller bool) *corev1.Pod {
		p := pod(name, "")
		p.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "rs", UID: uid, Controller: &controller}}
		return p
	}
	names := func(uid types.UID) string {
		var out []string
		for o := range w.s.Owned(uid) {
			out = append(out, o.GetName()+"@"+o.GetResourceVersion())
		}
		return strings.Join(out, " ")
	}
	w.must(txn(api.Create, owned("b", "u1", true), owned("a", "u1", true), owned("c", "u2", true), owned("d", "u1", false)))
	if got := names("u1"); got != "a@3 b@2" {
		t.Fatalf("u1 owns %q", got)
	}
	w.must(txn(api.Update, owned("b", "u2", true)))
	if names("u1") != "a@3" || names("u2") != "b@6 c@4" {
		t.Fatalf("u1 owns %q, u2 %q", names("u1"), names("u2"))
	}
	w.must(txn(api.Delete, owned("c", "", true)))
	w.must(txn(api.Update, pod("a", "")))
	if names("u1") != "" || names("u2") != "b@6" || names("u") != "" {
		t.Fatalf("u1 owns %q, u2 %q", names("u1"), names("u2"))
	}
}

func TestListIsOrdered(t *testing.T) {
	w := newWorld(t)
	at := func(namespace, name string) api.Object {
		o := configMap(name, "")
		o.Namespace = namespace
		return o
	}
	w.must(txn(api.Create, at("b", "a"), at("a", "z"), at("a-b", "c"), at("a", "a")))
	list := func(namespace string) (out []string) {
		for o := range w.s.List(api.ConfigMaps, namespace) {
			out = append(out, o.GetNamespace()+"/"+o.GetName())
		}
		return out
	}
	if got := strings.Join(list(""), " "); got != "a/a a/z a-b/c b/a" {
		t.Fatal(got)
	}
	if got := strings.Join(list("a"), " "); got != "a/a a/z" {
		t.Fatal(got)
	}
	if got := w.s.Len(api.ConfigMaps); got != 4 {
		t.Fatal(got)
	}
	for range w.s.List("teapots", "") {
		t.Fatal("an unknown resource has objects")
	}
}

func TestHistoryIsBounded(t *testing.T) {
	w := newWorld(t)
	s := w.s
	for i := range state.HistorySize + 10 {
		s, _, _ = state.Reduce(s, uint64(i), command.Txn{Key: fmt.Sprint("k", i), Time: 1})
	}
	repeat := func(key string) uint64 {
		tx := txn(api.Create, configMap("a", "1"))
		tx.Key = key
		next, _, _ := state.Reduce(s, 1, tx)
		return next.Revision()
	}
	if repeat("k9") != 2 {
		t.Error("the oldest key is still known")
	}
	if repeat("k10") != 1 || repeat(fmt.Sprint("k", state.HistorySize+9)) != 1 {
		t.Error("a key among the newest is not known")
	}
}
