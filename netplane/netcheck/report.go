package netcheck

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Part is what one node did.
type Part struct {
	End
	// Trouble is why the node took no part or did not end it; empty if it did.
	Trouble  string
	Probes   []Probe
	Outcomes []Outcome // of the first of Probes; those of others never came
}

// Report is what came of the plan: parts are by node, and nodes without one did nothing.
func (p *Plan) Report(parts map[string]Part) *Report {
	r := &Report{Checks: []Check{}, Services: []string{}, Skipped: p.Skipped}
	for _, s := range p.services {
		if !slices.Contains(r.Services, s.name) {
			r.Services = append(r.Services, s.name)
		}
	}
	for _, name := range p.Nodes {
		part := parts[name]
		n := Node{Name: name, End: part.End}
		if pod := p.Pods[name]; pod != nil {
			n.Pod = pod.Namespace + "/" + pod.Name
		}
		if n.Error == "" {
			n.Error = part.Trouble
		}
		r.Nodes = append(r.Nodes, n)
		for i, probe := range part.Probes {
			c := Check{From: name, Probe: probe, Outcome: Outcome{Error: "the node did not say what came of it"}}
			if i < len(part.Outcomes) {
				c.Outcome = part.Outcomes[i]
			}
			r.Checks = append(r.Checks, c)
		}
	}
	slices.SortStableFunc(r.Checks, func(a, b Check) int {
		return cmp.Compare(slices.Index(Kinds, a.Kind), slices.Index(Kinds, b.Kind))
	})
	r.OK = !slices.ContainsFunc(r.Nodes, func(n Node) bool { return n.Error != "" }) &&
		!slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Error != "" })
	r.Advice = advice(r)
	return r
}

// adviser collects advice without saying anything twice.
type adviser struct {
	r    *Report
	bad  map[string]bool // nodes that took no part
	cut  map[pair]bool   // nodes that do not reach each other
	said []string
}

// pair is a direction between two nodes in one family.
type pair struct {
	from, to string
	v4       bool
}

// advice says what to look at. What follows from more basic trouble is not said: without a
// way from node to node there is none from pod to pod.
func advice(r *Report) []string {
	a := &adviser{r: r, bad: map[string]bool{}, cut: map[pair]bool{}}
	for _, n := range r.Nodes {
		if n.Error != "" {
			a.bad[n.Name] = true
			a.say("node %s: %s; see: decree describe node %s, and the log of `decree agent` there", n.Name, n.Error, n.Name)
		}
	}
	for _, c := range r.Checks {
		if c.Error != "" {
			a.check(c)
		}
	}
	return a.said
}

func (a *adviser) say(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(a.said, text) {
		a.said = append(a.said, text)
	}
}

func (a *adviser) check(c Check) {
	way := pair{c.From, c.To, c.Address.Is4()}
	switch {
	case c.TooLarge > 0:
		a.say("%s to %s: packets of %d bytes are lost where small ones pass: something between the nodes takes less than their interfaces say; compare `ip link` on both, and lower the MTU there",
			c.From, c.To, c.TooLarge)
	case c.Kind == NodeToNode:
		a.cut[way] = true
		a.say("%s does not reach %s at %s: look at cable, switch, routes and firewalls between them (ICMP echo may be closed); on %s: ip route get %s",
			c.From, c.To, c.Address, c.From, c.Address)
	case c.From == c.To:
		a.say("node %s does not reach a pod of its own at %s: on %s: ip route get %s, and the log of `decree agent`", c.From, c.Address, c.From, c.Address)
	case c.Kind == NodeToPod || c.Kind == PodToPod:
		// In either family: pods of both are carried by the one that nodes share.
		if a.cutEither(c.From, c.To) {
			return
		}
		a.say("the pods of %s are not reached from %s while the nodes may reach each other: is UDP port 4789 (VXLAN), or 51820 (WireGuard), open between them? on %s: ip route get %s",
			c.To, c.From, c.From, c.Address)
	case c.Kind == PodToService || c.Kind == PodToUDP:
		name, _, _ := strings.Cut(c.To, ":")
		namespace, name, _ := strings.Cut(name, "/")
		a.say("service %s is not reached from pods on %s (%s): decree describe service %s -n %s shows its endpoints, `decree doctor` on %s what balances them",
			c.To, c.From, c.Error, name, namespace, c.From)
	default:
		a.say("cluster DNS at %s does not answer on %s as it should (%s): it is the agent of that node; see its log", c.Address, c.From, c.Error)
	}
}

func (a *adviser) cutEither(from, to string) bool {
	return a.cut[pair{from, to, true}] || a.cut[pair{from, to, false}] || a.cut[pair{to, from, true}] || a.cut[pair{to, from, false}] || a.bad[to]
}
