// Package reach sends the probes of one node: echoes, connections, datagrams, DNS queries. It only
// measures; what is to be tried is for netplane/netcheck.
package reach

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace"
)

// Patience is how long one answer is waited for.
const Patience = time.Second

// width is how many probes are under way at a time.
const width = 64

// From are the network namespaces that probes come from, by their paths; an empty Node means
// the current one.
type From struct{ Node, Pod string }

// Send tries all probes and returns an outcome for each, in their order. Each takes up to
// about four times Patience. It needs the right to use raw sockets. When ctx ends, what is
// left fails.
func Send(ctx context.Context, from From, probes []netcheck.Probe) []netcheck.Outcome {
	out := make([]netcheck.Outcome, len(probes))
	var g errgroup.Group
	g.SetLimit(width)
	for i, p := range probes {
		g.Go(func() error {
			at := from.Node
			if p.Kind.FromPod() {
				at = from.Pod
			}
			out[i] = try(ctx, at, p)
			return nil
		})
	}
	_ = g.Wait() // none fails: outcomes tell
	return out
}

func try(ctx context.Context, netns string, p netcheck.Probe) (o netcheck.Outcome) {
	err := context.Cause(ctx)
	if err == nil {
		switch p.Kind {
		case netcheck.PodToService:
			o.Latency, err = connect(ctx, netns, netip.AddrPortFrom(p.Address, p.Port))
		case netcheck.PodToUDP:
			o, err = datagram(ctx, netns, netip.AddrPortFrom(p.Address, p.Port), p.Names)
		case netcheck.NodeToDNS, netcheck.PodToDNS:
			o.Latency, err = resolve(ctx, netns, netip.AddrPortFrom(p.Address, p.Port), p.To, p.Want)
		default:
			o, err = echo(ctx, netns, p.Address)
		}
	}
	if err != nil {
		o.Error = err.Error()
	}
	return o
}

// dial opens a connection from a namespace. Its errors leave out addresses: the probe has them.
func dial(ctx context.Context, netns, network string, to netip.AddrPort) (c net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	err = netspace.Do(netns, func() error {
		c, err = (&net.Dialer{}).DialContext(ctx, network, to.String())
		return err
	})
	return c, plain(err)
}

// connect measures how long a TCP handshake takes. A lost packet is not waited for: the first
// repetition comes after a second (RFC 6298), so a second connection is tried.
func connect(ctx context.Context, netns string, to netip.AddrPort) (time.Duration, error) {
	var last error
	for range 2 {
		begun := time.Now()
		c, err := dial(ctx, netns, "tcp", to)
		took := time.Since(begun)
		if err == nil {
			return took, c.Close()
		}
		last = err
	}
	return 0, fmt.Errorf("TCP port %d: %w", to.Port(), last)
}

// resolve asks a name server for the address of a name, or, if no address is wanted, for its
// text (RFC 1035).
func resolve(ctx context.Context, netns string, server netip.AddrPort, name string, want netip.Addr) (time.Duration, error) {
	kind := dns.TypeTXT
	switch {
	case want.Is4():
		kind = dns.TypeA
	case want.IsValid():
		kind = dns.TypeAAAA
	}
	answer, took, err := query(ctx, netns, server, new(dns.Msg).SetQuestion(dns.Fqdn(name), kind))
	if err != nil {
		return 0, err
	}
	return took, judge(answer, name, want)
}

// query asks a name server, twice if need be.
func query(ctx context.Context, netns string, server netip.AddrPort, q *dns.Msg) (answer *dns.Msg, took time.Duration, err error) {
	name := q.Question[0].Name
	for range 2 {
		var c net.Conn
		if c, err = dial(ctx, netns, "udp", server); err != nil {
			return nil, 0, err
		}
		client := dns.Client{Timeout: Patience}
		answer, took, err = client.ExchangeWithConnContext(ctx, q, &dns.Conn{Conn: c})
		c.Close()
		if err == nil {
			return answer, took, nil
		}
	}
	if t, ok := err.(net.Error); ok && t.Timeout() {
		return nil, 0, fmt.Errorf("no answer to queries for %s", name)
	}
	return nil, 0, fmt.Errorf("query for %s: %w", name, plain(err))
}

// judge says whether an answer is as it should be.
func judge(answer *dns.Msg, name string, want netip.Addr) error {
	if answer.Rcode != dns.RcodeSuccess || len(answer.Answer) == 0 {
		return fmt.Errorf("%s does not resolve: %s, %d answers", name, dns.RcodeToString[answer.Rcode], len(answer.Answer))
	}
	if !want.IsValid() {
		return nil
	}
	var got []string
	for _, rr := range answer.Answer {
		switch r := rr.(type) {
		case *dns.A:
			got = append(got, r.A.String())
		case *dns.AAAA:
			got = append(got, r.AAAA.String())
		}
	}
	if !slices.Contains(got, want.String()) {
		return fmt.Errorf("%s resolves to %v, not to %s", name, got, want)
	}
	return nil
}
