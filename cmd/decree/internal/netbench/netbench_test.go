package netbench

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netplanetest/vm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// benchmarks names the variable that makes TestInKernel run, with numbers of services and
// commas between them: its figures are for people, and mean something only beside each other.
const benchmarks = "DECREE_BENCH_VM"

// TestInKernel compares both backends in a stock kernel, in an emulated machine: of its
// figures only ratios mean something.
func TestInKernel(t *testing.T) {
	if os.Getenv(benchmarks) == "" || vm.Inside() {
		t.Skipf("set %s=500,2000 to compare the backends with as many services", benchmarks)
	}
	vm.Test(t, 60*time.Minute, "^TestBothBackends$", "-test.timeout=60m")
}

func TestBothBackends(t *testing.T) {
	if !vm.Inside() || os.Getenv(benchmarks) == "" {
		t.Skip("TestInKernel runs it")
	}
	var sizes []int
	for text := range strings.SplitSeq(os.Getenv(benchmarks), ",") {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("%s: %v", benchmarks, err)
		}
		sizes = append(sizes, n)
	}
	err := Run(t.Context(), Config{
		Backends: []netplane.Backend{netplane.NFTables, netplane.IPVS}, Services: sizes, Endpoints: 50,
		Runs: 3, Changes: 100, Connects: 500, Churn: 10 * time.Second,
		Say: func(s Sample) { fmt.Printf("%-9s %6d services  %s\n", s.Backend, s.Services, s) },
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRun: all is measured, at every size, and nothing is left.
func TestRun(t *testing.T) {
	var got []Sample
	cfg := Config{
		Backends: []netplane.Backend{netplane.NFTables}, Services: []int{20, 40}, Endpoints: 5, Runs: 1, Changes: 5, Connects: 5,
		Churn: 200 * time.Millisecond, PeerServices: 20, Say: func(s Sample) { got = append(got, s) },
	}
	if err := Run(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	for _, n := range cfg.Services {
		for _, what := range []string{"cold", "one change, an endpoint replaced", "one change, an endpoint more", "1% a second, each of 10 changes", "connect directly", "connect through a service"} {
			i := slices.IndexFunc(got, func(s Sample) bool { return s.Services == n && s.Backend == "nftables" && s.What == what })
			if i < 0 || got[i].P50 <= 0 {
				t.Errorf("%d services, %s: not in %v", n, what, got)
			}
		}
	}
	peers := slices.DeleteFunc(slices.Clone(got), func(s Sample) bool { return s.Backend != "nft -f" })
	if len(peers) == 0 || slices.ContainsFunc(peers, func(s Sample) bool { return s.Services != 20 || s.P50 <= 0 && s.Note == "" }) {
		t.Errorf("of the peer: %v", peers)
	}
}

// TestWithout: a kernel without IPVS is said to be one.
func TestWithout(t *testing.T) {
	if _, err := os.Stat("/proc/net/ip_vs"); err == nil {
		t.Skip("this kernel has IPVS")
	}
	err := Run(t.Context(), Config{Backends: []netplane.Backend{netplane.IPVS}, Services: []int{1}, Endpoints: 1, Runs: 1})
	if err == nil || !strings.Contains(err.Error(), "no IPVS") {
		t.Errorf("%v", err)
	}
}
