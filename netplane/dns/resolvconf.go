package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// Stub is a domain with name servers of its own.
type Stub struct {
	Domain  string
	Servers []netip.AddrPort
}

// ParseStub reads DOMAIN=SERVER[,SERVER...], where a SERVER is an address or an
// address with a port, such as corp.example=10.0.0.53,[2001:db8::53]:5353.
func ParseStub(text string) (Stub, error) {
	domain, list, ok := strings.Cut(text, "=")
	if _, valid := dns.IsDomainName(domain); !ok || !valid || domain == "" || list == "" {
		return Stub{}, fmt.Errorf("stub domain %q: want DOMAIN=ADDRESS[:PORT][,ADDRESS[:PORT]]", text)
	}
	stub := Stub{Domain: dns.CanonicalName(domain)}
	for s := range strings.SplitSeq(list, ",") {
		a, err := netip.ParseAddrPort(s)
		if err != nil {
			addr, bad := netip.ParseAddr(s)
			if bad != nil {
				return Stub{}, fmt.Errorf("stub domain %q: server %q is neither ADDRESS nor ADDRESS:PORT", text, s)
			}
			a = netip.AddrPortFrom(addr, 53)
		}
		stub.Servers = append(stub.Servers, a)
	}
	return stub, nil
}

// resolvConf is the file with the node's own name servers, as last read.
type resolvConf struct {
	path string
	text []byte
	err  error
}

// read returns what the file says, if that has changed, or why it cannot be read, if that
// has. A file that is being replaced may not be there: then what it said counts.
func (c *resolvConf) read() (servers []netip.AddrPort, rotate, changed bool, err error) {
	if c.path == "" {
		return nil, false, false, nil
	}
	text, err := os.ReadFile(c.path)
	news := err != nil && c.err == nil
	if c.err = err; err != nil {
		if news {
			return nil, false, false, fmt.Errorf("read the node's name servers: %w", err)
		}
		return nil, false, false, nil
	}
	if bytes.Equal(text, c.text) {
		return nil, false, false, nil
	}
	c.text = text
	servers, rotate = parseResolvConf(string(text))
	return servers, rotate, true, nil
}

// parseResolvConf returns the name servers, and whether they shall take turns.
func parseResolvConf(text string) (servers []netip.AddrPort, rotate bool) {
	for line := range strings.Lines(text) {
		w := strings.Fields(line)
		if len(w) < 2 {
			continue
		}
		switch w[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(w[1]); err == nil {
				servers = append(servers, netip.AddrPortFrom(a, 53))
			}
		case "options":
			rotate = rotate || slices.Contains(w[1:], "rotate")
		}
	}
	return servers, rotate
}
