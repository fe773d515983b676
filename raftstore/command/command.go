// Package command is the vocabulary of the replicated log: transactions, their
// results, and the versioned encoding of log entries and of single objects.
//
// It is pure: bytes in, values out. What a transaction does to the state is the
// business of raftstore/state; how entries travel is that of raftstore.
package command

import (
	"fmt"
	"net/netip"

	"decree.dev/decree/schemas/api"
)

// Txn is the unit of change: all of its mutations happen, or none do. It is pure
// data; the state machine adds nothing to it but what it can derive from the log.
type Txn struct {
	// Key makes a retry harmless: a Txn whose key was applied already returns the
	// first result. Empty means no protection. A rejected Txn changed nothing and is
	// not remembered.
	Key string
	// Time is the proposer's clock in milliseconds since 1970. The state machine
	// has no clock of its own; it uses max(Time, the newest time it has seen).
	Time int64
	// Actor is who asks: "git/SOURCE", "controller/NAME", "node/NAME", "user/NAME".
	Actor string
	// Reason is a short text for the audit log.
	Reason string
	// Commit is set when the transaction carries a Git commit into force. Only such
	// a transaction may create, update or delete objects that come from Git, and
	// only those of its own source.
	Commit *Commit
	// Bootstrap is set in the first transaction of a cluster, and only there.
	Bootstrap *Bootstrap
	// Part is set when this is only a piece of a transaction, see [Split].
	Part *Part
	// Mutations are applied in order. Each key may occur once.
	Mutations []api.Mutation
}

// Bootstrap holds the settings a cluster is born with. They live in the state, so
// that every replica allocates alike.
type Bootstrap struct {
	// ClusterID names the cluster for ever; UIDs are derived from it.
	ClusterID string
	// ServiceCIDR is the range of service addresses, between /8 and /30 wide for
	// IPv4 (or as many addresses for IPv6). Its first and last address are not used.
	ServiceCIDR netip.Prefix
	// PodCIDR is cut into one range of NodeMask bits per Node.
	PodCIDR  netip.Prefix
	NodeMask int
	// Second are the ranges of the other address family; zero in a cluster of one family.
	Second Ranges
	// NodePorts are the ports that Services get on the nodes; zero for
	// [DefaultNodePorts].
	NodePorts PortRange
	// DNS is the cluster DNS address; it lies in ServiceCIDR and no Service gets it.
	DNS netip.Addr
	// Restored is set when the cluster was made from a backup of another one.
	Restored *Restored
}

// Ranges are where the addresses of one family come from, as in [Bootstrap].
type Ranges struct {
	ServiceCIDR netip.Prefix
	PodCIDR     netip.Prefix
	NodeMask    int
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// DefaultNodePorts is the range that Kubernetes uses.
var DefaultNodePorts = PortRange{30000, 32767}

// String writes r as "30000-32767".
func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

// Families returns the ranges of each address family of the cluster, the primary one
// first.
func (b *Bootstrap) Families() []Ranges {
	families := []Ranges{{b.ServiceCIDR, b.PodCIDR, b.NodeMask}}
	if b.Second != (Ranges{}) {
		families = append(families, b.Second)
	}
	return families
}

// NodePortRange is NodePorts, or the default.
func (b *Bootstrap) NodePortRange() PortRange {
	if b.NodePorts == (PortRange{}) {
		return DefaultNodePorts
	}
	return b.NodePorts
}

// extended reports whether b says what only format 3 can.
func (b *Bootstrap) extended() bool { return b.Second != (Ranges{}) || b.NodePorts != (PortRange{}) }

// Restored says which cluster another one was made from, and how far that one had
// come in the backup.
type Restored struct {
	ClusterID string // of the old cluster
	Revision  uint64 // of the backup
	Time      int64  // when it was restored, in milliseconds since 1970
}

// Commit says which commit a transaction brings into force.
type Commit struct {
	Source string
	// Parent must equal the source's applied commit ("" for the first): two
	// deliveries of one source can never interleave.
	Parent string
	// Revision is the record to keep, Refused ones included (these carry no other
	// mutations, and Parent is not compared). Its name is assigned.
	Revision *api.Revision
}

// Result is the deterministic outcome of one Txn. A rejection is a Result, never
// an error of Apply.
type Result struct {
	// Revision is the revision of the state after the Txn (unchanged if rejected).
	Revision uint64
	// Missing is how many parts are still missing after this Txn with a Part: the
	// transaction that it belongs to has not happened yet. When it is not zero although
	// all parts were proposed, the state machine has given the first ones up: propose
	// all of them again.
	Missing int
	// Rejected is nil when the Txn was applied.
	Rejected *Rejection
}

// Err returns the rejection as an error (match it with errors.As), nil if the Txn
// was applied.
func (r Result) Err() error {
	if r.Rejected == nil {
		return nil
	}
	return r.Rejected
}

// Code classifies a [Rejection].
type Code uint8

// The codes. Their numbers are part of the log format.
const (
	Conflict  Code = iota + 1 // a Revision, UID or Parent precondition does not hold
	Exists                    // Create of a key that exists
	NotFound                  // Update, UpdateStatus or Delete of an absent key
	Forbidden                 // a write to an object that comes from Git, outside a commit
	Invalid                   // the mutation makes no sense (no object, duplicate key, exhausted range)
	Busy                      // too many large transactions are on their way: try again later
)

// String names the code as metrics and logs spell it.
func (c Code) String() string {
	switch c {
	case Conflict:
		return "conflict"
	case Exists:
		return "exists"
	case NotFound:
		return "not_found"
	case Forbidden:
		return "forbidden"
	case Invalid:
		return "invalid"
	case Busy:
		return "busy"
	}
	return "unknown"
}

// Rejection says why a Txn changed nothing. It is an error.
type Rejection struct {
	Code    Code
	Key     api.Key // the offending object, if there is one
	Message string
}

// Error implements error.
func (r *Rejection) Error() string {
	if r.Key.Name == "" {
		return r.Message
	}
	return r.Key.String() + ": " + r.Message
}
