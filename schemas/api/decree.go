package api

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// GroupVersion is Decree's own API group.
var GroupVersion = schema.GroupVersion{Group: "decree.dev", Version: "v1"}

// SystemNamespace holds Decree's own objects. Like "default", it exists in every
// cluster and comes from no source.
const SystemNamespace = "decree-system"

// Source is a Git repository whose objects this cluster runs.
type Source struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              SourceSpec   `json:"spec,omitempty"`
	Status            SourceStatus `json:"status,omitempty"`
}

// SourceSpec says where the repository is and how it is followed.
type SourceSpec struct {
	// URL of the repository: an absolute path, file://, https:// or ssh:// (also
	// user@host:path). Empty: the built-in repository of the same name.
	URL string `json:"url,omitempty"`
	// Branch to follow; "main" when Branch, Tag and Commit are all empty. At most
	// one of the three may be set.
	Branch string `json:"branch,omitempty"`
	Tag    string `json:"tag,omitempty"`
	Commit string `json:"commit,omitempty"`
	// Path is the folder of the repository to evaluate; "." when empty.
	Path string `json:"path,omitempty"`
	// Interval between polls of an external repository, 30s when zero; jittered by
	// up to a tenth.
	Interval metav1.Duration `json:"interval,omitempty"`
	// SecretRef names a Secret in the namespace "decree-system" with username and
	// password, or token, and ca.crt for https; identity and known_hosts for ssh.
	SecretRef *corev1.LocalObjectReference `json:"secretRef,omitempty"`
	// Suspend stops following the repository; what runs goes on.
	Suspend bool `json:"suspend,omitempty"`
	// Prune deletes objects that left the repository; true when nil.
	Prune *bool `json:"prune,omitempty"`
	// DeletionBudget is the most objects, or percentage of this source's objects,
	// that one commit may delete; when nil, "50%", or 5 objects where that is more.
	// One deletion is always within it, deleting the last object never is ("100%"
	// allows it).
	DeletionBudget *intstr.IntOrString `json:"deletionBudget,omitempty"`
}

// SourceStatus says how far the cluster has followed the repository.
type SourceStatus struct {
	// Fetched is the newest commit seen, Applied the one in force.
	Fetched string `json:"fetched,omitempty"`
	Applied string `json:"applied,omitempty"`
	// References is the table of the references of a built-in repository beside main:
	// the hash of an object in it. Empty: there are none.
	References string `json:"references,omitempty"`
	// AppliedAt is when Applied came into force; FetchedAt when the last good fetch
	// brought something new, or the first after a failure.
	AppliedAt *metav1.Time `json:"appliedAt,omitempty"`
	FetchedAt *metav1.Time `json:"fetchedAt,omitempty"`
	// Objects is how many objects the applied commit has.
	Objects int64 `json:"objects,omitempty"`
	// Suspended, when set, is an operator's `decree source suspend`.
	Suspended *Suspension `json:"suspended,omitempty"`
	// Conditions: "Ready" is False with reason FetchError, Rewound, CompileError
	// or PlanRefused since lastTransitionTime when following does not work.
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// Suspension records who stopped a source, and when.
type Suspension struct {
	By     string      `json:"by"`
	At     metav1.Time `json:"at"`
	Reason string      `json:"reason,omitempty"`
}

// Revision is the record of one commit that was applied or refused. It is never
// changed after it was written.
type Revision struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              RevisionSpec `json:"spec,omitempty"`
}

// The results a Revision may have.
const (
	RevisionApplied = "Applied"
	RevisionRefused = "Refused"
)

// RevisionSpec is what is known about the commit and its effect.
type RevisionSpec struct {
	Source  string      `json:"source"`
	Commit  string      `json:"commit"`
	Parent  string      `json:"parent,omitempty"` // the commit in force before
	Author  string      `json:"author,omitempty"` // "Name <mail>"
	Time    metav1.Time `json:"time,omitempty"`   // commit time, as the author's machine said
	Subject string      `json:"subject,omitempty"`
	Pusher  string      `json:"pusher,omitempty"` // authenticated identity, for the built-in repository
	Signer  string      `json:"signer,omitempty"` // verified signing key, if any
	Result  string      `json:"result"`           // RevisionApplied or RevisionRefused
	Message string      `json:"message,omitempty"`
	Changes []Change    `json:"changes,omitempty"`
}

// Change is one object's part in a Revision.
type Change struct {
	Verb string `json:"verb"`
	Key  Key    `json:"key"`
	File string `json:"file,omitempty"` // file:line
	// Fields are the paths an update changes, in order; at most 32.
	Fields []string `json:"fields,omitempty"`
}
