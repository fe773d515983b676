package nft_test

import (
	"log/slog"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

func openGuard(t *testing.T, ns string) *nft.Guard {
	t.Helper()
	var g *nft.Guard
	netspacetest.In(t, ns, func() (err error) {
		g, err = nft.NewGuard("guard", slog.New(slog.DiscardHandler))
		return err
	})
	t.Cleanup(func() { g.Close() })
	return g
}

// TestGuard: what is written is read back, by another process too, survives no
// damage but for the notes, and can be listed.
func TestGuard(t *testing.T) {
	ns := netspacetest.Namespace(t, "node")
	g := openGuard(t, ns)
	var want nft.GuardState
	want.Marks, want.Before, want.Salvaged = map[nft.Mark]bool{}, map[uint32]uint32{1: 900, 7: 0}, map[nft.Mark]bool{}
	var marks []nft.Mark
	for _, n := range netplanetest.Nets {
		s := &want.Settings
		s.Range, s.Cluster, s.Pods = append(s.Range, n.Range), append(s.Cluster, n.Cluster), append(s.Pods, n.Pods)
		p := render.Port{Addr: n.Service(1), Proto: render.TCP, Port: 80}
		s.Local = append(s.Local, p)
		marks = append(marks, nft.Mark{Set: nft.Closed, Port: p}, nft.Mark{Set: nft.Draining, Port: p}, nft.Mark{Set: nft.Outside, Port: p}, nft.Mark{Set: nft.Dropped, Port: p},
			nft.Mark{Set: nft.Undelivered, Port: p}, nft.Mark{Set: nft.Guarded, Port: p}, nft.Mark{Set: nft.Allowed, Port: p, Source: n.Pods}, nft.Mark{Set: nft.Allowed, Port: p, Source: n.Range},
			nft.Mark{Set: nft.Split, Port: p, Value: 0x12000}, nft.Mark{Set: nft.Hairpin, Addr: n.Addr[netplanetest.Pod1]})
		s.Announced, s.Near = append(s.Announced, n.Announced), append(s.Near, n.Addr[netplanetest.Pod2])
	}
	for _, m := range marks {
		want.Marks[m] = true
	}
	check := func(want nft.GuardState) {
		t.Helper()
		g = openGuard(t, ns)
		got, err := g.Read(t.Context())
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%v; read\n%+v, want\n%+v", err, got, want)
		}
	}
	empty := nft.GuardState{Marks: map[nft.Mark]bool{}, Before: map[uint32]uint32{}, Salvaged: map[nft.Mark]bool{}}
	check(empty)
	fill := func() {
		t.Helper()
		if n, err := g.Make(&want.Settings); n != 2 || err != nil {
			t.Fatalf("%d tables made, %v", n, err)
		}
		if err := g.Note(t.Context(), want.Before); err != nil {
			t.Fatal(err)
		}
		if err := g.Settings(t.Context(), &render.Table{}, &want.Settings); err != nil {
			t.Fatal(err)
		}
		if err := g.Mark(t.Context(), nil, marks); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	check(want)
	listed := list(t, ns)
	for _, s := range []string{"table ip guard", "table ip6 guard", "ct state", "0x00004000"} {
		if !strings.Contains(listed, s) {
			t.Errorf("%q is not in the listing\n%s", s, listed)
		}
	}
	netspacetest.In(t, ns, func() error {
		return exec.Command("sh", "-c", "nft flush chain ip guard refuse; nft flush chain ip6 guard refuse").Run()
	})
	damaged := empty
	damaged.Before = want.Before
	damaged.Salvaged = map[nft.Mark]bool{}
	for _, m := range marks {
		if m.Set == nft.Closed || m.Set == nft.Draining || m.Set == nft.Outside {
			damaged.Salvaged[m] = true
		}
	}
	check(damaged)
	if g.Undisturbed(&want.Settings) {
		t.Error("damage is not seen")
	}
	fill()
	if err := g.Mark(t.Context(), marks, nil); err != nil {
		t.Fatal(err)
	}
	if err := g.Settings(t.Context(), &want.Settings, &render.Table{}); err != nil {
		t.Fatal(err)
	}
	empty.Before = want.Before
	check(empty)
	for range 2 {
		if err := g.Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if listed := list(t, ns); listed != "" {
		t.Errorf("left behind:\n%s", listed)
	}
}

func list(t *testing.T, ns string) string {
	t.Helper()
	var out []byte
	netspacetest.In(t, ns, func() (err error) {
		out, err = exec.Command("nft", "list", "ruleset").CombinedOutput()
		return err
	})
	return string(out)
}

func TestProbeGuard(t *testing.T) {
	ns := netspacetest.Namespace(t, "node")
	if err := netspace.Do(ns, nft.ProbeGuard); err != nil {
		t.Fatal(err)
	}
	if listed := list(t, ns); listed != "" {
		t.Errorf("left behind:\n%s", listed)
	}
}
