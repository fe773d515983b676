package dns

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"decree.dev/decree/netplane/render"
)

const (
	// ttl of every record of the cluster, in seconds; also how long it may be
	// remembered that there is none.
	ttl = 5
	// specVersion is answered to TXT dns-version, as the specification asks for.
	specVersion = "1.1.0"
)

// answer is what a name has.
type answer struct {
	exists bool // the name is there, though perhaps not with this type
	rrs    []dns.RR
	extra  []dns.RR
	// alias is a name to go on with.
	alias string
	// seen are the SRV records and addresses so far.
	seen map[string]bool
}

// first reports whether a record is not there yet (RFC 2181, 5).
func (a *answer) first(rr dns.RR) bool {
	if a.seen == nil {
		a.seen = map[string]bool{}
	}
	text := rr.String()
	defer func() { a.seen[text] = true }()
	return !a.seen[text]
}

// maxAliases bounds a chain of aliases within the cluster.
const maxAliases = 8

// answer answers for a name (in lower case) that the zone owns. If outside is not
// empty, it is the name that the answer so far is an alias for.
func (z *zone) answer(name string, qtype uint16) (resp *dns.Msg, outside string) {
	resp = new(dns.Msg)
	resp.Authoritative = true
	resp.Question = []dns.Question{{Name: name, Qtype: qtype, Qclass: dns.ClassINET}}
	for range maxAliases {
		a := z.lookup(name, qtype)
		resp.Answer, resp.Extra = append(resp.Answer, a.rrs...), append(resp.Extra, a.extra...)
		switch {
		case !a.exists: // of the name at the end of the chain (RFC 6604)
			resp.Rcode = dns.RcodeNameError
		case qtype == dns.TypeANY:
			resp.Answer = []dns.RR{anything(name)}
			return resp, ""
		case a.alias != "" && qtype != dns.TypeCNAME:
			if !z.owns(a.alias) {
				return resp, a.alias
			}
			name = a.alias
			continue
		}
		if len(a.rrs) == 0 {
			resp.Ns = []dns.RR{z.soa(z.origin(name))}
		}
		return resp, ""
	}
	resp.Answer, resp.Rcode = nil, dns.RcodeServerFailure
	return resp, ""
}

// anything is the answer to questions for all types: one record that says that there
// will be no more (RFC 8482, 4.2). It is of use to nobody who wants to flood others.
func anything(name string) dns.RR {
	return &dns.HINFO{Hdr: head(name, dns.TypeHINFO), Cpu: "RFC8482"}
}

// lookup finds name (in lower case, fully qualified), which the zone owns.
func (z *zone) lookup(name string, qtype uint16) answer {
	if name == z.domain {
		return z.apex(name, qtype)
	}
	rest, ok := strings.CutSuffix(name, "."+z.domain)
	if !ok {
		return z.pointer(name, qtype)
	}
	labels := strings.Split(rest, ".")
	switch last := len(labels) - 1; labels[last] {
	case "svc":
		return z.serviceName(name, labels[:last], qtype)
	case "pod":
		return z.podName(name, labels[:last], qtype)
	case "dns-version":
		if last == 0 {
			return only(qtype == dns.TypeTXT, &dns.TXT{Hdr: head(name, dns.TypeTXT), Txt: []string{specVersion}})
		}
	case "dns": // ns.dns, the name of this server
		switch {
		case last == 0:
			return answer{exists: true}
		case last == 1 && labels[0] == "ns":
			return addresses(name, qtype, z.server)
		}
	}
	return answer{}
}

func only(yes bool, rr dns.RR) answer {
	if !yes {
		return answer{exists: true}
	}
	return answer{exists: true, rrs: []dns.RR{rr}}
}

// apex answers for the domain itself, and for a whole range of addresses.
func (z *zone) apex(name string, qtype uint16) answer {
	switch qtype {
	case dns.TypeSOA:
		return only(true, z.soa(name))
	case dns.TypeNS:
		return only(true, &dns.NS{Hdr: head(name, dns.TypeNS), Ns: "ns.dns." + z.domain})
	}
	return answer{exists: true}
}

// soa is the record that says how long absence may be remembered (RFC 2308).
func (z *zone) soa(origin string) *dns.SOA {
	return &dns.SOA{
		Hdr: head(origin, dns.TypeSOA), Ns: "ns.dns." + z.domain, Mbox: "hostmaster." + z.domain,
		Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl,
	}
}

func head(name string, t uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: ttl}
}

// serviceName answers for what is below svc; labels are those before it.
func (z *zone) serviceName(name string, labels []string, qtype uint16) answer {
	n := len(labels)
	switch {
	case n == 0:
		return answer{exists: true}
	case n == 1:
		return answer{exists: z.hasNamespace(labels[0])}
	case n > 4:
		return answer{}
	}
	e := z.find(labels[n-1], labels[n-2])
	if e == nil || e.empty() {
		return answer{}
	}
	switch {
	case n == 2:
		return z.whole(e, name, qtype)
	case e.external(): // an alias has nothing below it, and is no target (RFC 2782)
	case n == 3 && strings.HasPrefix(labels[0], "_"):
		// Above the SRV names, and nothing else.
		return answer{exists: slices.ContainsFunc(e.svc.Spec.Ports, func(p corev1.ServicePort) bool { return protoLabel(p.Protocol) == labels[0] })}
	case n == 3:
		return oneEndpoint(e, name, labels[0], qtype)
	case n == 4:
		return z.portName(e, name, labels[0], labels[1], qtype)
	}
	return answer{}
}

// whole answers for the service itself.
func (z *zone) whole(e *service, name string, qtype uint16) answer {
	if e.external() {
		target := dns.CanonicalName(e.svc.Spec.ExternalName)
		_, err := netip.ParseAddr(e.svc.Spec.ExternalName)
		if _, ok := dns.IsDomainName(target); !ok || target == "." || err == nil { // an address is no name
			return answer{exists: true}
		}
		return answer{exists: true, alias: target, rrs: []dns.RR{&dns.CNAME{Hdr: head(name, dns.TypeCNAME), Target: target}}}
	}
	if qtype == dns.TypeSRV {
		a := answer{exists: true}
		for i := range e.svc.Spec.Ports {
			z.srv(&a, e, name, &e.svc.Spec.Ports[i])
		}
		return a
	}
	if !e.headless() {
		return addresses(name, qtype, render.ClusterIPs(e.svc)...)
	}
	var all []netip.Addr
	for ep := range e.endpoints {
		all = append(all, ep.addr)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return addresses(name, qtype, slices.Compact(all)...)
}

// addresses answers with the addresses that qtype asks for.
func addresses(name string, qtype uint16, all ...netip.Addr) answer {
	a := answer{exists: true}
	for _, x := range all {
		if rr := address(name, x); rr.Header().Rrtype == qtype {
			a.rrs = append(a.rrs, rr)
		}
	}
	return a
}

func address(name string, a netip.Addr) dns.RR {
	if a.Is4() {
		return &dns.A{Hdr: head(name, dns.TypeA), A: a.AsSlice()}
	}
	return &dns.AAAA{Hdr: head(name, dns.TypeAAAA), AAAA: a.AsSlice()}
}

func oneEndpoint(e *service, name, host string, qtype uint16) answer {
	var all []netip.Addr
	for ep := range e.endpoints {
		if ep.host == host {
			all = append(all, ep.addr)
		}
	}
	if len(all) == 0 {
		return answer{}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return addresses(name, qtype, slices.Compact(all)...)
}

// portName answers for _port._proto.service.
func (z *zone) portName(e *service, name, port, proto string, qtype uint16) answer {
	for i := range e.svc.Spec.Ports {
		p := &e.svc.Spec.Ports[i]
		if p.Name == "" || "_"+strings.ToLower(p.Name) != port || protoLabel(p.Protocol) != proto {
			continue
		}
		a := answer{exists: true}
		if qtype == dns.TypeSRV {
			z.srv(&a, e, name, p)
		}
		return a
	}
	return answer{}
}

func protoLabel(p corev1.Protocol) string {
	if p == "" {
		p = corev1.ProtocolTCP
	}
	return "_" + strings.ToLower(string(p))
}

// srv adds the SRV records of one port, with the addresses of their targets.
func (z *zone) srv(a *answer, e *service, name string, p *corev1.ServicePort) {
	if !e.headless() {
		a.addSRV(name, z.name(e), uint16(p.Port), render.ClusterIPs(e.svc)...)
		return
	}
	for ep := range e.endpoints {
		for i := range ep.slice.Ports {
			if sp := &ep.slice.Ports[i]; sp.Port != nil && samePort(sp, p) {
				a.addSRV(name, ep.host+"."+z.name(e), uint16(*sp.Port), ep.addr)
			}
		}
	}
}

// addSRV adds one record with the addresses of its target, but for what is there: an
// endpoint with addresses of both families is one target, and one target has many ports.
func (a *answer) addSRV(name, host string, port uint16, addrs ...netip.Addr) {
	if rr := (&dns.SRV{Hdr: head(name, dns.TypeSRV), Weight: 100, Port: port, Target: host}); a.first(rr) {
		a.rrs = append(a.rrs, rr)
	}
	for _, x := range addrs {
		if rr := address(host, x); a.first(rr) {
			a.extra = append(a.extra, rr)
		}
	}
}

// samePort reports whether an endpoint's port is that of a service.
func samePort(sp *discoveryv1.EndpointPort, p *corev1.ServicePort) bool {
	name, proto := "", corev1.ProtocolTCP
	if sp.Name != nil {
		name = *sp.Name
	}
	if sp.Protocol != nil {
		proto = *sp.Protocol
	}
	return name == p.Name && protoLabel(proto) == protoLabel(p.Protocol)
}

// podName answers for address.namespace.pod: the label is the answer.
func (z *zone) podName(name string, labels []string, qtype uint16) answer {
	switch len(labels) {
	case 0:
		return answer{exists: true}
	case 1:
		return answer{exists: z.hasNamespace(labels[0])}
	case 2:
		if a, ok := undashed(labels[0]); ok && z.hasNamespace(labels[1]) {
			return addresses(name, qtype, a)
		}
	}
	return answer{}
}

func (z *zone) pointer(name string, qtype uint16) answer {
	p, exact := reverseRange(name)
	switch {
	case !exact:
		return answer{}
	case p.IsSingleIP():
	case name == z.origin(name):
		return z.apex(name, qtype)
	default:
		return answer{exists: true} // there are addresses below it
	}
	names := z.names(p.Addr())
	a := answer{exists: len(names) > 0}
	for _, n := range names {
		if qtype == dns.TypePTR {
			a.rrs = append(a.rrs, &dns.PTR{Hdr: head(name, dns.TypePTR), Ptr: n})
		}
	}
	return a
}
