package command

import (
	"errors"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// The formats of log entries. A format is written once every server of the cluster
// reads it (Server.status.format); until then nobody can write what needs it.
// Format 2 brought parts of large transactions, and the kinds of the control plane.
// Format 3 brought node ports and second address families of Services, clusters with
// ranges of both families, AddressPools, NetworkPolicies and Ingresses: a server of the version before would store
// such a Service and assign nothing to it.
const (
	Oldest = 1 // read as long as a log or a snapshot may hold it
	Newest = newest

	// FormatOfParts is the oldest format that has parts of large transactions.
	FormatOfParts = sinceParts
)

// since is the format that brought a kind to the log, for those that were not there
// from the start: an older version does not know them.
var since = map[api.Resource]int{
	api.Servers:     2,
	api.Authorities: 2,
	api.JoinTokens:  2,
	api.Machines:    2,

	api.AddressPools:    3,
	api.NetworkPolicies: 3,
	api.Ingresses:       3,
	api.IngressClasses:  3,
}

// FormatOfKind is the oldest format in which objects of a resource can be written.
func FormatOfKind(r api.Resource) int { return max(Oldest, since[r]) }

// FormatOf is the oldest format in which t can be written.
func FormatOf(t *Txn) int {
	format := Oldest
	if t.Part != nil {
		format = max(FormatOfParts, t.Part.Format)
	}
	if s := t.Bootstrap; s != nil && s.Restored != nil {
		format = max(format, 2)
	}
	if s := t.Bootstrap; s != nil && s.extended() {
		format = max(format, 3)
	}
	two, three := younger(t.Mutations)
	switch {
	case three:
		format = max(format, 3)
	case two:
		format = max(format, 2)
	}
	return format
}

// younger reports whether there are mutations that format 2 brought, or format 3.
func younger(ms []api.Mutation) (two, three bool) {
	for i := range ms {
		m := &ms[i]
		since := FormatOfKind(m.Key.Resource)
		if svc, ok := m.Object.(*corev1.Service); ok {
			if svc != nil && Assigned(svc) {
				since = 3
			}
		} else if m.Object != nil {
			since = max(since, FormatOfKind(api.KindOf(m.Object).Resource))
		}
		two, three = two || since == 2, three || since == 3
	}
	return two, three
}

// Assigned reports whether a Service asks for more than the one cluster address that it
// could have from the start: for node ports, or for a choice of address families. What
// the state machine wrote into a Service of the first kind itself is no such request.
func Assigned(svc *corev1.Service) bool {
	s := &svc.Spec
	switch {
	case s.Type == corev1.ServiceTypeNodePort || s.Type == corev1.ServiceTypeLoadBalancer:
		return true
	case s.IPFamilyPolicy != nil && *s.IPFamilyPolicy != corev1.IPFamilyPolicySingleStack, len(s.IPFamilies) > 1, len(s.ClusterIPs) > 1:
		return true
	case len(s.IPFamilies) == 0 || s.ClusterIP == corev1.ClusterIPNone || s.Type == corev1.ServiceTypeExternalName:
		return false
	}
	a, err := netip.ParseAddr(s.ClusterIP)
	return err != nil || a.Is4() != (s.IPFamilies[0] == corev1.IPv4Protocol)
}

// formatOfEncoded is FormatOf for what EncodeTxn wrote.
func formatOfEncoded(b []byte) (int, error) {
	r := reader{b: b, format: Newest}
	var t Txn
	flags := r.txnHead(&t, &t)
	format := Oldest
	if flags&^knownFlags1 != 0 {
		format = 2
	}
	if flags&^knownFlags2 != 0 {
		format = 3
	}
	if flags&hasPart != 0 {
		format = max(format, FormatOfParts, r.small())
	}
	return format, r.err
}

// ErrFormat is matched by the errors about a transaction that the cluster's servers
// could not all read. Nothing was written.
var ErrFormat = errors.New("not every server understands this yet")

// FormatError says which format a transaction needs. It matches [ErrFormat].
type FormatError struct {
	Need int // the format that the transaction needs
	Have int // the newest that every server reads
}

// Error implements error.
func (e *FormatError) Error() string {
	return fmt.Sprintf("this needs log format %d, and not every server of the cluster understands more than format %d: upgrade all servers first (`decree members` shows their versions)", e.Need, e.Have)
}

// Is makes errors.Is(err, ErrFormat) hold.
func (e *FormatError) Is(target error) bool { return target == ErrFormat }

// VersionError says that an entry was written by a version of Decree that this one
// does not understand. Such an entry stops the server; it is never skipped.
type VersionError struct {
	Got int // the format of the entry
	Max int // the newest that is understood here
}

// Error implements error.
func (e *VersionError) Error() string {
	if e.Got < Oldest {
		return fmt.Sprintf("log format %d is too old, this version of decree understands formats %d to %d: run the version that wrote it, let it take a snapshot, then upgrade", e.Got, Oldest, e.Max)
	}
	return fmt.Sprintf("log format %d is not known, this version of decree understands formats %d to %d: upgrade this server to the version that wrote it "+
		"(a downgrade cannot undo what was written since; to go back, restore a backup from before the upgrade)", e.Got, Oldest, e.Max)
}
