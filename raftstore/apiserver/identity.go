package apiserver

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"decree.dev/decree/raftstore/pki"
)

// Identity is who asks, as their verified client certificate says.
type Identity struct {
	Name   string   // common name
	Groups []string // organisations
}

// Admin reports whether everything is allowed to i.
func (i Identity) Admin() bool { return slices.Contains(i.Groups, pki.GroupAdmins) }

// Node returns the name of the node whose agent i is.
func (i Identity) Node() (name string, ok bool) {
	if !slices.Contains(i.Groups, pki.GroupNodes) {
		return "", false
	}
	name, ok = strings.CutPrefix(i.Name, pki.NodePrefix)
	if !ok || name == "" {
		return "", false
	}
	return name, true
}

// Actor is how transactions name i.
func (i Identity) Actor() string {
	if node, ok := i.Node(); ok {
		return "node/" + node
	}
	return "user/" + i.Name
}

type identityKey struct{}

// IdentityFrom returns who made the request that ctx belongs to. Handlers mounted
// into the server see authenticated requests only.
func IdentityFrom(ctx context.Context) (Identity, bool) {
	i, ok := ctx.Value(identityKey{}).(Identity)
	return i, ok
}

// WithIdentity returns a context that [IdentityFrom] reads.
func WithIdentity(ctx context.Context, i Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, i)
}

// identify reads the identity from the verified chain, never from the certificates
// as sent.
func identify(r *http.Request) (Identity, bool) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.VerifiedChains[0]) == 0 {
		return Identity{}, false
	}
	s := r.TLS.VerifiedChains[0][0].Subject
	return Identity{Name: s.CommonName, Groups: s.Organization}, s.CommonName != ""
}
