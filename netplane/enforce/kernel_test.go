package enforce_test

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/netplane/enforce"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/policy"
)

// deny isolates all pods of a namespace, but for what comes from the addresses of blocks.
func deny(ns string, blocks ...string) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "deny"}}
	for _, b := range blocks {
		np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: b}}}})
	}
	return np
}

func podAt(name string, labels map[string]string, addrs ...netip.Addr) policy.Pod {
	return policy.Pod{Namespace: "shop", Name: name, Labels: labels, Addrs: addrs, Here: true, Ports: []policy.NamedPort{{Name: "http", Proto: 6, Number: 80}}}
}

// rich is a plan with everything in it that a kernel can hold.
func rich() *policy.Plan {
	a := netip.MustParseAddr
	peers := deny("shop", "0.0.0.0/0", "10.0.0.0/8", "fd00::/8", "255.255.255.0/24")
	peers.Spec.Ingress[1].From[0].IPBlock.Except = []string{"10.1.0.0/16"}
	peers.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}}}
	end, http := int32(90), "http"
	for _, port := range []string{"80", http} {
		peers.Spec.Egress[0].Ports = append(peers.Spec.Egress[0].Ports, networkingv1.NetworkPolicyPort{Port: portOf(port)})
	}
	peers.Spec.Egress[0].Ports[0].EndPort = &end
	return policy.New(policy.Cluster{
		Policies: []*networkingv1.NetworkPolicy{peers},
		Pods:     []policy.Pod{podAt("one", nil, a("10.98.0.2"), a("fd98::2")), podAt("two", nil, a("10.98.0.3"), a("fd98::3"))},
		Unknown:  []netip.Addr{a("10.98.0.9")},
	})
}

func portOf(text string) *intstr.IntOrString { p := intstr.Parse(text); return &p }

func set(t testing.TB, p *enforce.Policies, plan *policy.Plan) int {
	t.Helper()
	n, err := p.Set(t.Context(), plan, nil)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func rules(t testing.TB, ns string, args ...string) (out string) {
	t.Helper()
	netspacetest.In(t, ns, func() error {
		b, err := exec.Command("nft", args...).CombinedOutput()
		if out = string(b); err != nil {
			return fmt.Errorf("nft %v: %w: %s", args, err, b)
		}
		return nil
	})
	return out
}

// TestAdopted: people can list the tables, and another process finds them as they should be.
func TestAdopted(t *testing.T) {
	ns := netspacetest.Namespace(t, "node")
	first := open(t, ns)
	if n := set(t, first, rich()); n == 0 {
		t.Fatal("nothing was made")
	}
	text := rules(t, ns, "list", "ruleset")
	for _, want := range []string{"10.98.0.2 : goto pods_in_", "10.98.0.9 : goto deny_ingress", "0.0.0.0/0", "fd98::3", "dport 80-90", "10.98.0.3 . tcp . 80", "fd00::/8"} {
		if !strings.Contains(text, want) {
			t.Errorf("the list does not have %q:\n%s", want, text)
		}
	}
	if n := set(t, open(t, ns), rich()); n != 0 {
		t.Errorf("another process changed %d things", n)
	}
	if n := set(t, first, policy.New(policy.Cluster{})); n == 0 {
		t.Error("nothing was removed")
	}
	if left := rules(t, ns, "list", "ruleset"); left != "" {
		t.Errorf("without policies there is\n%s", left)
	}
}

// TestTampered: whatever is changed is found and repaired.
func TestTampered(t *testing.T) {
	ns := netspacetest.Namespace(t, "node")
	p := open(t, ns)
	set(t, p, rich())
	list := func() string {
		return rules(t, ns, "list", "table", "ip", "decree-policy") + rules(t, ns, "list", "table", "ip6", "decree-policy")
	}
	before := list()
	chain := strings.Fields(before[strings.Index(before, "chain policy_in_"):])[1]
	block := strings.Fields(before[strings.Index(before, "set block_"):])[1]
	for _, args := range [][]string{
		{"flush", "ruleset"},
		{"flush", "chain", "ip", "decree-policy", "leave"},
		{"flush", "chain", "ip", "decree-policy", chain},
		{"add", "rule", "ip", "decree-policy", chain, "accept"},
		{"insert", "rule", "ip6", "decree-policy", "deny_egress", "accept"},
		{"delete", "element", "ip", "decree-policy", "ingress", "-"},
		{"flush", "set", "ip6", "decree-policy", "self"},
		{"flush", "set", "ip", "decree-policy", block},
		{"add", "chain", "ip", "decree-policy", "mine", "{ type filter hook forward priority 0; }"},
		{"add", "chain", "ip", "decree-policy", "mine"},
		{"add", "set", "ip", "decree-policy", "mine", "{ type inet_service; }"},
	} {
		if args[1] == "element" && args[0] == "delete" {
			args[5] = "{ 10.98.0.2 }"
		}
		rules(t, ns, args...)
		if ok, err := p.Read(t.Context()); ok || err != nil {
			t.Errorf("%v: not found: %v", args, err)
		}
		if n := set(t, p, rich()); n == 0 {
			t.Errorf("%v: nothing repaired", args)
		}
		if after := list(); after != before {
			t.Errorf("%v: before\n%s\nafter\n%s", args, before, after)
		}
	}
}

// TestEnded: connections end when policies do not allow them any more, in both directions
// and with what the other end sends; others go on.
func TestEnded(t *testing.T) {
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) { ended(t, newWorld(t), n) })
	}
}

func ended(t *testing.T, w *world, n netplanetest.Net) {
	p := open(t, w.Path[netplanetest.Node])
	pods := []policy.Pod{podAt("one", map[string]string{"app": "one"}, n.Addr[netplanetest.Pod1]), podAt("two", map[string]string{"app": "two"}, n.Addr[netplanetest.Pod2])}
	plan := func(nps ...*networkingv1.NetworkPolicy) *policy.Plan {
		return policy.New(policy.Cluster{Policies: nps, Pods: pods})
	}
	talk := func(from netplanetest.Host) *talkTo { return dial(t, w, from, n.Addr[netplanetest.Pod2]) }
	all := netip.PrefixFrom(n.Uplink, 0).Masked().String()
	set(t, p, plan(deny("shop", all)))
	one, three, node := talk(netplanetest.Pod1), talk(netplanetest.Pod3), talk(netplanetest.Node)
	for _, c := range []*talkTo{one, three, node} {
		c.says(t, true)
	}
	only := fmt.Sprintf("%s/%d", n.Addr[netplanetest.Pod1], n.Uplink.BitLen())
	set(t, p, plan(deny("shop", only)))
	one.says(t, true)
	node.says(t, true)
	three.says(t, false)
	// The client's side: it may not send any more.
	out := deny("shop")
	out.Name, out.Spec.PolicyTypes = "out", []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	set(t, p, plan(deny("shop", only), out))
	one.says(t, false)
	node.says(t, true)
	// What was cut does not come back as if the server had begun it.
	set(t, p, plan(out))
	one.says(t, false)
}

// talkTo is a TCP connection and a flow of UDP between two hosts, of which both ends are at
// hand.
type talkTo struct {
	tcp [2]net.Conn // client, server
	udp [2]*net.UDPConn
	// client is where the server's datagrams go.
	client netip.AddrPort
}

func dial(t testing.TB, w *world, from netplanetest.Host, to netip.Addr) *talkTo {
	t.Helper()
	c := &talkTo{}
	var ln net.Listener
	server := w.Path[netplanetest.Pod2]
	netspacetest.In(t, server, func() (err error) {
		if ln, err = net.Listen("tcp", netip.AddrPortFrom(to, 0).String()); err != nil {
			return err
		}
		c.udp[1], err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 0)))
		return err
	})
	defer ln.Close()
	netspacetest.In(t, w.Path[from], func() (err error) {
		if c.tcp[0], err = net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second); err != nil {
			return err
		}
		c.udp[0], err = net.DialUDP("udp", nil, c.udp[1].LocalAddr().(*net.UDPAddr))
		return err
	})
	var err error
	if c.tcp[1], err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	c.client = c.udp[0].LocalAddr().(*net.UDPAddr).AddrPort()
	t.Cleanup(func() {
		for i := range 2 {
			c.tcp[i].Close()
			c.udp[i].Close()
		}
	})
	return c
}

// says sends on all ways, and checks whether it arrives.
func (c *talkTo) says(t *testing.T, arrives bool) {
	t.Helper()
	word, buf := []byte("word"), make([]byte, 64)
	for _, x := range []struct {
		name string
		send func() error
		at   net.Conn
	}{
		{"the client's TCP", func() error { _, err := c.tcp[0].Write(word); return err }, c.tcp[1]},
		{"the server's TCP", func() error { _, err := c.tcp[1].Write(word); return err }, c.tcp[0]},
		{"the client's UDP", func() error { _, err := c.udp[0].Write(word); return err }, c.udp[1]},
		{"the server's UDP", func() error { _, err := c.udp[1].WriteToUDPAddrPort(word, c.client); return err }, c.udp[0]},
	} {
		if !arrives && x.name == "the server's UDP" {
			continue // as if it had begun: it may
		}
		wait := 5 * time.Second
		if !arrives {
			wait = 300 * time.Millisecond
		}
		if err := x.send(); err != nil {
			t.Fatal(x.name, err)
		}
		_ = x.at.SetReadDeadline(time.Now().Add(wait))
		if _, err := x.at.Read(buf); (err == nil) != arrives {
			t.Errorf("%s arrives: %v, want %v", x.name, err == nil, arrives)
		}
	}
}
