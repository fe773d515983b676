package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

// work is all that one Sync changes in the kernel: what closes or is masqueraded
// first, then IPVS, then what opens.
type work struct {
	cmds []command
	// touched are the marks that may change, as they were.
	touched map[nft.Mark]bool
	// ops are the changes whose UDP flows are to be forgotten.
	ops []diff.Op
}

var (
	// errSettings: which services are outside all ranges has to be looked at anew.
	errSettings = errors.New("settings changed")
	// errScheduler: the kernel lacks one; services are to be given another.
	errScheduler = errors.New("the kernel has no such scheduler")
)

// incremental goes from s.have to want without asking the kernel for more than how
// connections end.
func (s *Services) incremental(ctx context.Context, want render.Table) (int, error) {
	s.known = false // until all is done
	if !slices.Equal(s.have.Range, want.Range) {
		return 0, errSettings
	}
	w := work{touched: map[nft.Mark]bool{}, ops: diff.ServicesBy(s.have.Services, want.Services, same)}
	n := len(w.ops)
	if !s.have.SameConfig(want) {
		n++
		if err := s.guard.Settings(ctx, &s.have, &want); err != nil {
			return n, err
		}
	}
	if err := s.sweep(ctx, &w, &want); err != nil {
		return n, err
	}
	for _, op := range w.ops {
		p := op.Port()
		main, out := s.holding(op.Have, p)
		if _, err := s.change(&w, p, main, out, op.Want, &want); err != nil {
			return n, err
		}
		s.count(&w, op.Have, -1)
		s.count(&w, op.Want, 1)
	}
	if err := s.carryOut(ctx, &w); err != nil {
		return n, err
	}
	s.have = want
	if len(w.ops) > many { // most of what ends at once has never been used
		rest := work{touched: map[nft.Mark]bool{}}
		if err := s.sweepNow(ctx, &rest, &want); err != nil {
			return n, err
		}
		if err := s.carryOut(ctx, &rest); err != nil {
			return n, err
		}
	}
	s.known = true
	return n, s.guard.Forget(w.ops, &want)
}

// same reports whether IPVS holds the same for both.
func same(a, b *render.Service) bool { return a.Scheduler == b.Scheduler && a.Equal(b) }

// holding is what IPVS holds of a service that is known, for all and for clients from
// outside.
func (s *Services) holding(svc *render.Service, p render.Port) (main, out *virtual) {
	main = wanted(svc, s.scheduler)
	if d := s.draining[key{Port: p}]; d != nil {
		main = d.holds
	}
	if mark := s.split.of(p); mark != 0 {
		out = wantedOutside(svc, apart(svc, s.have.Range), s.scheduler, mark)
		if d := s.draining[byMark(mark, p.Addr)]; d != nil {
			out = d.holds
		}
	}
	return main, out
}

// sweep plans the removal of servers whose connections have ended, or that have had
// their time.
func (s *Services) sweep(ctx context.Context, w *work, want *render.Table) error {
	now := s.now()
	if now.Sub(s.swept) < sweepEvery && slices.Equal(s.have.Lost, want.Lost) {
		return nil
	}
	s.swept = now
	return s.sweepNow(ctx, w, want)
}

// many is how many services are looked at one by one, before it is faster to ask which of
// all have ever had a connection.
const many = 64

func (s *Services) sweepNow(ctx context.Context, w *work, want *render.Table) error {
	now, cut := s.now(), cutFor(want)
	idle := map[key]bool{}
	if len(s.draining) > many {
		all, err := s.kernel.services()
		if err != nil {
			return err
		}
		for _, v := range all {
			idle[v.key] = !v.used
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(s.draining), key.compare) {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		d := s.draining[k]
		v := d.holds
		if !idle[k] {
			v = &virtual{key: k, scheduler: d.holds.scheduler, affinity: d.holds.affinity}
			if err := s.kernel.fill(v); err != nil {
				return err
			}
		}
		cmds, left := drained(v, len(d.holds.live()) > 0, func(x server) bool {
			return cut(v, x.addr.Addr()) || now.Sub(d.since[x.addr]) >= s.cfg.Drain
		})
		w.cmds = append(w.cmds, cmds...)
		s.drain(k, left)
		if k.mark == 0 {
			svc, _ := s.have.Find(k.Port)
			s.remark(w, k.Port, marksOf(k.Port, svc, left != nil, s.split.of(k.Port), &s.have))
		}
	}
	return nil
}

// change plans what turns what IPVS holds for a port, for all clients and for those
// from outside, into svc. It returns whether there is anything to do.
func (s *Services) change(w *work, p render.Port, main, out *virtual, svc *render.Service, t *render.Table) (bool, error) {
	mark, outside := s.split.of(p), apart(svc, t.Range)
	switch {
	case len(outside) == 0:
		s.split.clear(p)
	case mark == 0:
		if mark = s.split.free(p.Addr, s.draining); mark == 0 {
			return false, fmt.Errorf("service %s: all %d packet marks are taken", p, maxMarks)
		}
		s.split.set(p, mark)
	}
	cut := cutFor(t)
	cutOut := func(v *virtual, a netip.Addr) bool { return p.Proto == render.UDP || cut(v, a) }
	// First where those from outside go: they must not be led where others are.
	first, leftOut := change(out, wantedOutside(svc, outside, s.scheduler, mark), cutOut)
	then, left := change(main, wanted(svc, s.scheduler), cut)
	w.cmds = append(append(w.cmds, first...), then...)
	if mark != 0 {
		s.drain(byMark(mark, p.Addr), leftOut)
	}
	s.drain(key{Port: p}, left)
	return s.remark(w, p, marksOf(p, svc, left != nil, s.split.of(p), t)) || len(first)+len(then) > 0, nil
}

// drain notes which servers of a service have no weight, and since when.
func (s *Services) drain(k key, holds *virtual) {
	waiting := holds.waiting()
	if len(waiting) == 0 {
		delete(s.draining, k)
		return
	}
	d := &drain{holds: holds, since: make(map[netip.AddrPort]time.Time, len(waiting))}
	for _, addr := range waiting {
		d.since[addr] = s.now()
		if old := s.draining[k]; old != nil {
			if at, ok := old.since[addr]; ok {
				d.since[addr] = at
			}
		}
	}
	s.draining[k] = d
}

// carryOut does what w says.
func (s *Services) carryOut(ctx context.Context, w *work) error {
	var early, mark, unmark []nft.Mark
	for m, was := range w.touched {
		switch is := s.marks[m.Port][m]; {
		case is && !was:
			mark = append(mark, m)
		case was && !is && s.early(m):
			early = append(early, m)
		case was && !is:
			unmark = append(unmark, m)
		}
	}
	if err := s.guard.Mark(ctx, early, mark); err != nil {
		return err
	}
	start := time.Now()
	if err := s.kernel.do(ctx, w.cmds); err != nil {
		return fmt.Errorf("IPVS: %w", s.withoutScheduler(err))
	}
	s.log.Debug("IPVS changed", "commands", len(w.cmds), "took", time.Since(start))
	return s.guard.Mark(ctx, unmark, nil)
}

// withoutScheduler notes which scheduler the kernel does not have, if that is what an error
// says, and makes it one that matches errScheduler.
func (s *Services) withoutScheduler(err error) error {
	var refused *refusal
	if !errors.As(err, &refused) || refused.cmd.verb > setService || !errors.Is(err, unix.ENOENT) {
		return err
	}
	name := refused.cmd.service.scheduler
	if name == DefaultScheduler || s.missing[name] {
		return err
	}
	s.missing[name] = true
	s.log.Warn("the kernel has no such scheduler; services that ask for it get the usual one", "scheduler", name, "instead", DefaultScheduler)
	return fmt.Errorf("%w: %w", errScheduler, err)
}

// full reads what the kernel holds and goes from there to want.
func (s *Services) full(ctx context.Context, want render.Table) (int, error) {
	s.known = false
	h, err := s.read(ctx, &want)
	if err != nil {
		return 0, err
	}
	n, err := s.guard.Make(&want)
	if err != nil {
		return n, err
	}
	mended, err := s.settings.keep(ctx, s.guard, s.kernel, h.guard.Before)
	if err != nil {
		return n, err
	}
	if mended || !h.guard.Settings.SameConfig(want) {
		n++
	}
	if err := s.guard.Settings(ctx, &h.guard.Settings, &want); err != nil {
		return n, err
	}
	if err := s.steer.make(&want); err != nil {
		return n, err
	}
	w, changed, err := s.compare(h, &want)
	if err != nil {
		return n, err
	}
	if n += changed; n == 0 && len(w.touched) > 0 {
		n = 1
	}
	if err := s.carryOut(ctx, w); err != nil {
		return n, err
	}
	s.have, s.known = want, true
	return n, s.guard.Forget(w.ops, &want)
}

// compare plans for every service that there is or shall be, and returns how many
// change. It makes s know what h says.
func (s *Services) compare(h *held, want *render.Table) (w *work, changed int, err error) {
	w = &work{touched: map[nft.Mark]bool{}}
	s.marks, s.split, s.reach = map[render.Port]map[nft.Mark]bool{}, newSplits(), map[netip.Addr]int{}
	for p, of := range h.marks {
		s.marks[p] = maps.Clone(of)
		for m := range of {
			if m.Set == nft.Split {
				s.split.set(p, m.Value)
			}
		}
	}
	if s.draining == nil {
		s.draining = map[key]*drain{}
	}
	maps.DeleteFunc(s.draining, func(k key, _ *drain) bool { return h.services[k] == nil })
	s.orphans(w, h, want)
	others := h.ports()
	for i := range want.Services {
		svc := &want.Services[i]
		delete(others, svc.Port)
		changed += s.compareOne(w, h, svc.Port, svc, want, &err)
		s.count(w, svc, 1)
	}
	for _, p := range slices.SortedFunc(maps.Keys(others), render.Port.Compare) {
		changed += s.compareOne(w, h, p, nil, want, &err)
	}
	for m := range h.marks[render.Port{}] {
		if m.Set == nft.Hairpin && s.reach[m.Addr] == 0 {
			s.turn(w, m, false)
		}
	}
	return w, changed, err
}

// compareOne plans for one service, and returns 1 if it changes.
func (s *Services) compareOne(w *work, h *held, p render.Port, svc *render.Service, want *render.Table, err *error) int {
	main, out := h.of(p)
	changed, failed := s.change(w, p, main, out, svc, want)
	if *err == nil {
		*err = failed
	}
	if !changed {
		return 0
	}
	op := diff.Op{Want: svc}
	if old, ok := h.service(p); ok || main != nil || svc == nil {
		op.Have = &old
	}
	w.ops = append(w.ops, op)
	return 1
}

// orphans retires services of packet marks that no port has any more.
func (s *Services) orphans(w *work, h *held, want *render.Table) {
	for _, k := range slices.SortedFunc(maps.Keys(h.services), key.compare) {
		if _, used := s.split.ports[k]; k.mark != 0 && !used {
			cmds, left := change(h.services[k], nil, cutFor(want))
			w.cmds = append(w.cmds, cmds...)
			s.drain(k, left)
		}
	}
}
