package ipvs_test

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/render"
	"decree.dev/decree/schemas/api"
)

// TestKernelSchedulers: a service gets the scheduler that it asks for, while it has
// connections too; with each of them clients leave an endpoint that drains. One that the
// kernel does not have costs nobody anything.
func TestKernelSchedulers(t *testing.T) {
	stages(t, ipvs.Config{}, func(st *stage) {
		for _, name := range slices.Concat(api.Schedulers, []string{""}) {
			tb := st.table(netplanetest.Pods...)
			tb.Services[0].Scheduler = name
			st.sync(tb)
			if got := st.dump(); !strings.Contains(got, st.port().String()+" "+cmp.Or(name, ipvs.DefaultScheduler)+" ") {
				st.t.Errorf("%s is not in\n%s", name, got)
			}
			st.leave(tb)
		}
		tb := st.table(netplanetest.Pods...)
		other := tb.Services[0]
		other.Port.Port++
		tb.Services = append(tb.Services, other)
		tb.Services[0].Scheduler = "dice"
		for range 2 { // in a process that knows what there is, and in a new one
			st.sync(tb)
			for _, svc := range tb.Services {
				if got := st.dump(); !strings.Contains(got, svc.Port.String()+" rr") {
					st.t.Errorf("%s has no usual scheduler:\n%s", svc.Port, got)
				}
				if who, err := dial(st.t, st.Path[netplanetest.Outside], svc.Port).say("hello"); err != nil {
					st.t.Errorf("%s: %q, %v", svc.Port, who, err)
				}
			}
			st.s = open(st.t, st.node(), ipvs.Config{})
		}
	})
	if _, err := ipvs.New(ipvs.Config{Scheduler: "dice"}); err == nil || !strings.Contains(err.Error(), "dice") {
		t.Errorf("an unknown scheduler: %v", err)
	}
}

// leave takes the endpoint of a client that is connected away, which leads the client's next
// connections elsewhere; and the endpoint comes back.
func (st *stage) leave(tb render.Table) {
	st.t.Helper()
	k := dial(st.t, st.Path[netplanetest.Outside], st.port())
	defer k.c.Close()
	first, err := k.say("before")
	if err != nil {
		st.t.Fatal(err)
	}
	fewer := tb
	fewer.Services = slices.Clone(tb.Services)
	fewer.Services[0].Endpoints = slices.DeleteFunc(slices.Clone(tb.Services[0].Endpoints), func(ep netip.AddrPort) bool { return ep.String() == first })
	st.sync(fewer)
	for range 3 {
		next := dial(st.t, st.Path[netplanetest.Outside], st.port())
		if who, err := next.say("next"); err != nil || who == first {
			st.t.Errorf("%s, while %s drains: %q, %v", tb.Services[0].Scheduler, first, who, err)
		}
		next.c.Close()
	}
	if who, err := k.say("after"); err != nil || who != first {
		st.t.Errorf("%s: %q, %v; was %q", tb.Services[0].Scheduler, who, err, first)
	}
}
