package ipvs

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/render"
)

// DeleteServer deletes the first endpoint of a service that gets connections, in the
// current namespace.
func DeleteServer(p render.Port) error {
	return inKernel(func(k *kernel) error {
		v := &virtual{key: key{Port: p}}
		if err := k.fill(v); err != nil {
			return err
		}
		return k.do(context.Background(), []command{{delServer, v, server{addr: v.live()[0]}}})
	})
}

// Make makes a service with one server of some weight, in the current namespace.
func Make(p render.Port, scheduler string, ep netip.AddrPort, weight uint32) error {
	v := &virtual{key: key{Port: p}, scheduler: scheduler}
	return send(command{verb: newService, service: v}, command{newServer, v, server{addr: ep, weight: weight}})
}

// Weigh changes the weight of the first server of a service.
func Weigh(p render.Port, weight uint32) error {
	v := &virtual{key: key{Port: p}}
	if err := inKernel(func(k *kernel) error { return k.fill(v) }); err != nil {
		return err
	}
	return send(command{setServer, v, server{addr: v.servers[0].addr, weight: weight}})
}

// Reschedule changes the scheduler of a service.
func Reschedule(p render.Port, scheduler string) error {
	return send(command{verb: setService, service: &virtual{key: key{Port: p}, scheduler: scheduler}})
}

// Timeout changes the timeout of TCP connections, in seconds.
func Timeout(seconds uint32) error {
	return inKernel(func(k *kernel) error { return k.setTimeouts(map[uint16]uint32{attrTimeoutTCP: seconds}) })
}

// RemoveMany asks to remove services, in one go.
func RemoveMany(ports []render.Port) error {
	var cmds []command
	for _, p := range ports {
		cmds = append(cmds, command{verb: delService, service: &virtual{key: key{Port: p}}})
	}
	return send(cmds...)
}

func send(cmds ...command) error {
	return inKernel(func(k *kernel) error { return k.do(context.Background(), cmds) })
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
		s, err := openSteer()
		if err != nil {
			return err
		}
		defer s.close()
		for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
			rules, routes, err := s.have(f)
			if err != nil {
				return err
			}
			for range rules {
				fmt.Fprintf(&b, "rule %d\n", f)
			}
			for range routes {
				fmt.Fprintf(&b, "route %d\n", f)
			}
		}
		vs, err := k.services()
		if err != nil {
			return err
		}
		slices.SortFunc(vs, func(a, b *virtual) int { return a.key.compare(b.key) })
		for _, v := range vs {
			if err := k.fill(v); err != nil {
				return err
			}
			fmt.Fprintf(&b, "%s %s %s %v", v.key, v.scheduler, v.affinity, v.odd)
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
