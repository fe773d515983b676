package ipvs

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"decree.dev/decree/netplane/render"
)

// DeleteServer deletes the first server of a service, in the current namespace.
func DeleteServer(p render.Port) error {
	return inKernel(func(k *kernel) error {
		v := &virtual{Port: p}
		if err := k.fill(v); err != nil {
			return err
		}
		return k.do(context.Background(), []command{{delServer, v, v.servers[0]}})
	})
}

// Dump is all that IPVS holds in the current namespace.
func Dump() (string, error) {
	var b strings.Builder
	err := inKernel(func(k *kernel) error {
		t, err := k.timeouts()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "timeouts %d %d %d\n", t[attrTimeoutTCP], t[attrTimeoutTCPFin], t[attrTimeoutUDP])
		vs, err := k.services()
		if err != nil {
			return err
		}
		slices.SortFunc(vs, func(a, b *virtual) int { return cmp.Or(a.Compare(b.Port)) })
		for _, v := range vs {
			if err := k.fill(v); err != nil {
				return err
			}
			fmt.Fprintf(&b, "%s %s %s %v", v.Port, v.scheduler, v.affinity, v.odd)
			for _, s := range v.servers {
				fmt.Fprintf(&b, " %s*%d(%d)", s.addr, s.weight, s.conns)
			}
			b.WriteByte('\n')
		}
		return nil
	})
	return b.String(), err
}

func inKernel(fn func(*kernel) error) error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	defer k.Close()
	return fn(k)
}
