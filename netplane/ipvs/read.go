package ipvs

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

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
	known, led := false, false
	for m := range h.marks[p] {
		switch m.Set {
		case nft.Closed, nft.Dropped:
			return render.Service{Port: p, Drop: m.Set == nft.Dropped}, true
		case nft.Undelivered:
			svc.Split = true
		case nft.Split:
			led = true
		case nft.Allowed:
			svc.Sources = append(svc.Sources, m.Source)
		}
	}
	slices.SortFunc(svc.Sources, netip.Prefix.Compare)
	if svc.Endpoints = main.live(); len(svc.Endpoints) > 0 {
		known, svc.Affinity = true, main.affinity
		if outside := out.live(); led && !slices.Equal(outside, svc.Endpoints) {
			svc.Split, svc.Outside = true, outside
		}
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
		if !same(main, wanted(svc, s.scheduler)) || !same(out, wantedOutside(svc, apart(svc, s.have.Range), s.scheduler, s.split.of(svc.Port))) {
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
	_, split := s.split.ports[k]
	return !split
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
