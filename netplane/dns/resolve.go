package dns

import (
	"context"
	"fmt"
	"time"

	"github.com/miekg/dns"
)

// local answers from the zone, and remembers that. It returns nil if others have to
// be asked.
func (s *Server) local(z *inForce, q *query) *entry {
	name, err := q.text()
	if err != nil {
		return nil // and slow says why
	}
	var resp *dns.Msg
	switch {
	case z.owns(name):
		var outside string
		if resp, outside = z.answer(name, q.qtype); outside != "" {
			return nil
		}
	case q.qtype == dns.TypeANY:
		resp = &dns.Msg{Question: []dns.Question{{Name: name, Qtype: q.qtype, Qclass: q.class}}, Answer: []dns.RR{anything(name)}}
	default:
		return nil
	}
	e := &entry{key: string(q.key()), generation: z.generation, rcode: resp.Rcode}
	if e.packed, err = pack(resp, q.name()); err != nil {
		s.log.Error("cluster DNS has no answer", "name", name, "err", err)
		return nil
	}
	s.cache.put(e)
	return e
}

// elsewhere answers what local does not.
func (s *Server) elsewhere(ctx context.Context, q *query) (*entry, answeredBy, error) {
	name, err := q.text()
	if err != nil {
		return nil, byCluster, err
	}
	z := s.zone.Load()
	if !z.owns(name) {
		return s.forward.resolve(ctx, name, q.qtype, q.key())
	}
	e, err := s.throughAlias(ctx, z, name, q)
	return e, byCluster, err
}

// throughAlias answers for a name of the cluster that is an alias for one outside. The
// parts of the answer are remembered, the whole is not.
func (s *Server) throughAlias(ctx context.Context, z *inForce, name string, q *query) (*entry, error) {
	resp, outside := z.answer(name, q.qtype)
	if outside != "" {
		if err := s.goOn(ctx, resp, outside, q); err != nil {
			return nil, fmt.Errorf("alias %s: %w", outside, err)
		}
	}
	p, err := pack(resp, q.name())
	return &entry{packed: p, generation: z.generation, rcode: resp.Rcode}, err
}

// goOn adds to resp what is known of name, for which its last answer is an alias.
func (s *Server) goOn(ctx context.Context, resp *dns.Msg, name string, q *query) error {
	k := make([]byte, maxName+3)
	n, err := dns.PackDomainName(name, k[:maxName], 0, nil, false)
	if err != nil {
		return err
	}
	k = append(k[:n], q.key()[q.nameLen:]...)
	e, by, err := s.forward.resolve(ctx, name, q.qtype, k)
	if err != nil {
		return err
	}
	m := new(dns.Msg)
	if err := m.Unpack(e.wire); err != nil {
		return err
	}
	age := uint32((s.now() - e.born) / time.Second)
	for _, rrs := range [][]dns.RR{m.Answer, m.Ns} {
		for _, rr := range rrs {
			h := rr.Header()
			if h.Ttl -= min(h.Ttl, age); by == byStale {
				h.Ttl = staleTTL
			}
		}
	}
	resp.Answer, resp.Ns, resp.Rcode = append(resp.Answer, m.Answer...), append(resp.Ns, m.Ns...), m.Rcode
	return nil
}
