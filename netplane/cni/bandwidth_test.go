package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/schemas/api"
)

// rates are the limits in the node's namespace, in bytes per second, in order.
func rates(t *testing.T, netns string) (out []uint64) {
	t.Helper()
	netspacetest.In(t, netns, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			qdiscs, err := netlink.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				if tbf, ok := q.(*netlink.Tbf); ok {
					out = append(out, tbf.Rate)
				}
			}
		}
		return nil
	})
	slices.Sort(out)
	return out
}

func TestBandwidth(t *testing.T) {
	n, cfg := lab(t)
	if err := n.Configure(cidrs("10.98.3.0/24"), 0); err != nil {
		t.Fatal(err)
	}
	ns := netspacetest.Namespace(t, "pod")
	p := pod("a")
	p.Annotations = map[string]string{api.IngressBandwidth: "8M", api.EgressBandwidth: "16M"}
	for _, lost := range []bool{false, true} {
		addrs, err := n.Attach(t.Context(), p, ns)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(rates(t, cfg.NetNS)); got != "[1000000 2000000]" {
			t.Errorf("limits %s", got)
		}
		if again, err := New(cfg, n.log).Attach(t.Context(), p, ns); err != nil || again[0] != addrs[0] {
			t.Errorf("by a new process: %v, %v, before %v", again, err, addrs)
		}
		if lost { // as by a crash between the plugins and the record
			if err := os.RemoveAll(cfg.cacheDir()); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.Detach(t.Context(), p.UID, ns); err != nil {
			t.Fatal(err)
		}
		if got := links(t, cfg.NetNS); got != 1 {
			t.Errorf("%d interfaces on the node after detaching, want loopback only (record lost: %v)", got, lost)
		}
	}
	for _, bad := range []string{"", "fast", "100", "2P", "-1M"} {
		p.Annotations = map[string]string{api.EgressBandwidth: bad}
		if _, err := n.Attach(t.Context(), p, ns); err == nil || !strings.Contains(err.Error(), api.EgressBandwidth) {
			t.Errorf("rate %q: %v", bad, err)
		}
	}
}

// newer makes the plugin of script one that speaks CNI 1.1.
func newer(t *testing.T, n *Networks) {
	t.Helper()
	path := filepath.Join(n.cfg.UserConfDir, "10-own.conflist")
	if err := os.WriteFile(path, []byte(`{"cniVersion":"1.1.0","name":"own","plugins":[{"type":"own"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestStatus(t *testing.T) {
	calls := filepath.Join(t.TempDir(), "calls")
	n := script(t, `echo $CNI_COMMAND >>`+calls+`; [ "$CNI_COMMAND" = STATUS ] && { echo '{"code":50,"msg":"no address range yet"}'; exit 1; }; exit 0`)
	newer(t, n)
	_, err := n.Attach(t.Context(), pod("a"), netspacetest.Namespace(t, "pod"))
	if err == nil || !strings.Contains(err.Error(), "no address range yet") {
		t.Errorf("attach to a network that is not ready: %v", err)
	}
	if got, _ := os.ReadFile(calls); string(got) != "STATUS\n" {
		t.Errorf("calls %q", got)
	}
}

func TestCollect(t *testing.T) {
	told := filepath.Join(t.TempDir(), "told")
	n := script(t, `case $CNI_COMMAND in ADD) echo '`+strings.Replace(goodResult, "1.0.0", "1.1.0", 1)+`';; GC) cat >>`+told+`;; esac; exit 0`)
	if err := n.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(told); err == nil {
		t.Error("a plugin that does not know GC was asked")
	}
	newer(t, n)
	attach(t, n, "a", netspacetest.Namespace(t, "pod"))
	if err := n.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(told)
	if err != nil || !strings.Contains(string(got), `"containerID":"uid-a","ifname":"eth0"`) {
		t.Errorf("told %s, %v", got, err)
	}
}
