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
	if !s.have.SameConfig(want) {
		return 0, errSettings
	}
	w := work{touched: map[nft.Mark]bool{}, ops: diff.Services(s.have.Services, want.Services)}
	n := len(w.ops)
	if err := s.sweep(ctx, &w, &want); err != nil {
		return n, err
	}
	for _, op := range w.ops {
		s.change(&w, op.Port(), s.holding(op), op.Want, &want)
		s.count(&w, op.Have, -1, &want)
		s.count(&w, op.Want, 1, &want)
	}
	if err := s.carryOut(ctx, &w); err != nil {
		return n, err
	}
	s.have, s.known = want, true
	return n, s.guard.Forget(w.ops)
}

// holding is what IPVS holds of a service that is known.
func (s *Services) holding(op diff.Op) *virtual {
	if d := s.draining[op.Port()]; d != nil {
		return d.holds
	}
	return wanted(op.Have, s.cfg.Scheduler)
}

// sweep plans the removal of servers whose connections have ended, or that have had
// their time.
func (s *Services) sweep(ctx context.Context, w *work, want *render.Table) error {
	now := s.now()
	if now.Sub(s.swept) < sweepEvery && slices.Equal(s.have.Lost, want.Lost) {
		return nil
	}
	s.swept = now
	cut := cutFor(want)
	for _, p := range slices.SortedFunc(maps.Keys(s.draining), render.Port.Compare) {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		d := s.draining[p]
		v := &virtual{Port: p, scheduler: d.holds.scheduler, affinity: d.holds.affinity}
		if err := s.kernel.fill(v); err != nil {
			return err
		}
		svc, _ := s.have.Find(p)
		cmds, left := drained(v, svc != nil && len(svc.Endpoints) > 0, func(x server) bool {
			return cut(v, x.addr.Addr()) || now.Sub(d.since[x.addr]) >= s.cfg.Drain
		})
		w.cmds = append(w.cmds, cmds...)
		s.drain(p, left)
		s.remark(w, p, marksOf(p, svc, left != nil, &s.have))
	}
	return nil
}

// change plans what turns have, which is what IPVS holds, into svc, and returns
// whether there is anything to do.
func (s *Services) change(w *work, p render.Port, have *virtual, svc *render.Service, t *render.Table) bool {
	cmds, left := change(have, wanted(svc, s.cfg.Scheduler), cutFor(t))
	w.cmds = append(w.cmds, cmds...)
	s.drain(p, left)
	return s.remark(w, p, marksOf(p, svc, left != nil, t)) || len(cmds) > 0
}

// drain notes which servers of a service have no weight, and since when.
func (s *Services) drain(p render.Port, holds *virtual) {
	waiting := holds.waiting()
	if len(waiting) == 0 {
		delete(s.draining, p)
		return
	}
	d := &drain{holds: holds, since: make(map[netip.AddrPort]time.Time, len(waiting))}
	for _, addr := range waiting {
		d.since[addr] = s.now()
		if old := s.draining[p]; old != nil {
			if at, ok := old.since[addr]; ok {
				d.since[addr] = at
			}
		}
	}
	s.draining[p] = d
}

// portMarks are the marks of one service port, by their set.
type portMarks [nft.Hairpin]bool

// marksOf are the marks of a port with a service, or without one if svc is nil. held:
// IPVS has it.
func marksOf(p render.Port, svc *render.Service, held bool, t *render.Table) (m portMarks) {
	m[nft.Closed] = svc != nil && len(svc.Endpoints) == 0
	m[nft.Draining] = svc == nil && held
	m[nft.Outside] = svc != nil && len(svc.Endpoints) > 0 && !contains(t.Range, p.Addr)
	return m
}

// remark makes these the marks of a port, and returns whether that changes any.
func (s *Services) remark(w *work, p render.Port, want portMarks) bool {
	changed := false
	for set, on := range want {
		changed = s.turn(w, nft.Mark{Set: nft.MarkSet(set), Port: p}, on) || changed
	}
	return changed
}

func (s *Services) turn(w *work, m nft.Mark, on bool) bool {
	was := s.marks[m]
	if on == was {
		return false
	}
	if _, ok := w.touched[m]; !ok {
		w.touched[m] = was
	}
	if on {
		s.marks[m] = true
	} else {
		delete(s.marks, m)
	}
	return true
}

// count counts the services that go to each pod of this node: those are the pods that
// may reach themselves.
func (s *Services) count(w *work, svc *render.Service, by int, t *render.Table) {
	if svc == nil {
		return
	}
	for _, ep := range svc.Endpoints {
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

// carryOut does what w says.
func (s *Services) carryOut(ctx context.Context, w *work) error {
	var mark, unmark []nft.Mark
	for m, was := range w.touched {
		switch is := s.marks[m]; {
		case is && !was:
			mark = append(mark, m)
		case was && !is:
			unmark = append(unmark, m)
		}
	}
	if err := s.guard.Mark(ctx, nil, mark); err != nil {
		return err
	}
	start := time.Now()
	if err := s.kernel.do(ctx, w.cmds); err != nil {
		return fmt.Errorf("IPVS: %w", err)
	}
	s.log.Debug("IPVS changed", "commands", len(w.cmds), "took", time.Since(start))
	return s.guard.Mark(ctx, unmark, nil)
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
	w, changed := s.compare(h, &want)
	if n += changed; n == 0 && len(w.touched) > 0 {
		n = 1
	}
	if err := s.carryOut(ctx, w); err != nil {
		return n, err
	}
	s.have, s.known = want, true
	return n, s.guard.Forget(w.ops)
}

// compare plans for every service that there is or shall be, and returns how many
// change. It makes s know what h says.
func (s *Services) compare(h *held, want *render.Table) (w *work, changed int) {
	w = &work{touched: map[nft.Mark]bool{}}
	s.marks, s.reach = maps.Clone(h.guard.Marks), map[netip.Addr]int{}
	if s.draining == nil {
		s.draining = map[render.Port]*drain{}
	}
	one := func(p render.Port, svc *render.Service) {
		have := h.services[p]
		if !s.change(w, p, have, svc, want) {
			return
		}
		changed++
		if have != nil {
			old, _ := have.service()
			w.ops = append(w.ops, diff.Op{Have: &old, Want: svc})
		}
	}
	others := h.ports()
	for p := range s.draining { // as of earlier; some may be gone
		others[p] = true
	}
	for i := range want.Services {
		svc := &want.Services[i]
		delete(others, svc.Port)
		one(svc.Port, svc)
		s.count(w, svc, 1, want)
	}
	for _, p := range slices.SortedFunc(maps.Keys(others), render.Port.Compare) {
		one(p, nil)
	}
	for m := range h.guard.Marks {
		if m.Set == nft.Hairpin && s.reach[m.Addr] == 0 {
			s.turn(w, m, false)
		}
	}
	return w, changed
}

// held is what the kernel holds of us.
type held struct {
	guard    nft.GuardState
	services map[render.Port]*virtual
}

// ports are the ports of all services that are held or marked.
func (h *held) ports() map[render.Port]bool {
	ports := map[render.Port]bool{}
	for p := range h.services {
		ports[p] = true
	}
	for m := range h.guard.Marks {
		if m.Set != nft.Hairpin {
			ports[m.Port] = true
		}
	}
	return ports
}

// read reads what the kernel holds of us: what is marked, what is in a range of
// services, and what t has. Other services of IPVS are somebody else's.
func (s *Services) read(ctx context.Context, t *render.Table) (*held, error) {
	h := &held{services: map[render.Port]*virtual{}}
	var err error
	if h.guard, err = s.guard.Read(ctx); err != nil {
		return nil, err
	}
	all, err := s.kernel.services()
	if err != nil {
		return nil, err
	}
	marked := h.ports()
	for _, v := range all {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		_, listed := t.Find(v.Port)
		if !listed && !marked[v.Port] && !contains(t.Range, v.Addr) && !contains(h.guard.Settings.Range, v.Addr) {
			continue
		}
		if err := s.kernel.fill(v); err != nil {
			return nil, err
		}
		h.services[v.Port] = v
	}
	return h, nil
}

// table is what a packet finds, as a table says it.
func (h *held) table() render.Table {
	t := h.guard.Settings
	for m := range h.guard.Marks {
		if m.Set == nft.Closed {
			t.Services = append(t.Services, render.Service{Port: m.Port})
		}
	}
	for p, v := range h.services {
		if svc, ok := v.service(); ok && !h.guard.Marks[nft.Mark{Set: nft.Closed, Port: p}] {
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
	if err != nil || !kept || !s.guard.Undisturbed(&s.have) || !h.guard.Settings.SameConfig(s.have) || !maps.Equal(h.guard.Marks, s.marks) {
		return false, err
	}
	for i := range s.have.Services {
		svc := &s.have.Services[i]
		if cmds, _ := change(h.services[svc.Port], wanted(svc, s.cfg.Scheduler), cutFor(&s.have)); len(cmds) > 0 {
			return false, nil
		}
	}
	for p := range h.services {
		if _, ok := s.have.Find(p); !ok && s.draining[p] == nil {
			return false, nil
		}
	}
	return true, nil
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
	if err := s.guard.Purge(ctx); err != nil {
		return err
	}
	s.have, s.draining = render.Table{}, nil
	return nil
}
