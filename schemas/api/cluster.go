package api

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AuthorityName is the name of the only Authority.
const AuthorityName = "cluster"

// Server is one server of the control plane. Its name is the server's id in Raft, so
// that a machine whose disk was lost comes back under another name. Decree writes it
// when the server joins and whenever what it says of itself changes.
type Server struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              ServerSpec   `json:"spec,omitempty"`
	Status            ServerStatus `json:"status,omitempty"`
}

// ServerSpec says which machine the server is and where it is found.
type ServerSpec struct {
	// Node is the name of the machine, the common name of its certificate.
	Node string `json:"node"`
	// Address is host:port of everything the server serves.
	Address string `json:"address"`
	// Site is where the machine stands; free text, empty for the only site.
	Site string `json:"site,omitempty"`
	// NonVoter servers hold everything and never vote.
	NonVoter bool `json:"nonVoter,omitempty"`
}

// ServerStatus is what the server says of itself.
type ServerStatus struct {
	Version string `json:"version,omitempty"`
	// Format is the newest format of log entries that it understands. A format is
	// written once every server understands it.
	Format int `json:"format,omitempty"`
	// KeyEpoch is the epoch of the newest key that it encrypts its disk with.
	KeyEpoch int64 `json:"keyEpoch,omitempty"`
	// Issuer is the fingerprint of the CA that signed its certificate.
	Issuer string `json:"issuer,omitempty"`
	// Removed is set when the server was taken out of the cluster: it must not come
	// back by itself.
	Removed *metav1.Time `json:"removed,omitempty"`
}

// Authority is what the cluster signs and encrypts with. It is internal: it is
// replicated like everything else and never served.
type Authority struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              AuthoritySpec `json:"spec,omitempty"`
}

// AuthoritySpec holds the certificate authorities and the epoch of keys on disk.
type AuthoritySpec struct {
	// CAs are all that are trusted, oldest first. New certificates are signed by
	// Active, which names one of them by its fingerprint.
	CAs    []CertificateAuthority `json:"cas"`
	Active string                 `json:"active"`
	// KeyEpoch asks every server to encrypt its disk with keys no older than this.
	KeyEpoch int64 `json:"keyEpoch,omitempty"`
}

// CertificateAuthority is one generation of the cluster's CA.
type CertificateAuthority struct {
	// Fingerprint is the SHA-256 of the certificate (DER), in hexadecimal digits.
	Fingerprint string `json:"fingerprint"`
	Cert        string `json:"cert"`            // PEM
	Key         string `json:"key"`             // PEM
	Cross       string `json:"cross,omitempty"` // PEM: Cert's key, signed by the CA before it
	// Since is when it was made.
	Since metav1.Time `json:"since"`
}

// JoinToken admits machines to the cluster. It is internal, and holds no secret that
// would let who reads it join. Its name is the token's id.
type JoinToken struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              JoinTokenSpec `json:"spec,omitempty"`
}

// The roles that a token may admit to.
const (
	RoleServer = "server"
	RoleAgent  = "agent"
)

// JoinTokenSpec says whom the token admits, and until when.
type JoinTokenSpec struct {
	Role string `json:"role"`
	// Node, when set, is the only name that the token admits. Such a token also lets
	// a machine with a new key take the name over from one that lost its disk.
	Node string `json:"node,omitempty"`
	// Hash is the SHA-256 of the token's secret, in hexadecimal digits.
	Hash    string      `json:"hash"`
	Expires metav1.Time `json:"expires"`
	// By is who made it.
	By string `json:"by,omitempty"`
}

// Machine is what the cluster remembers of a machine that has joined, to know it
// again: one name belongs to one key. It is internal. Its name is ROLE-NODE.
type Machine struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              MachineSpec   `json:"spec,omitempty"`
	Status            MachineStatus `json:"status,omitempty"`
}

// MachineSpec says who the machine is.
type MachineSpec struct {
	Role string `json:"role"`
	Node string `json:"node"`
	// Key is the SHA-256 of its public key, in hexadecimal digits.
	Key string `json:"key"`
}

// MachineStatus is what the machine holds, for the rotation of the CA.
type MachineStatus struct {
	// Issuer is the fingerprint of the CA that signed its certificate, Trusts those of
	// the CAs that it trusts.
	Issuer string   `json:"issuer,omitempty"`
	Trusts []string `json:"trusts,omitempty"`
	// Expires is when its certificate ends.
	Expires metav1.Time `json:"expires,omitempty"`
}

// MachineName is the name of the Machine that a role and a node make.
func MachineName(role, node string) string { return role + "-" + node }
