package enforce_test

import (
	"flag"
	"log/slog"
	"testing"

	"go.uber.org/goleak"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/enforce"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/nft"
)

func TestMain(m *testing.M) {
	// Each case waits for what is dropped: fewer than usual, unless told otherwise.
	if err := flag.Set("rapid.checks", "40"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, ns string) *enforce.Policies {
	t.Helper()
	var p *enforce.Policies
	netspacetest.In(t, ns, func() (err error) {
		p, err = enforce.New("", slog.New(slog.DiscardHandler))
		return err
	})
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// world is hosts around a node whose services are in nftables.
type world struct {
	*netplanetest.Lab
	t testing.TB
}

func newWorld(t testing.TB) *world {
	return &world{netplanetest.NewLab(t), t}
}

func (w *world) Services() (s netplane.Services, err error) {
	err = netspace.Do(w.Path[netplanetest.Node], func() error {
		n, err := nft.New("", slog.New(slog.DiscardHandler))
		if err == nil {
			w.t.Cleanup(func() { n.Close() })
		}
		s = n
		return err
	})
	return s, err
}

// TestRecipes: with services in nftables.
func TestRecipes(t *testing.T) {
	t.Parallel()
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			t.Parallel() // they wait for what does not come
			w := newWorld(t)
			netplanetest.RunPolicies(t, w, open(t, w.Path[netplanetest.Node]), n)
		})
	}
}

// TestCompare: random policies do in the kernel what the plan says.
func TestCompare(t *testing.T) {
	t.Parallel()
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			t.Parallel() // they wait for what does not come
			w := newWorld(t)
			netplanetest.ComparePolicies(t, w, open(t, w.Path[netplanetest.Node]), n)
		})
	}
}
