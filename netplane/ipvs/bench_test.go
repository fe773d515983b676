package ipvs_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

// benchmarks names the variable that makes TestBenchInKernel run: its figures are for
// people, and mean something only beside each other.
const benchmarks = "DECREE_BENCH_VM"

// TestBenchInKernel compares both backends in one machine.
func TestBenchInKernel(t *testing.T) {
	if os.Getenv(benchmarks) == "" || vm.Inside() {
		t.Skipf("set %s=1 to compare the backends", benchmarks)
	}
	vm.Test(t, 15*time.Minute, "^TestCompare$")
}

// TestCompare prints medians of rounds that take turns, and the ratio IPVS to
// nftables.
func TestCompare(t *testing.T) {
	inside(t)
	if os.Getenv(benchmarks) == "" {
		t.Skip("TestBenchInKernel runs it")
	}
	backends := map[string]func() (backend, error){
		"nft":  func() (backend, error) { return nft.New("", slog.New(slog.DiscardHandler)) },
		"ipvs": func() (backend, error) { return ipvs.New(ipvs.Config{Log: slog.New(slog.DiscardHandler)}) },
	}
	for _, n := range []int{1000, 10000} {
		took := map[string][]time.Duration{}
		for range 3 {
			for name, make := range backends {
				var b backend
				netspacetest.In(t, netspacetest.Namespace(t, "node"), func() (err error) {
					b, err = make()
					return err
				})
				for what, d := range measure(t, b, n) {
					took[what+" "+name] = append(took[what+" "+name], d)
				}
			}
		}
		for _, what := range []string{"cold", "one change", "read back", "purge"} {
			i, f := median(took[what+" ipvs"]), median(took[what+" nft"])
			fmt.Printf("%6d services, %-10s ipvs %10s nft %10s ratio %.2f\n", n, what, i, f, float64(i)/float64(f))
		}
	}
}

type backend interface {
	netplane.Services
	Close() error
}

func median(ds []time.Duration) time.Duration {
	slices.Sort(ds)
	return ds[len(ds)/2].Round(10 * time.Microsecond)
}

// measure fills a backend, changes it, reads it back and empties it.
func measure(t *testing.T, b backend, n int) map[string]time.Duration {
	took := map[string]time.Duration{}
	timed := func(what string, fn func(context.Context) error) {
		start := time.Now()
		err := fn(t.Context())
		if took[what] = time.Since(start); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	sync := func(tb render.Table) func(context.Context) error {
		return func(ctx context.Context) error { _, err := b.Sync(ctx, tb); return err }
	}
	tb := manyServices(n)
	timed("cold", sync(tb))
	const changes = 20
	start := time.Now()
	for i := range changes {
		u := tb
		u.Services = slices.Clone(tb.Services)
		u.Services[n/2].Endpoints = tb.Services[n/2].Endpoints[:2+i%2]
		timed("one change", sync(u))
	}
	took["one change"] = time.Since(start) / changes
	timed("read back", func(ctx context.Context) error { _, err := b.Read(ctx); return err })
	timed("purge", b.Purge)
	if err := b.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
	return took
}

// manyServices is a table with n services of three endpoints each.
func manyServices(n int) render.Table {
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	t := render.Table{Range: p("10.97.0.0/16"), Cluster: p("10.98.0.0/16"), Pods: p("10.98.0.0/24")}
	for i := range n {
		var eps []netip.AddrPort
		for e := range 3 {
			eps = append(eps, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 98, byte(i / 250), byte(i%80*3 + e)}), 8080))
		}
		t.Services = append(t.Services, render.Service{
			Port:      render.Port{Addr: netip.AddrFrom4([4]byte{10, 97, byte(i / 250), byte(i%250 + 1)}), Proto: render.TCP, Port: 80},
			Endpoints: eps,
		})
	}
	return t
}
