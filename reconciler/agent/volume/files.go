package volume

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// DNS is what pods are told about name resolution.
type DNS struct {
	// Server is the cluster DNS address; not valid: the cluster has none and pods
	// use the node's own resolver.
	Server netip.Addr
	Domain string // of the cluster, "cluster.local"
	// NodeResolvConf is the path of the node's resolv.conf.
	NodeResolvConf string
}

const (
	mostNameservers = 3
	mostSearches    = 32
)

// Hosts is the content of a pod's /etc/hosts. With a subdomain, the pod's full name
// comes before its hostname.
func Hosts(pod *corev1.Pod, hostname, domain string, ips []string) []byte {
	names := hostname
	if pod.Spec.Subdomain != "" && domain != "" {
		names = fmt.Sprintf("%s.%s.%s.svc.%s\t%s", hostname, pod.Spec.Subdomain, pod.Namespace, domain, hostname)
	}
	var b strings.Builder
	b.WriteString("# Written by decree.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::\tip6-localnet\nff00::\tip6-mcastprefix\nfe00::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, ip := range ips {
		fmt.Fprintf(&b, "%s\t%s\n", ip, names)
	}
	for _, a := range pod.Spec.HostAliases {
		fmt.Fprintf(&b, "%s\t%s\n", a.IP, strings.Join(a.Hostnames, "\t"))
	}
	return []byte(b.String())
}

// ResolvConf is the content of a pod's /etc/resolv.conf, given the node's own.
func ResolvConf(pod *corev1.Pod, dns DNS, node []byte) []byte {
	own := parseResolv(string(node))
	var out resolv
	policy := pod.Spec.DNSPolicy
	if (policy == corev1.DNSClusterFirst || policy == "") && pod.Spec.HostNetwork {
		policy = corev1.DNSDefault
	}
	switch {
	case policy == corev1.DNSNone:
	case policy == corev1.DNSDefault || !dns.Server.IsValid():
		out = own
	default:
		out.nameservers = []string{dns.Server.String()}
		if dns.Domain != "" {
			out.searches = []string{pod.Namespace + ".svc." + dns.Domain, "svc." + dns.Domain, dns.Domain}
		}
		out.searches = append(out.searches, own.searches...)
		out.options = []string{"ndots:5"}
	}
	if c := pod.Spec.DNSConfig; c != nil {
		out.merge(c)
	}
	return out.bytes()
}

type resolv struct{ nameservers, searches, options []string }

func parseResolv(s string) (r resolv) {
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			r.nameservers = append(r.nameservers, f[1])
		case "search":
			r.searches = f[1:]
		case "options":
			r.options = f[1:]
		}
	}
	return r
}

func (r *resolv) merge(c *corev1.PodDNSConfig) {
	r.nameservers = append(r.nameservers, c.Nameservers...)
	r.searches = append(r.searches, c.Searches...)
	for _, o := range c.Options {
		text := o.Name
		if o.Value != nil && *o.Value != "" {
			text += ":" + *o.Value
		}
		r.options = slices.DeleteFunc(r.options, func(have string) bool {
			name, _, _ := strings.Cut(have, ":")
			return name == o.Name
		})
		r.options = append(r.options, text)
	}
}

func (r *resolv) bytes() []byte {
	var b strings.Builder
	if s := unique(r.searches); len(s) > 0 {
		b.WriteString("search " + strings.Join(s[:min(len(s), mostSearches)], " ") + "\n")
	}
	ns := unique(r.nameservers)
	for _, n := range ns[:min(len(ns), mostNameservers)] {
		b.WriteString("nameserver " + n + "\n")
	}
	if o := unique(r.options); len(o) > 0 {
		b.WriteString("options " + strings.Join(o, " ") + "\n")
	}
	return []byte(b.String())
}

// unique keeps the first of equal strings.
func unique(list []string) (out []string) {
	for _, s := range list {
		if s = strings.TrimSpace(s); s != "" && !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// Etc are the generated files of a pod, as paths on the node.
type Etc struct{ Hosts, Hostname, Resolv string }

// WriteEtc writes the pod's hosts, hostname and resolv.conf below its folder. The
// files keep their inodes, so that running containers see new content.
func (p *Pod) WriteEtc(hostname string, ips []string, dns DNS) (Etc, error) {
	dir := filepath.Join(p.Dir, "etc")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Etc{}, err
	}
	var node []byte
	if dns.NodeResolvConf != "" {
		var err error
		if node, err = os.ReadFile(dns.NodeResolvConf); err != nil && !os.IsNotExist(err) {
			return Etc{}, fmt.Errorf("read the node's resolver: %w", err)
		}
	}
	e := Etc{Hosts: filepath.Join(dir, "hosts"), Hostname: filepath.Join(dir, "hostname"), Resolv: filepath.Join(dir, "resolv.conf")}
	for path, data := range map[string][]byte{
		e.Hosts:    Hosts(p.Env.Pod, hostname, dns.Domain, ips),
		e.Hostname: []byte(hostname + "\n"),
		e.Resolv:   ResolvConf(p.Env.Pod, dns, node),
	} {
		if old, err := os.ReadFile(path); err == nil && string(old) == string(data) {
			continue
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			return Etc{}, err
		}
	}
	return e, nil
}
