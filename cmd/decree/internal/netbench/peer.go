package netbench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/render"
)

// peer measures nft, if there is one.
func peer(ctx context.Context, cfg *Config, dir string, n int) error {
	if _, err := exec.LookPath("nft"); err != nil {
		cfg.Say(Sample{Backend: "nft -f", Services: n, What: "cold", Unit: "ms", Note: "left out: there is no nft"})
		return nil
	}
	table := makeTable(n, cfg.Endpoints)
	for _, p := range []struct {
		what  string
		rules func(io.Writer, *render.Table)
	}{{"cold, a chain for each service", serviceChains}, {"cold, a chain for each endpoint too", endpointChains}} {
		path := filepath.Join(dir, "rules.nft")
		if err := write(path, &table, p.rules); err != nil {
			return err
		}
		took, err := load(ctx, dir, path)
		if err != nil {
			return err
		}
		cfg.Say(Sample{Backend: "nft -f", Services: n, What: p.what, Unit: "ms", P50: milliseconds(took), Count: 1})
	}
	return nil
}

// load has nft load a file in a network namespace of its own.
func load(ctx context.Context, dir, path string) (took time.Duration, err error) {
	ns, remove, err := namespace(dir, "peer")
	if err != nil {
		return 0, err
	}
	defer remove()
	err = netspace.Do(ns, func() error {
		start := time.Now()
		out, err := exec.CommandContext(ctx, "nft", "-f", path).CombinedOutput()
		took = time.Since(start)
		if err != nil {
			err = fmt.Errorf("nft -f: %w: %.200s", err, out)
		}
		return err
	})
	return took, err
}

// write writes a file of rules.
func write(path string, t *render.Table, rules func(io.Writer, *render.Table)) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	fmt.Fprintln(w, "table ip usual {")
	rules(w, t)
	fmt.Fprintln(w, "map services { type ipv4_addr . inet_proto . inet_service : verdict; elements = {")
	for i := range t.Services {
		p := t.Services[i].Port
		fmt.Fprintf(w, " %s . %s . %d : goto s_%d,\n", p.Addr, p.Proto, p.Port, i)
	}
	fmt.Fprintln(w, "} }\nchain prerouting { type nat hook prerouting priority dstnat; ip daddr . meta l4proto . th dport vmap @services\n}\n}")
	return errors.Join(w.Flush(), f.Close())
}

// endpointChains are a chain for each service, which draws one of the chains of its
// endpoints.
func endpointChains(w io.Writer, t *render.Table) {
	for i := range t.Services {
		s := &t.Services[i]
		for j, ep := range s.Endpoints {
			fmt.Fprintf(w, "chain e_%d_%d {\n ip saddr %s meta mark set meta mark or 0x4000\n meta l4proto tcp dnat to %s\n}\n", i, j, ep.Addr(), ep)
		}
		fmt.Fprintf(w, "chain s_%d {\n numgen random mod %d vmap {", i, len(s.Endpoints))
		for j := range s.Endpoints {
			fmt.Fprintf(w, " %d : goto e_%d_%d,", j, i, j)
		}
		fmt.Fprintln(w, " }\n}")
	}
}

// serviceChains are a chain for each service, with its endpoints in a map of its rule.
func serviceChains(w io.Writer, t *render.Table) {
	for i := range t.Services {
		s := &t.Services[i]
		fmt.Fprintf(w, "chain s_%d {\n meta l4proto tcp dnat ip to numgen random mod %d map {", i, len(s.Endpoints))
		for j, ep := range s.Endpoints {
			fmt.Fprintf(w, " %d : %s . %d,", j, ep.Addr(), ep.Port())
		}
		fmt.Fprintln(w, " }\n}")
	}
}
