// Package join lets machines into a cluster over HTTPS, and keeps them in: a machine
// that has a join token gets its first certificate, one that has a certificate gets
// the next one, and learns which CAs are to be trusted.
//
// A joining machine verifies the cluster first, by the fingerprint of the CA in its
// token, and sends nothing secret before. The cluster decides who it is: of its
// certificate request only the key counts. One name belongs to one key. A second
// machine that asks for a name in use is refused, as K3s does (node passwords), and
// unlike kubeadm, which looks only at whether the node is ready: a node that reboots
// must not lose its identity, and with it the secrets of its pods, to whoever has a
// token. The name becomes free when the machine is removed from the cluster; a token
// made for this one name ([api.JoinTokenSpec.Node]) replaces the machine at once.
//
// The package has no state of the cluster: see [Cluster]. It touches no disk.
package join

import (
	"context"
	"errors"
	"time"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// Paths of the two handlers. The first is for anybody, the second for who has a
// client certificate.
const (
	JoinPath  = "/join/v1/"
	RenewPath = "/renew/v1"

	caPath = JoinPath + "ca"
)

// What a [Cluster] refuses with.
var (
	// ErrNameTaken says that a machine of this name, with another key, is a member.
	ErrNameTaken = errors.New("a machine of this name is a member already: remove it first, choose another name, or make a token for replacing it with `decree token create --node`")
	// ErrReplaced says that the name belongs to another key by now.
	ErrReplaced = errors.New("another machine has taken this name over")
	// ErrRemoved says that the machine was removed from the cluster.
	ErrRemoved = errors.New("this machine was removed from the cluster: join again with a token")
)

// Cluster is what the handlers need to know of the cluster, and do in it. All methods
// may be called concurrently. Errors other than the ones of this package mean that
// the cluster cannot answer now; strangers are not told which they are.
type Cluster interface {
	// Token returns the token of that id.
	Token(ctx context.Context, id string) (*api.JoinToken, bool, error)
	// Issuer returns who signs now, and whom to trust.
	Issuer(ctx context.Context) (*pki.Issuer, error)
	// Admit records, in one step with looking, that a.Key speaks for a.Node in a.Role.
	// It returns ErrNameTaken if another key does, unless a.Replace. Recording the same
	// again changes nothing: a machine repeats what was not answered.
	Admit(ctx context.Context, a Admission) error
	// Renew records, in one step with looking, that r.New speaks instead of r.Old. If
	// r.New does already that is fine; if neither does, it returns ErrReplaced, and
	// ErrRemoved for who is no member.
	Renew(ctx context.Context, r Renewal) error
	// Seen is told what a member's certificate and trust are, for the rotation of the
	// CA. It must not block for long.
	Seen(ctx context.Context, role, node string, h pki.Holder)
	// Info returns what a joining machine is told.
	Info(ctx context.Context) (Info, error)
}

// Admission is a machine that has shown a valid token.
type Admission struct {
	Token   string   // id of the token
	Role    string   // api.RoleServer or api.RoleAgent
	Node    string   // name of the machine
	Key     string   // pki.KeyHash of its public key
	Hosts   []string // of a server: where it answers
	Replace bool     // the token was made for this name, and may take it over
	Source  string   // address that it asked from
}

// Renewal is a member that changes its key.
type Renewal struct {
	Role, Node string
	Old, New   string // pki.KeyHash
}

// Info is what a joining machine is told about the cluster.
type Info struct {
	ClusterID string   `json:"clusterID"`
	Servers   []string `json:"servers"` // host:port
}

// What goes over the wire, as JSON.
type (
	joinRequest struct {
		ID     string   `json:"id"`
		Secret string   `json:"secret"`
		Role   string   `json:"role"`
		Node   string   `json:"node"`
		Hosts  []string `json:"hosts,omitempty"`
		CSR    string   `json:"csr"`
	}
	renewRequest struct {
		CSR string `json:"csr"`
	}
	// certificates answers both.
	certificates struct {
		Info
		Chain  string `json:"chain"`
		Bundle string `json:"bundle"`
	}
	// trust answers who asks what to trust.
	trust struct {
		Active string `json:"active"` // fingerprint of the CA that signs
		Bundle string `json:"bundle"`
	}
	refusal struct {
		Code  string `json:"code"`
		Error string `json:"error"`
	}
)

const (
	maxBody    = 64 << 10         // bytes of a request or an answer
	bodyTime   = 10 * time.Second // to send a request's body
	answerTime = 20 * time.Second // for the cluster to decide
)

// The codes of refusals that clients tell apart.
const (
	codeBad         = "bad-request"
	codeBusy        = "busy"
	codeUnavailable = "unavailable"
	codeToken       = "token"
)

var codes = []struct {
	err  error
	code string
}{
	{pki.ErrTokenExpired, "token-expired"}, // before ErrToken, which they are too
	{pki.ErrTokenRole, "token-role"},
	{pki.ErrTokenNode, "token-node"},
	{pki.ErrToken, codeToken},
	{ErrNameTaken, "name-taken"},
	{ErrReplaced, "replaced"},
	{ErrRemoved, "removed"},
}
