package netplane_test

import (
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace"
)

// conversation is a check from the other side.
type conversation struct {
	net.Conn
	t     *testing.T
	in    *json.Decoder
	ended chan error
}

func converse(n *node, begin netcheck.Begin) (*conversation, netcheck.End) {
	ours, theirs := net.Pipe()
	c := &conversation{ours, n.t, json.NewDecoder(ours), make(chan error, 1)}
	go func() { c.ended <- errors.Join(n.plane.Check(n.t.Context(), theirs), theirs.Close()) }()
	var end netcheck.End
	c.say(begin)
	c.hear(&end)
	return c, end
}

func (c *conversation) say(v any) {
	c.t.Helper()
	if err := json.NewEncoder(c).Encode(v); err != nil {
		c.t.Fatal(err)
	}
}

func (c *conversation) hear(v any) {
	c.t.Helper()
	if err := c.in.Decode(v); err != nil {
		c.t.Fatal(err)
	}
}

// end closes, and returns what Check does.
func (c *conversation) end() error {
	c.Close()
	return <-c.ended
}

// TestCheck: a node lends a check the network of a pod, or makes one for it and takes it back;
// what a process that ended in between has left is taken back too.
func TestCheck(t *testing.T) {
	n := newNode(t)
	n.start()
	n.set(desired())
	_, a := n.attach("one")
	attached := func() int {
		t.Helper()
		uids, err := n.plane.Attached(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(uids)
	}

	lent, end := converse(n, netcheck.Begin{Pod: "uid-one"})
	made, other := converse(n, netcheck.Begin{})
	if end.Error != "" || len(end.Addresses) != 1 || end.Addresses[0] != a || other.Error != "" || len(other.Addresses) != 1 || other.Addresses[0] == a || attached() != 2 {
		t.Fatalf("%+v, %+v, %d pods", end, other, attached())
	}
	lent.say([]netcheck.Probe{{Kind: netcheck.PodToPod, Address: other.Addresses[0]}, {Kind: netcheck.NodeToPod, Address: a}, {Kind: netcheck.PodToDNS, To: "web.default.svc.cluster.local.", Want: clusterIP, Address: dnsIP, Port: 53}})
	var outcomes []netcheck.Outcome
	lent.hear(&outcomes)
	if len(outcomes) != 3 {
		t.Fatalf("%d outcomes", len(outcomes))
	}
	for _, o := range outcomes {
		if o.Error != "" || o.Latency <= 0 {
			t.Errorf("%+v", o)
		}
	}
	made.say([]netcheck.Probe{{Kind: netcheck.PodToPod, Address: netip.MustParseAddr("2001:db8::1")}})
	if made.hear(&outcomes); len(outcomes) != 1 || outcomes[0].Error == "" {
		t.Errorf("nobody is there: %+v", outcomes)
	}
	if err := errors.Join(lent.end(), made.end()); err != nil {
		t.Errorf("an orderly end: %v", err)
	}
	folder := filepath.Join(n.cfg.DataDir, "check")
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 || attached() != 1 {
		t.Errorf("left: %v, %v, %d pods", left, err, attached())
	}

	gone, end := converse(n, netcheck.Begin{Pod: "uid-gone"})
	if !strings.Contains(end.Error, "not attached") {
		t.Errorf("a pod that is not here: %+v", end)
	}
	gone.end()
	var under []*conversation
	for range 4 {
		c, _ := converse(n, netcheck.Begin{Pod: "uid-one"})
		under = append(under, c)
	}
	refused, end := converse(n, netcheck.Begin{Pod: "uid-one"})
	if !strings.Contains(end.Error, "takes part in 4 checks already") {
		t.Errorf("too many checks: %+v", end)
	}
	refused.end()
	for _, c := range under {
		if c.end() == nil {
			t.Error("a conversation that ends before its probes has no error")
		}
	}

	// As if the process had ended in the middle of a check.
	left := filepath.Join(folder, "netcheck-left")
	if err := netspace.Create(left); err != nil {
		t.Fatal(err)
	}
	ghost := pod("left")
	ghost.UID = types.UID("netcheck-left")
	if _, err := n.plane.Attach(t.Context(), ghost, left); err != nil {
		t.Fatal(err)
	}
	n.stop()
	n.start()
	n.set(desired())
	c, _ := converse(n, netcheck.Begin{})
	if attached() != 2 {
		t.Errorf("%d pods: what an earlier process left is still there", attached())
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("the namespace of an earlier process: %v", err)
	}
	c.end()
}
