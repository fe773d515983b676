package dns

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"pgregory.net/rapid"
)

// TestReverseNames: a reverse zone answers for itself and for all that is below it, so that
// a resolver which asks label by label finds the names in it (RFC 9156).
func TestReverseNames(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	addr := serve(t, s)
	six := mustReverse(t, "fd97::80")
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string
		soa   string // of absence
	}{
		{"97.10.in-addr.arpa.", dns.TypeSOA, "NOERROR, SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 5", ""},
		{"97.10.in-addr.arpa.", dns.TypeNS, "NOERROR, NS ns.dns.cluster.local.", ""},
		{"97.10.in-addr.arpa.", dns.TypePTR, "NOERROR", "97.10.in-addr.arpa."},
		{"0.97.10.in-addr.arpa.", dns.TypeNS, "NOERROR", "97.10.in-addr.arpa."},
		{"80.0.97.10.in-addr.arpa.", dns.TypeA, "NOERROR", "97.10.in-addr.arpa."},
		{"80.0.97.10.IN-ADDR.arpa.", dns.TypePTR, "NOERROR, PTR web.default.svc.cluster.local.", ""},
		{"080.0.97.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN", "97.10.in-addr.arpa."},
		{"256.97.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN", "97.10.in-addr.arpa."},
		{"x.80.0.97.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN", "97.10.in-addr.arpa."},
		{six[2:], dns.TypePTR, "NOERROR", six[10:]}, // fd97::/108
		{six[10:], dns.TypeNS, "NOERROR, NS ns.dns.cluster.local.", ""},
		{"ff." + six[4:], dns.TypePTR, "NXDOMAIN", six[10:]},
		// What is only partly the cluster's, or not at all, is asked elsewhere; there is nobody.
		{"10.in-addr.arpa.", dns.TypeNS, "SERVFAIL", ""},
		{"96.10.in-addr.arpa.", dns.TypeNS, "SERVFAIL", ""},
		{"in-addr.arpa.", dns.TypeNS, "SERVFAIL", ""},
		{six[12:], dns.TypeNS, "SERVFAIL", ""},
	} {
		m := exchange(t, "udp", addr, new(dns.Msg).SetQuestion(c.name, c.qtype))
		soa := ""
		if len(m.Ns) == 1 {
			soa = m.Ns[0].Header().Name
		}
		if got := brief(m); got != c.want || !strings.EqualFold(soa, c.soa) {
			t.Errorf("%s %s: %q with the SOA of %q, want %q and %q", c.name, dns.TypeToString[c.qtype], got, soa, c.want, c.soa)
		}
	}
}

// TestReverseRange: the reverse name of an address, and all that is made of its last
// labels, is read as what it stands for.
func TestReverseRange(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "bytes")
		a, bits := netip.AddrFrom16([16]byte(b)), 4
		if rapid.Bool().Draw(t, "IPv4") {
			a, bits = netip.AddrFrom4([4]byte(b[:4])), 8
		}
		name, err := dns.ReverseAddr(a.String())
		if err != nil || a.Is4In6() {
			t.Skip(err)
		}
		cut := rapid.IntRange(0, a.BitLen()/bits-1).Draw(t, "labels cut off")
		for range cut {
			_, name, _ = strings.Cut(name, ".")
		}
		p, exact := reverseRange(name)
		if want := netip.PrefixFrom(a, a.BitLen()-cut*bits).Masked(); p != want || !exact {
			t.Fatalf("%s: %v, exact %t; want %v", name, p, exact, want)
		}
	})
}
