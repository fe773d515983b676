package daemon

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/reconciler/plan"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// path is the way of a service from a commit to a node's table, without what lies
// between machines.
type path struct {
	t      *testing.T
	cfg    *Config
	s      *state.State
	index  uint64
	parent string
	now    time.Time
}

func newPath(t *testing.T, cfg Config) *path {
	if err := cfg.completeRanges(); err != nil {
		t.Fatal(err)
	}
	p := &path{t: t, cfg: &cfg, s: state.New(), now: time.Unix(1_700_000_000, 0)}
	born := cfg.birth()
	born.ClusterID = "c"
	p.do(command.Txn{Bootstrap: born})
	source := &api.Source{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}
	p.put(source, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	return p
}

// do sends a transaction through the log's encoding into the state.
func (p *path) do(tx command.Txn) {
	p.t.Helper()
	data, err := command.EncodeTxn(&tx)
	if err != nil {
		p.t.Fatal(err)
	}
	entry, err := command.EncodeEntry(command.Newest, data)
	if err != nil {
		p.t.Fatal(err)
	}
	txns, err := command.DecodeEntry(entry)
	if err != nil {
		p.t.Fatal(err)
	}
	p.index++
	next, r, _ := state.Reduce(p.s, p.index, txns[0])
	if r.Rejected != nil {
		p.t.Fatal(r.Rejected)
	}
	p.s = next
}

func (p *path) put(objects ...api.Object) {
	p.t.Helper()
	tx := command.Txn{Actor: "system"}
	for _, o := range objects {
		o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
		tx.Mutations = append(tx.Mutations, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	p.do(tx)
}

// commit plans what Git says and carries it out; then the controllers have their turn.
func (p *path) commit(objects ...api.Object) plan.ChangeSet {
	p.t.Helper()
	source, _ := api.Get[*api.Source](p.s, "", "shop")
	in := plan.Input{Source: source, Commit: fmt.Sprint("c", p.index), Current: p.s}
	for i, o := range objects {
		in.Desired = append(in.Desired, plan.Desired{Object: api.Clone(o), Pos: api.Position{File: "a.cue", Line: i + 1}})
	}
	c := plan.Plan(in)
	if len(c.Refusals) > 0 {
		p.t.Fatal(c.Refusals[0])
	}
	revision := &api.Revision{Spec: api.RevisionSpec{Source: "shop", Commit: in.Commit, Result: api.RevisionApplied}}
	revision.SetGroupVersionKind(api.GroupVersion.WithKind("Revision"))
	p.do(command.Txn{Actor: "git/shop", Commit: &command.Commit{Source: "shop", Parent: p.parent, Revision: revision}, Mutations: c.Mutations})
	p.parent, in.Current = in.Commit, p.s
	if again := plan.Plan(in); len(again.Mutations) > 0 {
		p.t.Fatalf("the plan of a commit in force is not empty: %+v", again.Edits)
	}
	p.control(workload.Balancers(p.now, p.s))
	for svc := range api.List[*corev1.Service](p.s, "") {
		p.control(workload.Endpoints(p.now, p.s, svc))
	}
	return c
}

func (p *path) control(ms []api.Mutation) {
	p.t.Helper()
	if len(ms) > 0 {
		p.do(command.Txn{Actor: "controller/test", Mutations: ms})
	}
}

// table is the table of node n1, a line for each service port, and who announces.
func (p *path) table() string {
	n := &node{cfg: p.cfg}
	n.cfg.Node = "n1"
	d := n.desired(p.s)
	var b strings.Builder
	for _, s := range render.Render(d).Services {
		fmt.Fprintf(&b, "%s -> %v", s.Port, s.Endpoints)
		if s.Split {
			fmt.Fprintf(&b, " outside %v", s.Outside)
		}
		b.WriteString("\n")
	}
	for _, a := range render.Announcements(d) {
		fmt.Fprintf(&b, "%s by %s\n", a.Addr, a.Node)
	}
	for _, h := range render.HealthChecks(d) {
		fmt.Fprintf(&b, "health of %s: %d\n", h.Name, h.Endpoints)
	}
	return b.String()
}

func (p *path) expect(want string) {
	p.t.Helper()
	if got := p.table(); got != strings.TrimLeft(want, "\n") {
		p.t.Fatalf("got\n%swant%s", got, want)
	}
}

func standing(name string, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func running(name, node string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{"app": "web"}}}
	p.Spec.NodeName = node
	p.Status.Phase, p.Status.PodIP = corev1.PodRunning, ips[0]
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

func webService(kind corev1.ServiceType, edits ...func(*corev1.ServiceSpec)) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}, Spec: corev1.ServiceSpec{
		Type: kind, Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}},
	}}
	for _, edit := range edits {
		edit(&svc.Spec)
	}
	return svc
}

func twoFamilies() Config {
	return Config{
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16"), netip.MustParsePrefix("fd00:97::/112")},
		PodCIDRs:     []netip.Prefix{netip.MustParsePrefix("fd00:98::/48"), netip.MustParsePrefix("10.98.0.0/16")}, // in any order
		NodePorts:    command.PortRange{First: 31000, Last: 31000},
	}
}

// TestServiceFromCommitToTable: one service in both families, of one type after another,
// from Git to what a node's kernel is given.
func TestServiceFromCommitToTable(t *testing.T) {
	p := newPath(t, twoFamilies())
	p.put(standing("n1", "192.0.2.1", "2001:db8::1"), standing("n2", "192.0.2.2", "2001:db8::2"))
	if n, _ := api.Get[*corev1.Node](p.s, "", "n2"); !slices.Equal(n.Spec.PodCIDRs, []string{"10.98.1.0/24", "fd00:98:0:1::/64"}) {
		t.Fatalf("n2 has %v", n.Spec.PodCIDRs)
	}
	p.put(running("a", "n1", "10.98.0.2", "fd00:98::2"), running("b", "n2", "10.98.1.2", "fd00:98:0:1::2"))
	pool := &api.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: "lan"}, Spec: api.AddressPoolSpec{Addresses: []string{"203.0.113.8/29", "2001:db8:1::/120"}}}

	p.commit(pool, webService("ClusterIP"))
	p.expect(`
tcp 10.97.0.1:80 -> [10.98.0.2:8080 10.98.1.2:8080]
`)
	prefer := func(s *corev1.ServiceSpec) { s.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack) }
	p.commit(pool, webService("NodePort", prefer))
	p.expect(`
tcp 10.97.0.1:80 -> [10.98.0.2:8080 10.98.1.2:8080]
tcp 192.0.2.1:31000 -> [10.98.0.2:8080 10.98.1.2:8080]
tcp [2001:db8::1]:31000 -> [[fd00:98::2]:8080 [fd00:98:0:1::2]:8080]
tcp [fd00:97::1]:80 -> [[fd00:98::2]:8080 [fd00:98:0:1::2]:8080]
`)
	local := func(s *corev1.ServiceSpec) {
		s.ExternalTrafficPolicy, s.AllocateLoadBalancerNodePorts, s.LoadBalancerIP = corev1.ServiceExternalTrafficPolicyLocal, new(false), "203.0.113.9"
	}
	p.commit(pool, webService("LoadBalancer", prefer, local))
	table := p.table()
	for _, want := range []string{
		"tcp 203.0.113.9:80 -> [10.98.0.2:8080 10.98.1.2:8080] outside [10.98.0.2:8080]\n",
		"tcp [2001:db8:1::]:80 -> [[fd00:98::2]:8080 [fd00:98:0:1::2]:8080] outside [[fd00:98::2]:8080]\n",
		"203.0.113.9 by n", "2001:db8:1:: by n", "health of web: 1\n",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("%s is not in\n%s", want, table)
		}
	}
	if strings.Contains(table, ":31000") { // it is the health check's now
		t.Errorf("node ports that are not wanted:\n%s", table)
	}
	svc, _ := api.Get[*corev1.Service](p.s, "default", "web")
	if svc.Spec.HealthCheckNodePort != 31000 || len(svc.Spec.ClusterIPs) != 2 {
		t.Fatalf("got %+v", svc.Spec)
	}

	// What Git no longer says is no longer so.
	c := p.commit(pool, webService("ClusterIP"))
	p.expect(`
tcp 10.97.0.1:80 -> [10.98.0.2:8080 10.98.1.2:8080]
`)
	if len(c.Mutations) != 1 {
		t.Fatalf("%d mutations", len(c.Mutations))
	}
	if svc, _ := api.Get[*corev1.Service](p.s, "default", "web"); len(svc.Status.LoadBalancer.Ingress) > 0 || len(svc.Spec.ClusterIPs) != 1 || svc.Spec.HealthCheckNodePort != 0 {
		t.Fatalf("got %+v, %+v", svc.Spec, svc.Status)
	}
	families := map[discoveryv1.AddressType]int{}
	for s := range api.List[*discoveryv1.EndpointSlice](p.s, "") {
		families[s.AddressType] += len(s.Endpoints)
	}
	if families[discoveryv1.AddressTypeIPv4] != 2 || families[discoveryv1.AddressTypeIPv6] != 0 {
		t.Fatalf("endpoints %v", families)
	}
}

func TestRanges(t *testing.T) {
	p := netip.MustParsePrefix
	for name, c := range map[string]Config{
		"two and one":      {ServiceCIDRs: []netip.Prefix{p("10.97.0.0/16"), p("fd00:97::/112")}},
		"mixed":            {PodCIDRs: []netip.Prefix{p("fd00:98::/48")}},
		"one family twice": {ServiceCIDRs: []netip.Prefix{p("10.97.0.0/16"), p("10.96.0.0/16")}, PodCIDRs: []netip.Prefix{p("10.98.0.0/16"), p("10.99.0.0/16")}},
		"dns outside":      {ServiceCIDRs: []netip.Prefix{p("10.96.0.0/16")}},
		"ports":            {NodePorts: command.PortRange{First: 2, Last: 1}},
		"no room":          {PodCIDRs: []netip.Prefix{p("10.98.0.0/26")}},
	} {
		if err := c.completeRanges(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	c := twoFamilies()
	if err := c.completeRanges(); err != nil || c.PodCIDRs[0] != p("10.98.0.0/16") {
		t.Errorf("%v, %v", c.PodCIDRs, err)
	}
	usual := Config{NodePorts: command.DefaultNodePorts}
	if err := usual.completeRanges(); err != nil {
		t.Fatal(err)
	}
	born := usual.birth()
	born.ClusterID = "c"
	if f := command.FormatOf(&command.Txn{Bootstrap: born}); f != 1 {
		t.Errorf("a cluster with the usual settings needs format %d", f)
	}
	for pods, want := range map[string]int{"10.98.0.0/16": 24, "fd00::/48": 64, "fd00::/40": 60, "fd00::/64": 80, "fd00::/112": 120} {
		if got := nodeMask(p(pods)); got != want {
			t.Errorf("%s: /%d, want /%d", pods, got, want)
		}
	}
	// An agent learns both families, and a server of the version before names one.
	var agent Config
	agent.setRanges((&Settings{ServiceCIDR: p("10.97.0.0/16"), PodCIDR: p("10.98.0.0/16"), Second: &SecondFamily{p("fd00:97::/112"), p("fd00:98::/48")}}).families())
	if fmt.Sprint(agent.ServiceCIDRs, agent.PodCIDRs) != "[10.97.0.0/16 fd00:97::/112] [10.98.0.0/16 fd00:98::/48]" {
		t.Errorf("%v, %v", agent.ServiceCIDRs, agent.PodCIDRs)
	}
	agent.setRanges((&Settings{ServiceCIDR: p("10.97.0.0/16"), PodCIDR: p("10.98.0.0/16")}).families())
	if len(agent.ServiceCIDRs) != 1 {
		t.Errorf("%v", agent.ServiceCIDRs)
	}
}
