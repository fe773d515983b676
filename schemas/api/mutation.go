package api

import "k8s.io/apimachinery/pkg/types"

// Verb says what a [Mutation] does.
type Verb uint8

// The verbs. Their numbers are part of the log format: never renumber them.
const (
	// Create adds an object; it is rejected if the key exists.
	Create Verb = iota + 1
	// Update replaces everything but status; it is rejected if the key is absent.
	// An Update that changes nothing takes no revision.
	Update
	// UpdateStatus replaces the status only (for kinds without one, it is Update).
	UpdateStatus
	// Delete removes an object. A Pod that a node may be running is first marked
	// with deletionTimestamp and removed when its node says so (Grace zero).
	Delete
)

// String returns the verb as RBAC and audit spell it.
func (v Verb) String() string {
	switch v {
	case Create:
		return "create"
	case Update:
		return "update"
	case UpdateStatus:
		return "update status"
	case Delete:
		return "delete"
	}
	return "unknown"
}

// Mutation is one intended change of one object: what planners and controllers
// return as data, and what a transaction carries.
type Mutation struct {
	Verb Verb `json:"verb"`
	Key  Key  `json:"key"`
	// Object is the new object; nil for Delete. Its resourceVersion, uid and
	// creationTimestamp are ignored on Create: the state machine assigns them.
	Object Object `json:"-"`
	// Revision, when not zero, must equal the stored resourceVersion.
	Revision uint64 `json:"revision,omitempty"`
	// UID, when not empty, must equal the stored uid.
	UID types.UID `json:"uid,omitempty"`
	// Grace, on Delete of a Pod, is its termination grace in seconds; nil takes the
	// Pod's own, zero removes at once.
	Grace *int64 `json:"grace,omitempty"`
}
