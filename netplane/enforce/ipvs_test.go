package enforce_test

import (
	"log/slog"
	"testing"
	"time"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace"
)

// TestInKernel runs what needs IPVS in a stock kernel.
func TestInKernel(t *testing.T) {
	if vm.Inside() {
		t.Skip("this is the machine")
	}
	t.Parallel()
	vm.Test(t, 4*time.Minute, "^TestKernel", "-rapid.checks=5")
}

// balanced is hosts around a node whose services are in IPVS.
type balanced struct{ *world }

func (w balanced) Services() (s netplane.Services, err error) {
	err = netspace.Do(w.Path[netplanetest.Node], func() error {
		n, err := ipvs.New(ipvs.Config{Log: slog.New(slog.DiscardHandler)})
		if err == nil {
			w.t.Cleanup(func() { n.Close() })
		}
		s = n
		return err
	})
	return s, err
}

// TestKernelRecipes: with services in IPVS, which sends packets on past the hook forward.
func TestKernelRecipes(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			t.Parallel()
			w := balanced{newWorld(t)}
			netplanetest.RunPolicies(t, w, open(t, w.Path[netplanetest.Node]), n)
		})
	}
}

// TestKernelEnded: the same in the stock kernel.
func TestKernelEnded(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	t.Parallel()
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) { ended(t, newWorld(t), n) })
	}
}

// TestKernelCompare: random policies do with IPVS what the plan says.
func TestKernelCompare(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			t.Parallel()
			w := balanced{newWorld(t)}
			netplanetest.ComparePolicies(t, w, open(t, w.Path[netplanetest.Node]), n)
		})
	}
}
