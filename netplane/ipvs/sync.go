package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

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

// errSettings: which services are outside all ranges, and which pods are here, has to
// be looked at anew.
var errSettings = errors.New("settings changed")

// incremental goes from s.have to want without asking the kernel for more than how
// connections end.
func (s *Services) incremental(ctx context.Context, want render.Table) (int, error) {
	s.known = false // until all is done
	if !slices.Equal(s.have.Range, want.Range) || !slices.Equal(s.have.Pods, want.Pods) {
		return 0, errSettings
	}
	w := work{touched: map[nft.Mark]bool{}, ops: diff.Services(s.have.Services, want.Services)}
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
		s.count(&w, op.Have, -1, &want)
		s.count(&w, op.Want, 1, &want)
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
	return n, s.guard.Forget(w.ops, want.Range)
}

// holding is what IPVS holds of a service that is known, for all and for clients from
// outside.
func (s *Services) holding(svc *render.Service, p render.Port) (main, out *virtual) {
	main = wanted(svc, s.cfg.Scheduler)
	if d := s.draining[key{Port: p}]; d != nil {
		main = d.holds
	}
	if mark := s.split[p]; mark != 0 {
		out = wantedOutside(svc, s.cfg.Scheduler, mark)
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
			s.remark(w, k.Port, marksOf(k.Port, svc, left != nil, s.split[k.Port], &s.have))
		}
	}
	return nil
}

// change plans what turns what IPVS holds for a port, for all clients and for those
// from outside, into svc. It returns whether there is anything to do.
func (s *Services) change(w *work, p render.Port, main, out *virtual, svc *render.Service, t *render.Table) (bool, error) {
	mark := s.split[p]
	if svc != nil && svc.Split && len(svc.Outside) > 0 {
		if mark == 0 {
			if mark = s.freeMark(p.Addr); mark == 0 {
				return false, fmt.Errorf("service %s: all %d packet marks are taken", p, maxMarks)
			}
		}
		s.split[p] = mark
	} else {
		delete(s.split, p)
	}
	cut := cutFor(t)
	cutOut := func(v *virtual, a netip.Addr) bool { return p.Proto == render.UDP || cut(v, a) }
	// First where those from outside go: they must not be led where others are.
	first, leftOut := change(out, wantedOutside(svc, s.cfg.Scheduler, mark), cutOut)
	then, left := change(main, wanted(svc, s.cfg.Scheduler), cut)
	w.cmds = append(append(w.cmds, first...), then...)
	if mark != 0 {
		s.drain(byMark(mark, p.Addr), leftOut)
	}
	s.drain(key{Port: p}, left)
	return s.remark(w, p, marksOf(p, svc, left != nil, s.split[p], t)) || len(first)+len(then) > 0, nil
}

// maxMarks is how many services may lead clients from outside elsewhere, in a family.
const maxMarks = 1<<16 - 1

// markOf is the packet mark with a number: the high half of it, with the bit that says
// that the packet comes from outside.
func markOf(n uint32) uint32 { return n<<16 | nft.FarBit }

// isMark reports whether a mark is one that markOf makes.
func isMark(mark uint32) bool { return mark>>16 != 0 && mark&0xffff == nft.FarBit }

// freeMark returns a mark that no service of a family has, and none that drains; zero
// if there is none.
func (s *Services) freeMark(family netip.Addr) uint32 {
	taken := map[uint32]bool{}
	for p, mark := range s.split {
		taken[mark] = taken[mark] || p.Addr.Is4() == family.Is4()
	}
	for n := uint32(1); n <= maxMarks; n++ {
		if mark := markOf(n); !taken[mark] && s.draining[byMark(mark, family)] == nil {
			return mark
		}
	}
	return 0
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

// marksOf are the marks of a port with a service, or without one if svc is nil. held:
// IPVS has it. split is the packet mark of clients from outside that are led elsewhere.
func marksOf(p render.Port, svc *render.Service, held bool, split uint32, t *render.Table) map[nft.Mark]bool {
	m := map[nft.Mark]bool{}
	if held && (svc == nil || len(svc.Endpoints) == 0) {
		m[nft.Mark{Set: nft.Draining, Port: p}] = true
	}
	if svc == nil {
		return m
	}
	if !contains(t.Range, p.Addr) && (len(svc.Endpoints) > 0 || svc.Drop) {
		m[nft.Mark{Set: nft.Outside, Port: p}] = true
	}
	switch {
	case len(svc.Endpoints) == 0 && svc.Drop:
		m[nft.Mark{Set: nft.Dropped, Port: p}] = true
	case len(svc.Endpoints) == 0:
		m[nft.Mark{Set: nft.Closed, Port: p}] = true
	case svc.Split && len(svc.Outside) == 0:
		m[nft.Mark{Set: nft.Undelivered, Port: p}] = true
	case svc.Split:
		m[nft.Mark{Set: nft.Split, Port: p, Value: split}] = true
	}
	if len(svc.Sources) > 0 {
		m[nft.Mark{Set: nft.Guarded, Port: p}] = true
	}
	for _, src := range svc.Sources {
		m[nft.Mark{Set: nft.Allowed, Port: p, Source: src}] = true
	}
	return m
}

// remark makes these the marks of a port, and returns whether that changes any.
func (s *Services) remark(w *work, p render.Port, want map[nft.Mark]bool) bool {
	changed := false
	for m := range s.marks[p] {
		if !want[m] {
			changed = s.turn(w, m, false) || changed
		}
	}
	for m := range want {
		changed = s.turn(w, m, true) || changed
	}
	return changed
}

// turn sets or clears a mark; hairpins are under the zero port.
func (s *Services) turn(w *work, m nft.Mark, on bool) bool {
	of := s.marks[m.Port]
	was := of[m]
	if on == was {
		return false
	}
	if _, ok := w.touched[m]; !ok {
		w.touched[m] = was
	}
	switch {
	case !on:
		if delete(of, m); len(of) == 0 {
			delete(s.marks, m.Port)
		}
	case of == nil:
		s.marks[m.Port] = map[nft.Mark]bool{m: true}
	default:
		of[m] = true
	}
	return true
}

// count counts the services that go to each pod of this node: those are the pods that
// may reach themselves.
func (s *Services) count(w *work, svc *render.Service, by int, t *render.Table) {
	if svc == nil {
		return
	}
	for _, eps := range [][]netip.AddrPort{svc.Endpoints, svc.Outside} {
		for _, ep := range eps {
			a := ep.Addr()
			if !contains(t.Pods, a) {
				continue
			}
			if s.reach[a] += by; s.reach[a] == 0 {
				delete(s.reach, a)
			}
			s.turn(w, nft.Mark{Set: nft.Hairpin, Addr: a}, s.reach[a] > 0)
		}
	}
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
		return fmt.Errorf("IPVS: %w", err)
	}
	s.log.Debug("IPVS changed", "commands", len(w.cmds), "took", time.Since(start))
	return s.guard.Mark(ctx, unmark, nil)
}

// early reports whether a mark goes before IPVS changes: where packets would find a
// service that is ended, and where what comes in its place must not overlap with it.
func (s *Services) early(m nft.Mark) bool {
	return m.Set == nft.Split || m.Set == nft.Allowed && s.marks[m.Port][nft.Mark{Set: nft.Guarded, Port: m.Port}]
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
	return n, s.guard.Forget(w.ops, want.Range)
}

// compare plans for every service that there is or shall be, and returns how many
// change. It makes s know what h says.
func (s *Services) compare(h *held, want *render.Table) (w *work, changed int, err error) {
	w = &work{touched: map[nft.Mark]bool{}}
	s.marks, s.split, s.reach = map[render.Port]map[nft.Mark]bool{}, map[render.Port]uint32{}, map[netip.Addr]int{}
	for p, of := range h.marks {
		s.marks[p] = maps.Clone(of)
		for m := range of {
			if m.Set == nft.Split {
				s.split[p] = m.Value
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
		s.count(w, svc, 1, want)
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
	used := map[key]bool{}
	for p, mark := range s.split {
		used[byMark(mark, p.Addr)] = true
	}
	for _, k := range slices.SortedFunc(maps.Keys(h.services), key.compare) {
		if k.mark != 0 && !used[k] {
			cmds, left := change(h.services[k], nil, cutFor(want))
			w.cmds = append(w.cmds, cmds...)
			s.drain(k, left)
		}
	}
}

// held is what the kernel holds of us.
type held struct {
	guard nft.GuardState
	// marks are those of guard by port; hairpins are under the zero port.
	marks    map[render.Port]map[nft.Mark]bool
	services map[key]*virtual
}

// ports are the ports of all services that are held or marked.
func (h *held) ports() map[render.Port]bool {
	ports := map[render.Port]bool{}
	for k := range h.services {
		if k.mark == 0 {
			ports[k.Port] = true
		}
	}
	for p := range h.marks {
		if p != (render.Port{}) {
			ports[p] = true
		}
	}
	return ports
}

// of is what is held for a port, for all and for clients from outside.
func (h *held) of(p render.Port) (main, out *virtual) {
	for m := range h.marks[p] {
		if m.Set == nft.Split {
			out = h.services[byMark(m.Value, p.Addr)]
		}
	}
	return h.services[key{Port: p}], out
}

// service is what a packet to a port finds, as a table says it.
func (h *held) service(p render.Port) (render.Service, bool) {
	svc := render.Service{Port: p}
	main, out := h.of(p)
	known := false
	for m := range h.marks[p] {
		switch m.Set {
		case nft.Closed, nft.Dropped:
			return render.Service{Port: p, Drop: m.Set == nft.Dropped}, true
		case nft.Split, nft.Undelivered:
			svc.Split = true
		case nft.Allowed:
			svc.Sources = append(svc.Sources, m.Source)
		}
	}
	slices.SortFunc(svc.Sources, netip.Prefix.Compare)
	if svc.Endpoints = main.live(); len(svc.Endpoints) > 0 {
		known, svc.Affinity, svc.Outside = true, main.affinity, out.live()
	}
	return svc, known
}

// read reads what the kernel holds of us: what is marked, what is in a range of
// services, what t has, and what is found by marks such as ours. Other services of IPVS
// are somebody else's.
func (s *Services) read(ctx context.Context, t *render.Table) (*held, error) {
	h := &held{marks: map[render.Port]map[nft.Mark]bool{}, services: map[key]*virtual{}}
	var err error
	if h.guard, err = s.guard.Read(ctx); err != nil {
		return nil, err
	}
	salvaged := map[render.Port]bool{}
	for m := range h.guard.Salvaged {
		salvaged[m.Port] = true
	}
	for m := range h.guard.Marks {
		if h.marks[m.Port] == nil {
			h.marks[m.Port] = map[nft.Mark]bool{}
		}
		h.marks[m.Port][m] = true
	}
	all, err := s.kernel.services()
	if err != nil {
		return nil, err
	}
	for _, v := range all {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		_, listed := t.Find(v.Port)
		ours := listed || salvaged[v.Port] || s.draining[v.key] != nil || h.marks[v.Port] != nil || contains(t.Range, v.Addr) || contains(h.guard.Settings.Range, v.Addr)
		if v.mark != 0 {
			ours = isMark(v.mark)
		}
		if !ours {
			continue
		}
		if err := s.kernel.fill(v); err != nil {
			return nil, err
		}
		h.services[v.key] = v
	}
	return h, nil
}

// table is what packets find, as a table says it.
func (h *held) table() render.Table {
	t := h.guard.Settings
	for p := range h.ports() {
		if svc, ok := h.service(p); ok {
			t.Services = append(t.Services, svc)
		}
	}
	sortServices(t.Services)
	return t
}

// Read implements netplane.Services.
func (s *Services) Read(ctx context.Context) (render.Table, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return render.Table{}, errClosed
	}
	h, err := s.read(ctx, &s.have)
	if err != nil {
		return render.Table{}, err
	}
	if s.known {
		s.known, err = s.undisturbed(h)
	}
	return h.table(), err
}

// undisturbed reports whether h is what the last Sync left there.
func (s *Services) undisturbed(h *held) (bool, error) {
	kept, err := s.settings.kept(s.kernel)
	if err != nil || !kept || !s.guard.Undisturbed(&s.have) || !h.guard.Settings.SameConfig(s.have) || !maps.EqualFunc(h.marks, s.marks, maps.Equal) {
		return false, err
	}
	if kept, err = s.steer.kept(&s.have); err != nil || !kept {
		return false, err
	}
	cut := cutFor(&s.have)
	known := 0
	same := func(have, want *virtual) bool {
		if have != nil {
			known++
		}
		cmds, _ := change(have, want, cut)
		return len(cmds) == 0
	}
	for i := range s.have.Services {
		svc := &s.have.Services[i]
		main, out := h.of(svc.Port)
		if !same(main, wanted(svc, s.cfg.Scheduler)) || !same(out, wantedOutside(svc, s.cfg.Scheduler, s.split[svc.Port])) {
			return false, nil
		}
	}
	for k := range s.draining {
		if _, listed := s.have.Find(k.Port); h.services[k] != nil && !listed && s.unsplit(k) {
			known++
		}
	}
	return known == len(h.services), nil
}

// unsplit reports whether no service that is listed has the mark of k.
func (s *Services) unsplit(k key) bool {
	for p, mark := range s.split {
		if byMark(mark, p.Addr) == k {
			return false
		}
	}
	return true
}

// Purge implements netplane.Services. Established connections to services end.
func (s *Services) Purge(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	s.known = false
	h, err := s.read(ctx, &s.have)
	if err != nil {
		return err
	}
	var cmds []command
	for _, v := range h.services {
		cmds = append(cmds, command{verb: delService, service: v})
	}
	if err := s.kernel.do(ctx, cmds); err != nil {
		return fmt.Errorf("IPVS: %w", err)
	}
	if err := s.settings.restore(s.kernel, h.guard.Before); err != nil {
		return err
	}
	if err := s.steer.remove(); err != nil {
		return err
	}
	if err := s.guard.Purge(ctx); err != nil {
		return err
	}
	s.have, s.draining = render.Table{}, nil
	return nil
}

// Retire removes all services, but lets connections that are established go on. It
// returns true when nothing is left; until then it is to be called again.
func (s *Services) Retire(ctx context.Context) (bool, error) {
	if there, err := s.there(ctx); err != nil || !there {
		return err == nil, err
	}
	if _, err := s.Sync(ctx, render.Table{}); err != nil {
		return false, err
	}
	if s.Draining() > 0 {
		return false, nil
	}
	return true, s.Purge(ctx)
}

// there reports whether the kernel holds anything of us.
func (s *Services) there(ctx context.Context) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false, errClosed
	}
	h, err := s.read(ctx, &render.Table{})
	if err != nil {
		return false, err
	}
	return len(h.services) > 0 || s.guard.Made(), nil
}
