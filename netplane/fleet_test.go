package netplane_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/front"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
	"decree.dev/decree/schemas/api"
)

// agentVariable makes this test binary the network half of an agent: see [runAgent].
const agentVariable = "DECREE_TEST_AGENT"

// encryptionVariable is the [netplane.Encryption] of that agent.
const encryptionVariable = "DECREE_TEST_AGENT_ENCRYPTION"

// greeting is what an agent says when it starts.
type greeting struct {
	Key     string // see [netplane.Plane.PublicKey]
	Backend netplane.Backend
}

// order is what a fleet tells an agent: one of the two.
type order struct {
	Set    *netplane.Desired
	Attach *corev1.Pod
	NetNS  string // of the pod
}

// answer is what an agent says to an order.
type answer struct {
	Error string
	Addrs []netip.Addr
}

// runAgent is a Plane in a process of its own, in the network namespace that it was started
// in, with servers in another one. It keeps everything in a folder, does what it is told, and
// ends when nobody is there to tell it anything.
func runAgent(folder string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	p, err := netplane.New(netplane.Config{DataDir: filepath.Join(folder, "netplane"), Encryption: netplane.Encryption(os.Getenv(encryptionVariable)), Log: log})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	servers, err := front.NewKeeper(front.KeeperConfig{
		Dir: filepath.Join(folder, "front"), LogFile: filepath.Join(folder, "front.log"), Config: front.Config{ResolvConf: filepath.Join(folder, "resolv.conf"), Level: slog.LevelError}, Log: log,
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = p.Run(ctx) })
	wg.Go(func() { _ = servers.Run(ctx) })
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	_ = out.Encode(greeting{p.PublicKey(), p.Backend()})
	for {
		var o order
		if in.Decode(&o) != nil {
			break
		}
		var a answer
		if o.Set != nil {
			err = errors.Join(servers.Set(ctx, front.Objects{Desired: *o.Set}), p.Set(ctx, *o.Set))
		} else {
			a.Addrs, err = p.Attach(ctx, o.Attach, o.NetNS)
		}
		if err != nil {
			a.Error = err.Error()
		}
		if out.Encode(a) != nil {
			break
		}
	}
	cancel()
	wg.Wait()
	return 0
}

// fleet is a cluster of nodes: namespaces with an agent in each, in two networks with a router
// between them, all but the last one in the first. There is a host outside, behind the router.
type fleet struct {
	t      *testing.T
	router string
	lab    *netplanetest.Lab // "n1" is the first node, "pod1" a pod there, "outside" outside
	nodes  []*fleetNode
	pods   map[netplanetest.Host]*corev1.Pod
	nets   []netplanetest.Net // addresses of the hosts, by family
	// services and policies are what the cluster wants beside what there is.
	services   []*corev1.Service
	slices     []*discoveryv1.EndpointSlice
	policies   []*networkingv1.NetworkPolicy
	namespaces []*corev1.Namespace
}

// fleetNode is a node with its agent.
type fleetNode struct {
	f          *fleet
	object     *corev1.Node
	folder     string
	encryption netplane.Encryption // of the next agent that starts
	cmd        *exec.Cmd
	in         *json.Encoder
	out        *json.Decoder
	greeted    bool // by the agent that runs
}

const outside = netplanetest.Outside

// newFleet starts so many nodes, with the kinds of encryption that are given, in this order.
func newFleet(t *testing.T, nodes int, encryption ...netplane.Encryption) *fleet {
	f := &fleet{t: t, router: netspacetest.Namespace(t, "router"), lab: &netplanetest.Lab{Path: map[netplanetest.Host]string{}}, pods: map[netplanetest.Host]*corev1.Pod{}}
	f.nets = slices.Clone(netplanetest.Nets)
	for i := range f.nets {
		f.nets[i].Addr = map[netplanetest.Host]netip.Addr{}
	}
	f.withoutDAD(f.router)
	netspacetest.Switch(t, f.router, "br1", "192.168.1.254/24", "fd00:1::fe/64")
	netspacetest.Switch(t, f.router, "br2", "192.168.2.254/24", "fd00:2::fe/64")
	netspacetest.Forward(t, f.router)
	f.host(outside, "br-out", "192.0.2.2", "2001:db8::2", func() { netspacetest.Switch(t, f.router, "br-out", "192.0.2.1/24", "2001:db8::1/64") })
	var all sync.WaitGroup
	for i := range nodes {
		network := 1
		if i == nodes-1 {
			network = 2
		}
		kind := netplane.EncryptNothing
		if i < len(encryption) {
			kind = encryption[i]
		}
		f.node(i+1, network, kind)
	}
	f.publish()
	for i, n := range f.nodes {
		all.Go(func() { f.pod(n, netplanetest.Host(fmt.Sprint("pod", i+1))) })
	}
	all.Wait()
	f.publish()
	return f
}

// withoutDAD makes new interfaces of a namespace of use to IPv6 at once.
func (f *fleet) withoutDAD(path string) {
	netspacetest.In(f.t, path, func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644)
	})
}

// host makes a namespace, and connects it with a bridge of the router.
func (f *fleet) host(h netplanetest.Host, bridge, v4, v6 string, before func()) {
	t := f.t
	path := netspacetest.Namespace(t, string(h))
	f.withoutDAD(path)
	if before != nil {
		before()
	}
	netspacetest.Link(t, f.router, "to-"+string(h), path, "eth0")
	netspacetest.Plug(t, f.router, "to-"+string(h), bridge)
	netspacetest.Up(t, path, "eth0", v4+"/24", v6+"/64")
	gateway4, gateway6 := netip.MustParsePrefix(v4+"/24").Masked().Addr(), netip.MustParsePrefix(v6+"/64").Masked().Addr()
	last4, last6 := "254", "fe"
	if h == outside {
		last4, last6 = "1", "1"
	}
	netspacetest.Route(t, path, "0.0.0.0/0", strings.TrimSuffix(gateway4.String(), "0")+last4, "")
	netspacetest.Route(t, path, "::/0", gateway6.String()+last6, "")
	f.lab.Path[h] = path
	f.nets[0].Addr[h], f.nets[1].Addr[h] = netip.MustParseAddr(v4), netip.MustParseAddr(v6)
	netplanetest.Serve(t, path, h == outside, f.nets[0].Addr[h], f.nets[1].Addr[h])
}

// node makes the n-th node and starts its agent.
func (f *fleet) node(n, network int, encryption netplane.Encryption) {
	h := netplanetest.Host(fmt.Sprint("n", n))
	v4, v6 := fmt.Sprintf("192.168.%d.%d", network, n), fmt.Sprintf("fd00:%d::%d", network, n)
	f.host(h, fmt.Sprint("br", network), v4, v6, nil)
	folder, err := os.MkdirTemp("", "fleet") // a short name, for a socket
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := errors.Join(front.Stop(context.Background(), filepath.Join(folder, "front")), os.RemoveAll(folder)); err != nil {
			f.t.Error(err)
		}
	})
	node := &fleetNode{f: f, folder: folder, encryption: encryption, object: &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: string(h), Annotations: map[string]string{api.AnnotationNetworks: fmt.Sprintf("192.168.%d.0/24,fd00:%d::/64", network, network)}},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.98.%d.0/24", n), fmt.Sprintf("fd98:0:0:%d::/64", n)}},
		Status: corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: v4}, {Type: corev1.NodeInternalIP, Address: v6}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
		},
	}}
	f.nodes = append(f.nodes, node)
	for i, cidr := range node.object.Spec.PodCIDRs { // so that clients outside may ask pods
		netspacetest.Route(f.t, f.router, cidr, []string{v4, v6}[i], "")
	}
	node.start()
	f.t.Cleanup(node.kill)
}

// start begins the agent, as after a boot or a crash.
func (n *fleetNode) start() {
	n.f.t.Helper()
	n.cmd = exec.Command("/proc/self/exe")
	n.cmd.Env = append(os.Environ(), agentVariable+"="+n.folder, encryptionVariable+"="+string(n.encryption))
	n.cmd.Stderr = os.Stderr
	in, err1 := n.cmd.StdinPipe()
	out, err2 := n.cmd.StdoutPipe()
	n.in, n.out, n.greeted = json.NewEncoder(in), json.NewDecoder(out), false
	err := netspace.Do(n.path(), n.cmd.Start)
	if err := errors.Join(err1, err2, err); err != nil {
		n.f.t.Fatal(err)
	}
}

// greet waits until the agent has started, and puts its key where the others look for it.
func (n *fleetNode) greet() {
	n.f.t.Helper()
	if n.greeted {
		return
	}
	var g greeting
	if err := n.out.Decode(&g); err != nil {
		n.f.t.Fatalf("%s: %v", n.object.Name, err)
	}
	if vm.Inside() && g.Backend != netplane.IPVS {
		n.f.t.Fatalf("the kernel has IPVS, %s has %s", n.object.Name, g.Backend)
	}
	n.greeted, n.object.Annotations[api.AnnotationWireGuard] = true, g.Key
}

// kill ends the agent without a warning.
func (n *fleetNode) kill() {
	if n.cmd.ProcessState == nil {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
	}
}

func (n *fleetNode) host() netplanetest.Host { return netplanetest.Host(n.object.Name) }
func (n *fleetNode) path() string            { return n.f.lab.Path[n.host()] }

// ask has the agent carry out an order.
func (n *fleetNode) ask(o order) ([]netip.Addr, error) {
	if err := n.in.Encode(o); err != nil {
		return nil, fmt.Errorf("%s: %w", n.object.Name, err)
	}
	var a answer
	if err := n.out.Decode(&a); err != nil {
		return nil, fmt.Errorf("%s: %w", n.object.Name, err)
	}
	if a.Error != "" {
		return nil, fmt.Errorf("%s: %s", n.object.Name, a.Error)
	}
	return a.Addrs, nil
}

// pod makes a pod on a node, with servers in it.
func (f *fleet) pod(n *fleetNode, h netplanetest.Host) {
	path := netspacetest.Namespace(f.t, string(h))
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: string(h), UID: types.UID("uid-" + h), Labels: map[string]string{"app": string(h)}}}
	pod.Spec.NodeName = n.object.Name
	addrs, err := n.ask(order{Attach: pod, NetNS: path})
	if err != nil || len(addrs) != 2 {
		f.t.Errorf("pod %s: %v, %v", h, addrs, err)
		return
	}
	for _, a := range addrs {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	pod.Status.PodIP = addrs[0].String()
	netplanetest.Serve(f.t, path, true, addrs...)
	lines(f.t, path, linePort)
	placing.Lock()
	defer placing.Unlock()
	f.lab.Path[h], f.pods[h] = path, pod
	f.nets[0].Addr[h], f.nets[1].Addr[h] = addrs[0], addrs[1]
}

// placing is held while the maps of a fleet change.
var placing sync.Mutex

// desired is the cluster as one node sees it.
func (f *fleet) desired(n *fleetNode) *netplane.Desired {
	d := &netplane.Desired{Node: n.object.Name, Domain: "cluster.local", DNS: dnsIP, Services: f.services, Slices: f.slices, Policies: f.policies, Namespaces: f.namespaces}
	for _, net := range f.nets {
		d.ClusterCIDR, d.ServiceCIDR = append(d.ClusterCIDR, net.Cluster), append(d.ServiceCIDR, net.Range)
	}
	for _, text := range n.object.Spec.PodCIDRs {
		d.PodCIDRs = append(d.PodCIDRs, netip.MustParsePrefix(text))
	}
	for _, other := range f.nodes {
		d.Nodes = append(d.Nodes, other.object)
	}
	for _, pod := range f.pods {
		d.Pods = append(d.Pods, pod)
	}
	d.Announced = render.Balanced(f.services)
	return d
}

// publish tells all agents of the cluster, those in but aside, and waits until they have done
// what follows from it.
func (f *fleet) publish(but ...*fleetNode) {
	f.t.Helper()
	told := slices.DeleteFunc(slices.Clone(f.nodes), func(n *fleetNode) bool { return slices.Contains(but, n) })
	for _, n := range told {
		n.greet()
	}
	var wg sync.WaitGroup
	for _, n := range told {
		wg.Go(func() {
			if _, err := n.ask(order{Set: f.desired(n)}); err != nil {
				f.t.Error(err)
			}
		})
	}
	wg.Wait()
	if f.t.Failed() {
		f.t.FailNow()
	}
}

// cable sets the link of a node up or down, as seen by the node's neighbours.
func (f *fleet) cable(n *fleetNode, up bool) {
	f.t.Helper()
	netspacetest.In(f.t, f.router, func() error {
		l, err := netlink.LinkByName("to-" + n.object.Name)
		switch {
		case err != nil:
			return err
		case up:
			return netlink.LinkSetUp(l)
		}
		return netlink.LinkSetDown(l)
	})
}

// service adds a service of both families in front of pods, or changes its endpoints. The i-th
// cluster addresses are its own.
func (f *fleet) service(name string, i int, port, target int32, change func(*corev1.Service), pods ...netplanetest.Host) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, Ports: []corev1.ServicePort{{Name: "p", Port: port}}}}
	for _, n := range f.nets {
		svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, n.Service(i).String())
	}
	svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	if change != nil {
		change(svc)
	}
	f.services = append(slices.DeleteFunc(slices.Clone(f.services), func(s *corev1.Service) bool { return s.Name == name }), svc)
	f.slices = slices.DeleteFunc(slices.Clone(f.slices), func(s *discoveryv1.EndpointSlice) bool { return s.Labels[discoveryv1.LabelServiceName] == name })
	for j, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		s := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprint(name, "-", j), Labels: map[string]string{discoveryv1.LabelServiceName: name}},
			AddressType: family, Ports: []discoveryv1.EndpointPort{{Name: &svc.Spec.Ports[0].Name, Port: &target}},
		}
		for _, h := range pods {
			node := f.pods[h].Spec.NodeName
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{f.nets[j].Addr[h].String()}, NodeName: &node, TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: "default", Name: string(h)},
			})
		}
		f.slices = append(f.slices, s)
	}
	return svc
}

// podHosts are the pods, in order.
func (f *fleet) podHosts() (out []netplanetest.Host) {
	for i := range f.nodes {
		out = append(out, netplanetest.Host(fmt.Sprint("pod", i+1)))
	}
	return out
}
