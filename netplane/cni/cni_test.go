package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane/netspace/netspacetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func pod(name string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name)}}
}

// lab is a node's namespace with the real plugins.
func lab(t testing.TB) (*Networks, Config) {
	t.Helper()
	if _, err := os.Stat("/usr/lib/cni/ptp"); err != nil {
		t.Fatalf("%v; run: go tool task setup", err)
	}
	dir := t.TempDir()
	cfg := Config{UserConfDir: filepath.Join(dir, "user"), BinDirs: []string{"/nowhere", "/usr/lib/cni"}, DataDir: filepath.Join(dir, "cni"), NetNS: netspacetest.Namespace(t, "node")}
	return New(cfg, slog.New(slog.DiscardHandler)), cfg
}

func cidrs(s ...string) (out []netip.Prefix) {
	for _, x := range s {
		out = append(out, netip.MustParsePrefix(x))
	}
	return out
}

func attach(t *testing.T, n *Networks, name, netns string) netip.Addr {
	t.Helper()
	addrs, err := n.Attach(t.Context(), pod(name), netns)
	if err != nil {
		t.Fatal(err)
	}
	return addrs[0]
}

func links(t *testing.T, netns string) (n int) {
	t.Helper()
	netspacetest.In(t, netns, func() error {
		ls, err := netlink.LinkList()
		n = len(ls)
		return err
	})
	return n
}

func attached(t *testing.T, n *Networks) string {
	t.Helper()
	uids, err := n.Attached(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(uids)
}

func TestAttach(t *testing.T) {
	n, cfg := lab(t)
	ns := netspacetest.Namespace(t, "pod")
	if _, err := n.Attach(t.Context(), pod("a"), ns); !errors.Is(err, ErrNotReady) {
		t.Fatalf("attach without a pod CIDR: %v", err)
	}
	if err := n.Configure(cidrs("10.98.3.0/24", "fd98:0:0:3::/64"), 0); err != nil {
		t.Fatal(err)
	}
	addrs, err := n.Attach(t.Context(), pod("a"), ns)
	if err != nil {
		t.Fatal(err)
	}
	if len(addrs) != 2 || !addrs[0].Is4() || !addrs[1].Is6() {
		t.Errorf("dual stack: %v", addrs)
	}
	a := addrs[0]
	if again := attach(t, n, "a", ns); again != a {
		t.Errorf("attached again: %s, before %s", again, a)
	}
	if again := attach(t, New(cfg, n.log), "a", ns); again != a {
		t.Errorf("attached by a new process: %s, before %s", again, a)
	}
	if got := attached(t, n); got != "[uid-a]" {
		t.Error(got)
	}

	t.Run("untrue", func(t *testing.T) {
		netspacetest.In(t, ns, func() error {
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkDel(eth0)
		})
		attach(t, n, "a", ns)
		if links(t, ns) != 2 {
			t.Error("no interface after attaching anew")
		}
	})
	t.Run("other namespace", func(t *testing.T) {
		other := netspacetest.Namespace(t, "other")
		attach(t, n, "a", other)
		if links(t, other) != 2 {
			t.Error("the pod's new namespace has no interface")
		}
		if err := n.Detach(t.Context(), "uid-a", other); err != nil {
			t.Fatal(err)
		}
		if links(t, other) != 1 || attached(t, n) != "[]" {
			t.Errorf("after detach: %d links, attached %s", links(t, other), attached(t, n))
		}
	})
	for range 2 {
		if err := n.Detach(t.Context(), "uid-a", "/gone"); err != nil {
			t.Error(err)
		}
	}
}

// TestInterrupted: the record of an attachment is lost, as by a crash between the
// plugin and the record.
func TestInterrupted(t *testing.T) {
	n, cfg := lab(t)
	if err := n.Configure(cidrs("10.98.3.0/24"), 0); err != nil {
		t.Fatal(err)
	}
	ns := netspacetest.Namespace(t, "pod")
	attach(t, n, "a", ns)
	forget := func() {
		t.Helper()
		if err := os.RemoveAll(cfg.cacheDir()); err != nil {
			t.Fatal(err)
		}
	}
	forget()
	attach(t, n, "a", ns)
	forget()
	if got := attached(t, n); got != "[uid-a]" {
		t.Errorf("a leaked address is not listed: %s", got)
	}
	if err := n.Detach(t.Context(), "uid-a", ""); err != nil {
		t.Fatal(err)
	}
	if got := attached(t, n); got != "[]" {
		t.Errorf("a leaked address stays: %s", got)
	}
	// A record that a crash cut short is no record.
	attach(t, n, "b", netspacetest.Namespace(t, "b"))
	file := filepath.Join(cfg.cacheDir(), "results", "decree-uid-b-eth0")
	if err := os.WriteFile(file, []byte(`{"kind":"cniCacheV1","cont`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cfg.DataDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("purge left %s: %v", cfg.DataDir, err)
	}
}

func TestManyAtOnce(t *testing.T) {
	n, cfg := lab(t)
	if err := n.Configure(cidrs("10.98.3.0/24"), 0); err != nil {
		t.Fatal(err)
	}
	const pods = 12
	var wg sync.WaitGroup
	got := make([]netip.Addr, pods)
	for i := range pods {
		name := fmt.Sprintf("p%d", i)
		ns := netspacetest.Namespace(t, name)
		for range 2 { // the same pod twice at the same time
			wg.Go(func() {
				addrs, err := n.Attach(t.Context(), pod(name), ns)
				if err != nil {
					t.Error(err)
					return
				}
				n.mu.Lock()
				defer n.mu.Unlock()
				if got[i].IsValid() && got[i] != addrs[0] {
					t.Errorf("%s has %s and %s", name, got[i], addrs[0])
				}
				got[i] = addrs[0]
			})
		}
	}
	wg.Wait()
	seen := map[netip.Addr]bool{}
	for _, a := range got {
		if seen[a] {
			t.Errorf("%s twice", a)
		}
		seen[a] = true
	}
	if err := n.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := links(t, cfg.NetNS); got != 1 {
		t.Errorf("%d interfaces on the node after purge, want loopback only", got)
	}
	if len(n.pods) != 0 {
		t.Errorf("%d turns left", len(n.pods))
	}
}

// script makes a plugin of a shell script, and a user's configuration of it.
func script(t *testing.T, body string) *Networks {
	t.Helper()
	dir := t.TempDir()
	bin, conf := filepath.Join(dir, "bin"), filepath.Join(dir, "user")
	for path, s := range map[string]string{
		filepath.Join(bin, "own"):                "#!/bin/sh\n" + body,
		filepath.Join(conf, "20-later.conflist"): `{"cniVersion":"1.0.0","name":"later","plugins":[{"type":"none"}]}`,
		filepath.Join(conf, "10-own.conflist"):   `{"cniVersion":"1.0.0","name":"own","plugins":[{"type":"own"}]}`,
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(s), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cfg := Config{UserConfDir: conf, BinDirs: []string{bin}, DataDir: filepath.Join(dir, "data"), Timeout: 500 * time.Millisecond}
	return New(cfg, slog.New(slog.DiscardHandler))
}

const goodResult = `{"cniVersion":"1.0.0","interfaces":[{"name":"host0"},{"name":"eth0","sandbox":"/x"}],"ips":[{"address":"10.1.2.9/24","interface":0},{"address":"10.1.2.3/24","interface":1},{"address":"fd00::3/64","interface":1}]}`

func TestUserConfigurationWins(t *testing.T) {
	n := script(t, `[ "$CNI_COMMAND" = ADD ] && echo '`+goodResult+`'; exit 0`)
	if err := n.Configure(cidrs("10.98.3.0/24"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(n.cfg.confPath()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a configuration was generated beside the user's: %v", err)
	}
	addrs, err := n.Attach(t.Context(), pod("a"), netspacetest.Namespace(t, "pod"))
	if err != nil || fmt.Sprint(addrs) != "[10.1.2.3 fd00::3]" {
		t.Errorf("%v, %v", addrs, err)
	}
	if names, file, err := n.Plugins(); err != nil || fmt.Sprint(names) != "[own]" || filepath.Base(file) != "10-own.conflist" {
		t.Errorf("plugins %v of %s, %v", names, file, err)
	}
	if err := n.Detach(t.Context(), "uid-a", ""); err != nil || attached(t, n) != "[]" {
		t.Errorf("%v, attached %s", err, attached(t, n))
	}
}

func TestBadPlugins(t *testing.T) {
	for name, c := range map[string]struct{ body, want string }{
		"silent":   {"exit 0", "cni result"},
		"garbage":  {"echo '{'; exit 0", "result"},
		"no ips":   {`echo '{"cniVersion":"1.0.0"}'`, "gives the pod no address"},
		"hangs":    {"sleep 60 & sleep 60", "did not end within 500ms"},
		"endless":  {"while :; do echo 0123456789012345678901234567890123456789; done", "within 500ms"},
		"chatty":   {"head -c 3000000 /dev/zero; exit 0", "printed more than"},
		"refuses":  {`echo '{"code":100,"msg":"no addresses left","details":"range is full"}'; exit 1`, "no addresses left"},
		"crashes":  {"echo panic: oh no >&2; exit 2", "oh no"},
		"later":    {`echo '{"code":11,"msg":"not up yet"}'; exit 1`, "not up yet"},
		"loopback": {`echo '{"cniVersion":"1.0.0","ips":[{"address":"127.0.0.1/8"}]}'`, "no address for a pod"},
	} {
		t.Run(name, func(t *testing.T) {
			n := script(t, "if [ \"$CNI_COMMAND\" != ADD ]; then exit 0; fi\n"+c.body)
			start := time.Now()
			_, err := n.Attach(t.Context(), pod("a"), netspacetest.Namespace(t, "pod"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		n := script(t, "")
		n.cni = New(Config{UserConfDir: n.cfg.UserConfDir, BinDirs: []string{"/nowhere"}, DataDir: n.cfg.DataDir}, n.log).cni
		_, err := n.Attach(t.Context(), pod("a"), netspacetest.Namespace(t, "pod"))
		if err == nil || !strings.Contains(err.Error(), "apt-get install") {
			t.Errorf("a missing plugin: %v", err)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		n := script(t, "sleep 60")
		ctx, cancel := context.WithCancelCause(t.Context())
		stop := errors.New("stop")
		cancel(stop)
		if _, err := n.Attach(ctx, pod("a"), netspacetest.Namespace(t, "pod")); !errors.Is(err, stop) {
			t.Errorf("%v", err)
		}
	})
}

func TestUIDs(t *testing.T) {
	n := script(t, "exit 0")
	for _, uid := range []types.UID{"", "../x", "a/b", "-a", "a;b", types.UID(strings.Repeat("a", 129))} {
		if err := n.Detach(t.Context(), uid, ""); err == nil {
			t.Errorf("uid %q is taken", uid)
		}
	}
}

func FuzzParseResult(f *testing.F) {
	for _, s := range []string{
		goodResult, `{}`, ``, `null`, `[]`, `{"cniVersion":"1.0.0","ips":[null]}`, `{"cniVersion":"1.0.0","ips":[{}]}`,
		`{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.2/24","gateway":"10.0.0.1"}}`, `{"cniVersion":"0.2.0","ip4":null,"ip6":{}}`,
		`{"cniVersion":"0.4.0","interfaces":[null],"ips":[{"version":"4","interface":0,"address":"1.2.3.4/24"}]}`,
		`{"cniVersion":"1.0.0","interfaces":[],"ips":[{"interface":-1,"address":"1.2.3.4/24"}]}`,
		`{"cniVersion":"9.9.9"}`, `{"cniVersion":"1.0.0","ips":[{"address":"0.0.0.0/0"}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		addrs, err := ParseResult(b)
		if err != nil {
			if !errors.Is(err, ErrResult) || addrs != nil {
				t.Errorf("%v with error %v", addrs, err)
			}
			return
		}
		if len(addrs) == 0 || len(addrs) > maxAddresses {
			t.Fatalf("%d addresses", len(addrs))
		}
		seen := map[netip.Addr]bool{}
		for _, a := range addrs {
			if !a.IsValid() || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || seen[a] {
				t.Errorf("address %s in %v", a, addrs)
			}
			seen[a] = true
		}
	})
}

// BenchmarkAttach is the price of one pod's network, in and out.
func BenchmarkAttach(b *testing.B) {
	n, _ := lab(b)
	if err := n.Configure(cidrs("10.98.0.0/16"), 0); err != nil {
		b.Fatal(err)
	}
	ns := netspacetest.Namespace(b, "pod")
	for b.Loop() {
		if _, err := n.Attach(b.Context(), pod("a"), ns); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := n.Detach(b.Context(), "uid-a", ns); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
