package pki

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"decree.dev/decree/schemas/api"
)

// The groups with a meaning of their own, and the prefixes of the names in them.
const (
	GroupAdmins  = "system:masters"
	GroupNodes   = "system:nodes"
	GroupServers = "system:servers"
	NodePrefix   = "system:node:"
	ServerPrefix = "system:server:"
)

// ServerName is a name that every server's certificate holds. Peers and agents
// verify servers by it, whatever address they were reached under: addresses change,
// and which machines are servers is for the cluster to say, not for DNS.
const ServerName = "decree-server"

const (
	// DefaultLifetime is that of servers' and agents' certificates. There is no list
	// of revoked certificates: a machine that was removed is refused its renewal, so
	// the lifetime bounds how long a stolen key is of use. Kubernetes has a year,
	// Docker Swarm 90 days and SPIFFE hours; the shorter, the sooner a machine that
	// was off must join anew. With 90 days a machine that never restarts renews four
	// to six times a year, and one that is off for a month comes back by itself.
	DefaultLifetime = 90 * 24 * time.Hour
	// unattendedLifetime is that of certificates that nothing renews while they are
	// in use: operators' kubeconfigs, and what Ensure issues at a start.
	unattendedLifetime = 365 * 24 * time.Hour
)

// Request describes a certificate to issue.
type Request struct {
	Name   string   // common name: the user
	Groups []string // organisations: the groups
	// Hosts are the names and addresses a server answers under; a certificate
	// without hosts is for clients only. Servers get both usages, because they also
	// call each other.
	Hosts []string
	// Lifetime of the certificate; zero: DefaultLifetime from [Issuer.Sign], a year
	// from [Authority.Issue]. No certificate outlives its CA.
	Lifetime time.Duration
}

// Admin asks for an operator's certificate.
func Admin(name string) Request {
	return Request{Name: name, Groups: []string{GroupAdmins}, Lifetime: unattendedLifetime}
}

// Node asks for the certificate of the agent on a node.
func Node(name string) Request {
	return Request{Name: NodePrefix + name, Groups: []string{GroupNodes}}
}

// Server asks for the certificate of an API server that answers under hosts.
func Server(hosts ...string) Request {
	// ":7443" has an empty host.
	hosts = slices.DeleteFunc(slices.Clone(hosts), func(h string) bool { return h == "" })
	return Request{Name: ServerName, Hosts: hosts}
}

// ServerIdentity asks for the certificate of the server on a machine, which answers
// under hosts beside [ServerName] and calls its peers.
func ServerIdentity(node string, hosts ...string) Request {
	all := []string{ServerName}
	for _, h := range hosts {
		if !slices.Contains(all, h) {
			all = append(all, h)
		}
	}
	return Request{Name: ServerPrefix + node, Groups: []string{GroupServers}, Hosts: all}
}

// ValidNode reports why name cannot be that of a machine: it goes into certificates
// and names objects, so it must be a DNS name in lower case.
func ValidNode(name string) error {
	if errs := validation.IsDNS1123Subdomain(name); len(errs) > 0 {
		return fmt.Errorf("machine name %.80q: %s", name, errs[0])
	}
	return nil
}

// Who returns the role and the machine that a certificate speaks for. It is false
// for operators, and for every certificate with more than the one group of its role.
// The certificate must have been verified.
func Who(leaf *x509.Certificate) (role, node string, ok bool) {
	if len(leaf.Subject.Organization) != 1 {
		return "", "", false
	}
	switch leaf.Subject.Organization[0] {
	case GroupServers:
		role = api.RoleServer
		node, ok = strings.CutPrefix(leaf.Subject.CommonName, ServerPrefix)
	case GroupNodes:
		role = api.RoleAgent
		node, ok = strings.CutPrefix(leaf.Subject.CommonName, NodePrefix)
	}
	if !ok || ValidNode(node) != nil {
		return "", "", false
	}
	return role, node, true
}

// Hosts returns the names and addresses that a certificate is for.
func Hosts(c *x509.Certificate) []string {
	hosts := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		hosts = append(hosts, ip.String())
	}
	return hosts
}

// validHost reports why h cannot be in a certificate.
func validHost(h string) error {
	if net.ParseIP(h) != nil {
		return nil
	}
	if errs := validation.IsDNS1123Subdomain(strings.ToLower(h)); len(errs) > 0 {
		return fmt.Errorf("host %.80q is neither an IP address nor a DNS name", h)
	}
	return nil
}

const maxHosts = 32

// Check reports why no certificate can be issued for r.
func (r Request) Check() error {
	switch {
	case r.Name == "":
		return errors.New("no name for the certificate")
	case len(r.Hosts) > maxHosts:
		return fmt.Errorf("%d hosts, at most %d are possible", len(r.Hosts), maxHosts)
	case r.Lifetime < 0:
		return fmt.Errorf("lifetime %v is negative", r.Lifetime)
	}
	for _, h := range r.Hosts {
		if err := validHost(h); err != nil {
			return err
		}
	}
	return nil
}

// Fingerprint is the SHA-256 of a certificate (DER) in hexadecimal digits, as
// `openssl x509 -fingerprint -sha256` computes it.
func Fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// KeyHash is the SHA-256 of a public key in its PKIX encoding, in hexadecimal
// digits: what the cluster remembers of a machine to know it again.
func KeyHash(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("hash public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
