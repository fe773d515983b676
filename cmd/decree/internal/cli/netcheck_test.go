package cli

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"decree.dev/decree/netplane/netcheck"
)

func checked(kind netcheck.Kind, from, to, at string, o netcheck.Outcome) netcheck.Check {
	return netcheck.Check{From: from, Probe: netcheck.Probe{Kind: kind, To: to, Address: netip.MustParseAddr(at)}, Outcome: o}
}

func TestWriteNetcheck(t *testing.T) {
	quick, slow := netcheck.Outcome{Sent: 3, Latency: 250 * time.Microsecond}, netcheck.Outcome{Sent: 3, Lost: 1, Latency: 12 * time.Millisecond}
	lost := netcheck.Outcome{Sent: 3, Lost: 3, Error: "no answer to 3 pings"}
	r := &netcheck.Report{
		Nodes: []netcheck.Node{{Name: "n1"}, {Name: "n2"}, {Name: "n3"}},
		Checks: []netcheck.Check{
			checked(netcheck.NodeToNode, "n1", "n2", "10.0.0.2", quick), checked(netcheck.NodeToNode, "n1", "n2", "fd00::2", slow),
			checked(netcheck.NodeToNode, "n2", "n1", "10.0.0.1", quick), checked(netcheck.NodeToNode, "n2", "n1", "fd00::1", lost),
			checked(netcheck.PodToPod, "n1", "n2", "10.1.1.2", lost),
			checked(netcheck.PodToService, "n1", "shop/web:80", "10.2.0.2", quick),
			checked(netcheck.PodToUDP, "n1", "shop/log:514/UDP", "10.2.0.3", quick), checked(netcheck.PodToUDP, "n1", "shop/log:514/UDP", "fd00:2::3", netcheck.Outcome{Silent: true}),
			checked(netcheck.PodToUDP, "n2", "shop/log:514/UDP", "10.2.0.3", netcheck.Outcome{Error: "UDP port 514: read: connection refused"}),
			checked(netcheck.NodeToDNS, "n1", "web.shop.svc.cluster.local.", "10.2.0.10", quick),
			checked(netcheck.PodToDNS, "n1", "web.shop.svc.cluster.local.", "10.2.0.10", netcheck.Outcome{Error: "no \x1b answer"}),
		},
		Skipped: []string{"further services: 2"},
		Advice:  []string{"n2 does not reach n1"},
	}
	var out bytes.Buffer
	if err := writeNetcheck(&out, r); err != nil {
		t.Fatal(err)
	}
	want := `NODE TO NODE   n1            n2
n1             -             12.00 ms (1 of 3 lost)
n2             IPv6 FAILED   -
n3             -             -

POD TO POD ON   n2
n1              FAILED
n2              -
n3              -

POD TO SERVICE   shop/log:514/UDP   shop/web:80
n1               not refused        0.25 ms
n2               FAILED             -
n3               -                  -

DNS FROM   node      pod
n1         0.25 ms   FAILED
n2         -         -
n3         -         -

Not tried: further services: 2
Failed:
  node to node: n2 to n1 at fd00::1: no answer to 3 pings
  pod to pod: n1 to n2 at 10.1.1.2: no answer to 3 pings
  pod to service: n2 to shop/log:514/UDP at 10.2.0.3: UDP port 514: read: connection refused
  pod to DNS: n1 to web.shop.svc.cluster.local. at 10.2.0.10: no ^[ answer
Look at:
  n2 does not reach n1
3 nodes, 11 checks: 4 failed
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}

	r = &netcheck.Report{OK: true}
	for i := range 20 {
		r.Nodes = append(r.Nodes, netcheck.Node{Name: fmt.Sprint("n", i)})
		r.Checks = append(r.Checks, checked(netcheck.NodeToNode, fmt.Sprint("n", i), fmt.Sprint("n", (i+1)%20), "10.0.0.2", netcheck.Outcome{Latency: time.Duration(i+1) * time.Millisecond}))
	}
	out.Reset()
	if err := writeNetcheck(&out, r); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"NODE TO NODE 20: 20 checks, 0 failed, 1.00 ms to 20.00 ms (-o json shows each)", "20 nodes, 20 checks: all well"} {
		if !strings.Contains(out.String(), line+"\n") {
			t.Errorf("a wide table:\n%s", out.String())
		}
	}

	// What is not known is not said to be well, nor quick.
	for i := range 20 {
		r.Checks[i].Kind = netcheck.PodToUDP
	}
	r.Checks[0].Outcome = netcheck.Outcome{Silent: true}
	out.Reset()
	if err := writeNetcheck(&out, r); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"POD TO SERVICE 20: 20 checks, 0 failed, 1 not refused, 2.00 ms to 20.00 ms (-o json shows each)", "20 nodes, 20 checks: none failed, 1 neither refused nor answered"} {
		if !strings.Contains(out.String(), line+"\n") {
			t.Errorf("silence:\n%s", out.String())
		}
	}
}
