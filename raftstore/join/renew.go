package join

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// Renew serves [RenewPath] to servers and agents, who are known by their verified
// client certificate. A GET says what to trust, a POST signs a new key for the same
// identity. Operators do not renew: who has their certificate could do so for ever.
func (s *Server) Renew() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET "+RenewPath, s.limited("trust", s.members, memberOf, s.serveTrust))
	mux.Handle("POST "+RenewPath, s.limited("renew", s.members, memberOf, s.serveRenew))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Before the limits: strangers must not use up what is for members.
		if _, _, _, err := member(r); err != nil {
			s.refuse(w, r, "renew", err)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// memberOf is whom a request of a member is counted to.
func memberOf(r *http.Request) string { return verified(r).Subject.CommonName }

// verified returns the client's certificate, if it leads to a trusted CA.
func verified(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.VerifiedChains[0]) == 0 {
		return nil
	}
	return r.TLS.VerifiedChains[0][0]
}

func member(r *http.Request) (leaf *x509.Certificate, role, node string, err error) {
	leaf = verified(r)
	if leaf == nil {
		return nil, "", "", &failure{http.StatusUnauthorized, "certificate", errors.New("a client certificate of the cluster is needed")}
	}
	role, node, ok := pki.Who(leaf)
	if !ok {
		return nil, "", "", &failure{http.StatusForbidden, "certificate", fmt.Errorf("%q is neither a server nor an agent", leaf.Subject.CommonName)}
	}
	return leaf, role, node, nil
}

// serveTrust answers what is to be trusted, and notes what the member has now.
func (s *Server) serveTrust(ctx context.Context, r *http.Request) (any, error) {
	leaf, role, node, err := member(r)
	if err != nil {
		return nil, err
	}
	issuer, err := s.cluster.Issuer(ctx)
	if err != nil {
		return nil, err
	}
	s.cluster.Seen(ctx, role, node, pki.Holder{
		Name: role + " " + node, Issuer: issuer.SignedBy(leaf), Expires: leaf.NotAfter,
		Trusts: known(issuer, r.URL.Query().Get("trusts")),
	})
	return trust{Active: issuer.Fingerprint(), Bundle: string(issuer.Bundle())}, nil
}

// known keeps of what a member says only what the cluster knows itself.
func known(issuer *pki.Issuer, trusts string) []string {
	var list []string
	for _, fp := range issuer.Fingerprints() {
		if strings.Contains(","+trusts+",", ","+fp+",") {
			list = append(list, fp)
		}
	}
	return list
}

func (s *Server) serveRenew(ctx context.Context, r *http.Request) (any, error) {
	leaf, role, node, err := member(r)
	if err != nil {
		return nil, err
	}
	var req renewRequest
	if err := readJSON(r.Body, &req); err != nil {
		return nil, err
	}
	key, err := pki.ParseCSR([]byte(req.CSR))
	if err != nil {
		return nil, bad(err)
	}
	renewal := Renewal{Role: role, Node: node}
	if renewal.Old, err = pki.KeyHash(leaf.PublicKey); err != nil {
		return nil, err
	}
	if renewal.New, err = pki.KeyHash(key); err != nil {
		return nil, bad(err)
	}
	if err := s.cluster.Renew(ctx, renewal); err != nil {
		return nil, fmt.Errorf("renew %s %s: %w", role, node, err)
	}
	identity := pki.Node(node)
	if role == api.RoleServer {
		identity = pki.ServerIdentity(node, pki.Hosts(leaf)...)
	}
	answer, err := s.sign(ctx, req.CSR, identity)
	if err != nil {
		return nil, err
	}
	s.log.Info("renewed", "role", role, "node", node, "from", r.RemoteAddr)
	return answer, nil
}
