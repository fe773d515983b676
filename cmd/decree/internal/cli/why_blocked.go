package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

func whyBlockedCmd(e *env) *cobra.Command {
	var output, dns string
	c := &cobra.Command{
		Use:   "why-blocked POD POD:PORT[/PROTOCOL]",
		Short: "Say which network policies allow or block a connection, with their lines in Git",
		Long: `Why-blocked says what network policies make of a connection, from what the API holds:
the objects are the only thing that is looked at, no packet is sent. Both ends have to
agree: the one that connects must be allowed to send (egress), the other one to receive
(ingress). Exit status 1 means that the connection is blocked.

A pod is NAME or NAMESPACE/NAME; either end may also be an address, such as one outside
the cluster. A port is a number, or the name that the pod has for it.`,
		Example: `  decree why-blocked client web:8080
  decree why-blocked shop/client data/db:postgres
  decree why-blocked client 1.1.1.1:53/udp
  decree why-blocked 192.0.2.7 web:8080 -o json`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			address, err := e.clusterDNS(c.Context(), dns)
			if err != nil {
				return err
			}
			k := known{dns: address, namespace: e.namespace}
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			if err := k.load(c.Context(), cl); err != nil {
				return err
			}
			reports, err := k.why(args[0], args[1])
			if err != nil {
				return err
			}
			if output == "json" {
				err = e.writeJSON(reports)
			} else {
				writeReports(e.Out, reports)
			}
			if err == nil && slices.ContainsFunc(reports, func(r report) bool { return !r.Allowed }) {
				return exitCode(1)
			}
			return err
		},
	}
	namespaceFlag(e, c)
	c.Flags().StringVarP(&output, "output", "o", "", "json for everything")
	c.Flags().StringVar(&dns, "dns", "", "the cluster DNS address, for who may not ask the cluster")
	return c
}

// clusterDNS is the address that text names, or the cluster's.
func (e *env) clusterDNS(ctx context.Context, text string) (netip.Addr, error) {
	if text != "" {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return a, usageError{fmt.Errorf("--dns %q: expected an address", text)}
		}
		return a, nil
	}
	var s daemon.Settings
	if err := e.ask(ctx, http.MethodGet, "settings", nil, nil, &s); err != nil {
		return netip.Addr{}, fmt.Errorf("ask for the cluster DNS address (--dns names it): %w", err)
	}
	return s.DNS, nil
}

// known is what the API says of everything that policies speak about.
type known struct {
	policies   []*networkingv1.NetworkPolicy
	namespaces []*corev1.Namespace
	pods       []*corev1.Pod
	services   []*corev1.Service
	dns        netip.Addr
	namespace  string // of pods without one
}

func (k *known) load(ctx context.Context, c *client.Client) (err error) {
	if k.policies, _, err = client.List[*networkingv1.NetworkPolicy](ctx, c, client.ListOptions{}); err != nil {
		return err
	}
	if k.namespaces, _, err = client.List[*corev1.Namespace](ctx, c, client.ListOptions{}); err != nil {
		return err
	}
	if k.services, _, err = client.List[*corev1.Service](ctx, c, client.ListOptions{}); err != nil {
		return err
	}
	k.pods, _, err = client.List[*corev1.Pod](ctx, c, client.ListOptions{})
	return err
}

// report is the answer for one pair of addresses.
type report struct {
	From     string          `json:"from"`
	To       string          `json:"to"`
	Protocol string          `json:"protocol"`
	Port     uint16          `json:"port"`
	Allowed  bool            `json:"allowed"`
	Egress   directionReport `json:"egress"`
	Ingress  directionReport `json:"ingress"`
}

// directionReport is what policies say at one end.
type directionReport struct {
	Allowed bool   `json:"allowed"`
	Reason  string `json:"reason"`
	// By is the policy that allows it, IsolatedBy are all that isolate this end.
	By         *policyReport  `json:"by,omitempty"`
	IsolatedBy []policyReport `json:"isolatedBy,omitempty"`
}

// policyReport is a policy and where it is written.
type policyReport struct {
	Policy string `json:"policy"`
	Rule   int    `json:"rule,omitempty"` // counted from 1
	Source string `json:"source,omitempty"`
	Commit string `json:"commit,omitempty"`
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
}

func (p policyReport) String() string {
	if p.Source == "" {
		return "NetworkPolicy " + p.Policy
	}
	return fmt.Sprintf("NetworkPolicy %s (%s)", p.Policy, api.Origin{Source: p.Source, Commit: p.Commit, Pos: api.Position{File: p.File, Line: p.Line}})
}

// end is one end of a connection: a pod, or an address that may be anybody's.
type end struct {
	name  string
	pod   *corev1.Pod
	addrs []netip.Addr
}

// why answers for every family that both ends have.
func (k *known) why(from, to string) ([]report, error) {
	source, err := k.end(from)
	if err != nil {
		return nil, err
	}
	host, port, proto, err := splitPort(to)
	if err != nil {
		return nil, usageError{err}
	}
	target, err := k.end(host)
	if err != nil {
		return nil, err
	}
	number, err := target.port(port, proto)
	if err != nil {
		return nil, err
	}
	plan := k.plan()
	var out []report
	for _, a := range source.addrs {
		for _, b := range target.addrs {
			if a.Is4() != b.Is4() {
				continue
			}
			f := policy.Flow{From: a, To: b, Proto: proto, Port: number, FromNode: source.isNodeOf(target, a)}
			out = append(out, reportOn(plan.Judge(f), f, source, target))
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s and %s have no addresses of the same family", source.name, target.name)
	}
	return out, nil
}

func (k *known) plan() *policy.Plan {
	return policy.New(policy.Cluster{Policies: k.policies, Namespaces: k.namespaces, Pods: policy.Everywhere(k.pods), DNS: k.dns})
}

// end finds who a word means.
func (k *known) end(word string) (end, error) {
	if a, err := netip.ParseAddr(strings.Trim(word, "[]")); err == nil {
		return k.address(a.Unmap())
	}
	namespace, name, ok := strings.Cut(word, "/")
	if !ok {
		namespace, name = k.namespace, word
	}
	for _, pod := range k.pods {
		if pod.Namespace != namespace || pod.Name != name {
			continue
		}
		e := end{name: namespace + "/" + name, pod: pod}
		for _, text := range append([]corev1.PodIP{{IP: pod.Status.PodIP}}, pod.Status.PodIPs...) {
			if a, err := netip.ParseAddr(text.IP); err == nil && !slices.Contains(e.addrs, a.Unmap()) {
				e.addrs = append(e.addrs, a.Unmap())
			}
		}
		if len(e.addrs) == 0 {
			return end{}, fmt.Errorf("pod %s/%s has no address yet: policies hold for addresses", namespace, name)
		}
		return e, nil
	}
	return end{}, fmt.Errorf("there is no pod %q in namespace %q; see: decree get pods -A", name, namespace)
}

// address finds the pod that has an address.
func (k *known) address(a netip.Addr) (end, error) {
	for _, svc := range k.services {
		if slices.Contains(render.ClusterIPs(svc), a) && a != k.dns {
			return end{}, fmt.Errorf("%s is the address of service %s/%s: policies hold for the pods behind it, so name one of those and its own port", a, svc.Namespace, svc.Name)
		}
	}
	for _, pod := range k.pods {
		if p, ok := policy.PodOf(pod); ok && slices.Contains(p.Addrs, a) {
			return end{p.Namespace + "/" + p.Name, pod, []netip.Addr{a}}, nil
		}
	}
	return end{name: a.String(), addrs: []netip.Addr{a}}, nil
}

// isNodeOf reports whether e, by its address a, is the node that to is on: what that sends
// is always let in.
func (e end) isNodeOf(to end, a netip.Addr) bool {
	if to.pod == nil {
		return false
	}
	if e.pod != nil {
		return e.pod.Spec.HostNetwork && e.pod.Spec.NodeName == to.pod.Spec.NodeName
	}
	return slices.ContainsFunc(append([]corev1.HostIP{{IP: to.pod.Status.HostIP}}, to.pod.Status.HostIPs...), func(h corev1.HostIP) bool { return h.IP == a.String() })
}

// splitPort reads HOST:PORT or HOST:PORT/PROTOCOL.
func splitPort(text string) (host, port string, proto render.Proto, err error) {
	bad := fmt.Errorf("%q: expected POD:PORT, such as web:8080 or web:53/udp", text)
	rest, proto := text, render.TCP
	for p, name := range map[render.Proto]string{render.TCP: "/tcp", render.UDP: "/udp", render.SCTP: "/sctp"} {
		if cut, ok := strings.CutSuffix(strings.ToLower(text), name); ok {
			rest, proto = text[:len(cut)], p
		}
	}
	i := strings.LastIndexByte(rest, ':')
	if i <= 0 || i == len(rest)-1 || strings.Contains(rest[i:], "]") || strings.Contains(rest[i:], "/") {
		return "", "", 0, bad
	}
	host = rest[:i]
	if strings.Contains(host, ":") && host[0] != '[' {
		return "", "", 0, fmt.Errorf("%q: write [ADDRESS]:PORT for an IPv6 address", text)
	}
	return host, rest[i+1:], proto, nil
}

// port is the number that a word means at this end.
func (e end) port(word string, proto render.Proto) (uint16, error) {
	if n, err := strconv.ParseUint(word, 10, 16); err == nil && n > 0 {
		return uint16(n), nil
	}
	if e.pod != nil {
		if p, ok := policy.PodOf(e.pod); ok {
			for _, named := range p.Ports {
				if named.Name == word && named.Proto == proto {
					return named.Number, nil
				}
			}
		}
	}
	return 0, usageError{fmt.Errorf("port %q: expected a number from 1 to 65535, or the name of a %s port of %s", word, proto, e.name)}
}

// reportOn says in words what policies decided.
func reportOn(v policy.Verdict, f policy.Flow, from, to end) report {
	r := report{
		From: from.called(f.From), To: to.called(f.To), Protocol: f.Proto.String(), Port: f.Port, Allowed: v.Allowed,
		Egress: decision(v.Egress, from.name, "egress"), Ingress: decision(v.Ingress, to.name, "ingress"),
	}
	switch {
	case f.From == f.To:
		r.Egress.Reason, r.Ingress.Reason = "a pod always reaches itself", "a pod always reaches itself"
	case f.FromNode:
		r.Egress.Reason, r.Ingress.Reason = "policies do not hold for nodes", "a node always reaches its own pods"
	}
	return r
}

func (e end) called(a netip.Addr) string {
	if e.name == a.String() {
		return e.name
	}
	return fmt.Sprintf("%s (%s)", e.name, a)
}

func decision(d policy.Decision, name, direction string) directionReport {
	out := directionReport{Allowed: d.Allowed}
	if d.Isolating == nil {
		out.Reason = fmt.Sprintf("no policy isolates %s for %s", name, direction)
		return out
	}
	for _, p := range d.Isolating.Policies {
		out.IsolatedBy = append(out.IsolatedBy, reportOf(p))
	}
	if d.By != nil {
		by := reportOf(d.By.Policy)
		by.Rule = d.By.Index + 1
		out.By, out.Reason = &by, fmt.Sprintf("%s rule %d of %s", direction, by.Rule, by)
		return out
	}
	out.Reason = fmt.Sprintf("no policy allows it: %s is isolated for %s", name, direction)
	return out
}

func reportOf(p *policy.Policy) policyReport {
	r := policyReport{Policy: p.Object.Namespace + "/" + p.Object.Name}
	if g, ok := api.OriginOf(p.Object); ok {
		r.Source, r.Commit, r.File, r.Line = g.Source, g.Commit, g.Pos.File, g.Pos.Line
	}
	return r
}

// writeReports is for people; pairs of addresses for which the same holds are one.
func writeReports(w io.Writer, reports []report) {
	for i, r := range reports {
		if i > 0 && r.Allowed == reports[i-1].Allowed && r.Egress.Reason == reports[i-1].Egress.Reason && r.Ingress.Reason == reports[i-1].Ingress.Reason {
			continue
		}
		fmt.Fprintf(w, "%s: %s to %s, %s port %d\n", word(r.Allowed), r.From, r.To, r.Protocol, r.Port)
		writeDirection(w, "egress: ", r.Egress)
		writeDirection(w, "ingress:", r.Ingress)
	}
}

func writeDirection(w io.Writer, title string, d directionReport) {
	fmt.Fprintf(w, "  %s %s: %s\n", title, word(d.Allowed), d.Reason)
	if d.Allowed {
		return
	}
	for _, p := range d.IsolatedBy {
		fmt.Fprintf(w, "             by %s\n", p)
	}
}

func word(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "blocked"
}
