// Package netbench measures the service tables of a node, in network namespaces of its
// own: how long it takes to program them, what changes cost, and what a connection through
// a service costs over a direct one. Nothing of it is part of what a cluster does.
//
// The peer is nft, which loads tables with a chain for each service, and with one for each
// endpoint too, as is usual elsewhere. (It cannot load what it lists of Decree's tables.)
package netbench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/nft"
)

// Config says what to measure.
type Config struct {
	// Backends that are measured, one after the other at each size.
	Backends []netplane.Backend
	// Services are the sizes; each service has one to Endpoints endpoints.
	Services  []int
	Endpoints int
	// Runs is how often tables are made from nothing, Changes how many single changes
	// are made, Churn how long one in a hundred services changes each second, Connects
	// how many connections are made each way.
	Runs, Changes, Connects int
	Churn                   time.Duration
	// PeerServices is the largest size at which the peer is measured too; it takes minutes
	// where Decree takes a second.
	PeerServices int
	// Say is told of each measurement.
	Say func(Sample)
}

// Sample is what one measurement gave. Times are in the unit named.
type Sample struct {
	Backend  string  `json:"backend"`
	Services int     `json:"services"`
	What     string  `json:"what"`
	Unit     string  `json:"unit"`
	P50      float64 `json:"p50"`
	P99      float64 `json:"p99,omitempty"`
	Max      float64 `json:"max,omitempty"`
	Count    int     `json:"count"`
	Note     string  `json:"note,omitempty"`
}

// String is what was measured and what that gave.
func (s Sample) String() string {
	out := fmt.Sprintf("%-46s %10.4g", s.What, s.P50)
	if s.Max > 0 {
		out += fmt.Sprintf("  p99 %10.4g  max %10.4g", s.P99, s.Max)
	}
	out += " " + s.Unit
	if s.Note != "" {
		out += " (" + s.Note + ")"
	}
	return out
}

// tables are the service tables of one backend.
type tables interface {
	netplane.Services
	Close() error
}

// open opens a backend in a network namespace.
func open(b netplane.Backend, ns string) (s tables, err error) {
	quiet := slog.New(slog.DiscardHandler)
	err = netspace.Do(ns, func() error {
		switch b {
		case netplane.IPVS:
			v, err := ipvs.New(ipvs.Config{Log: quiet})
			if errors.Is(err, ipvs.ErrMissing) {
				return fmt.Errorf("%w: measure the other backend, or boot a kernel that has it", err)
			}
			s = v
			return err
		case netplane.NFTables:
			n, err := nft.New("", quiet)
			s = n
			return err
		}
		return fmt.Errorf("backend %q: want %q or %q", b, netplane.IPVS, netplane.NFTables)
	})
	return s, err
}

// Run measures all that cfg asks for. It needs root, for network namespaces.
func Run(ctx context.Context, cfg Config) error {
	dir, err := os.MkdirTemp("", "decree-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, n := range cfg.Services {
		for _, b := range cfg.Backends {
			m := &measurement{cfg: &cfg, backend: b, n: n, dir: dir, table: makeTable(n, cfg.Endpoints)}
			if err := m.run(ctx); err != nil {
				return fmt.Errorf("%s, %d services: %w", b, n, err)
			}
		}
		if n <= cfg.PeerServices {
			if err := peer(ctx, &cfg, dir, n); err != nil {
				return fmt.Errorf("nft, %d services: %w", n, err)
			}
		}
	}
	return nil
}

// namespace makes a network namespace and returns it with what removes it.
func namespace(dir, name string) (string, func() error, error) {
	path := filepath.Join(dir, name)
	if err := netspace.Create(path); err != nil {
		return "", nil, err
	}
	return path, func() error { return netspace.Remove(path) }, nil
}

// summary makes a sample of values.
func summary(what, unit string, values []float64) Sample {
	s := slices.Sorted(slices.Values(values))
	at := func(q float64) float64 { return s[int(math.Ceil(q*float64(len(s))))-1] }
	out := Sample{What: what, Unit: unit, P50: at(0.5), Count: len(s)}
	if len(s) > 3 {
		out.P99, out.Max = at(0.99), s[len(s)-1]
	}
	return out
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
