package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/raftstore/seal"
	"decree.dev/decree/schemas/api"
)

// What there is not before the first leader has written it.
var (
	errNoState = apierrors.NewServiceUnavailable("this server does not have the cluster's state yet")
	errNoCA    = apierrors.NewServiceUnavailable("the cluster has no CA yet")
	errNoKeys  = apierrors.NewServiceUnavailable("the cluster has no keys yet")
)

// clusterPath is where operators ask about the cluster itself, and act on it.
const clusterPath = "/decree/v1/"

// Settings is what a machine needs to know of the cluster to run pods.
type Settings struct {
	ClusterID   string       `json:"clusterID"`
	ServiceCIDR netip.Prefix `json:"serviceCIDR"` // of the primary address family
	PodCIDR     netip.Prefix `json:"podCIDR"`
	// Second are the ranges of the other family, if the cluster has two.
	Second  *SecondFamily `json:"second,omitempty"`
	DNS     netip.Addr    `json:"dns"`
	Domain  string        `json:"domain"`
	Servers []string      `json:"servers"` // host:port
}

// SecondFamily are the ranges of the other address family.
type SecondFamily struct {
	ServiceCIDR netip.Prefix `json:"serviceCIDR"`
	PodCIDR     netip.Prefix `json:"podCIDR"`
}

// families are the ranges of each family, the primary one first.
func (s *Settings) families() []command.Ranges {
	list := []command.Ranges{{ServiceCIDR: s.ServiceCIDR, PodCIDR: s.PodCIDR}}
	if s.Second != nil {
		list = append(list, command.Ranges{ServiceCIDR: s.Second.ServiceCIDR, PodCIDR: s.Second.PodCIDR})
	}
	return list
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	Role string        `json:"role"`
	TTL  time.Duration `json:"ttl"` // nanoseconds
	Node string        `json:"node,omitempty"`
}

// Token describes a join token; Text, which admits, is in the answer to its making only.
type Token struct {
	ID      string      `json:"id"`
	Text    string      `json:"token,omitempty"`
	Role    string      `json:"role"`
	Node    string      `json:"node,omitempty"`
	By      string      `json:"by,omitempty"`
	Expires metav1.Time `json:"expires"`
}

// CA describes one certificate authority of the cluster.
type CA struct {
	Fingerprint string      `json:"fingerprint"`
	Active      bool        `json:"active"` // it signs
	Since       metav1.Time `json:"since"`
	// Machines have a certificate of it.
	Machines int `json:"machines"`
}

// CAStatus is where the rotation of the CA stands.
type CAStatus struct {
	Stage   pki.Stage `json:"stage"`
	Waiting []string  `json:"waiting,omitempty"`
	CAs     []CA      `json:"cas"`
}

const (
	defaultTokenTTL = time.Hour
	maxTokenTTL     = 30 * 24 * time.Hour
)

// clusterHandler serves clusterPath: all of it to administrators, the settings to
// everybody who has a certificate.
func (s *server) clusterHandler() http.Handler {
	mux := http.NewServeMux()
	serve := func(pattern string, f func(*http.Request, apiserver.Identity) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			who, _ := apiserver.IdentityFrom(r.Context())
			if !who.Admin() && pattern != "GET "+clusterPath+"settings" {
				apiserver.WriteError(w, apierrors.NewForbidden(api.GroupVersion.WithResource("cluster").GroupResource(), "", fmt.Errorf("user %s is no administrator", who.Name)))
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
			out, err := f(r, who)
			if err != nil {
				apiserver.WriteError(w, inWords(err))
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(out) // the client went away: nobody to tell
		})
	}
	serve("GET "+clusterPath+"settings", func(*http.Request, apiserver.Identity) (any, error) { return s.settings() })
	serve("GET "+clusterPath+"members", func(r *http.Request, _ apiserver.Identity) (any, error) { return s.members.List(r.Context()) })
	serve("DELETE "+clusterPath+"members/{name}", func(r *http.Request, who apiserver.Identity) (any, error) {
		s.cfg.Log.Info("server is removed", "name", r.PathValue("name"), "user", who.Name)
		return struct{}{}, s.members.Remove(r.Context(), r.PathValue("name"), "by user/"+who.Name)
	})
	serve("POST "+clusterPath+"lead", func(r *http.Request, who apiserver.Identity) (any, error) {
		s.cfg.Log.Info("the lead is handed over", "to", r.URL.Query().Get("to"), "user", who.Name)
		return struct{}{}, s.members.Transfer(r.Context(), r.URL.Query().Get("to"))
	})
	serve("POST "+clusterPath+"netcheck", s.netcheck)
	serve("POST "+clusterPath+"tokens", s.createToken)
	serve("GET "+clusterPath+"tokens", s.listTokens)
	serve("DELETE "+clusterPath+"tokens/{id}", s.revokeToken)
	serve("GET "+clusterPath+"ca", func(*http.Request, apiserver.Identity) (any, error) { return s.caStatus() })
	serve("POST "+clusterPath+"ca", func(r *http.Request, who apiserver.Identity) (any, error) {
		s.cfg.Log.Info("the CA is rotated", "user", who.Name)
		if err := s.newCA(r.Context()); err != nil {
			return nil, err
		}
		return s.caStatus()
	})
	serve("GET "+clusterPath+"keys", func(r *http.Request, _ apiserver.Identity) (any, error) { return s.keyStatus(r.Context()) })
	serve("POST "+clusterPath+"keys", func(r *http.Request, who apiserver.Identity) (any, error) {
		s.cfg.Log.Info("the keys of the disks are rotated", "user", who.Name)
		if err := s.rotateKeys(r.Context()); err != nil {
			return nil, err
		}
		return s.keyStatus(r.Context())
	})
	return mux
}

// inWords makes an error of this package one that the API answers with: what the API
// has words for keeps them, and the rest is about the request.
func inWords(err error) error {
	if remote, ok := errors.AsType[*peer.RemoteError](err); ok {
		return apierrors.NewBadRequest(remote.Text)
	}
	var status apierrors.APIStatus
	var rejected *command.Rejection
	if errors.As(err, &status) || errors.As(err, &rejected) {
		return err
	}
	for _, known := range []error{
		raftstore.ErrNotLeader, raftstore.ErrLeadershipLost, raftstore.ErrClosed, raftstore.ErrFatal, seal.ErrNoSpace,
		context.DeadlineExceeded, context.Canceled,
	} {
		if errors.Is(err, known) {
			return err
		}
	}
	return apierrors.NewBadRequest(err.Error())
}

func (s *server) settings() (*Settings, error) {
	born := s.store.View().Settings()
	if born == nil {
		return nil, errNoState
	}
	out := &Settings{
		ClusterID: born.ClusterID, ServiceCIDR: born.ServiceCIDR, PodCIDR: born.PodCIDR, DNS: born.DNS, Domain: s.cfg.Domain, Servers: s.addresses(),
	}
	if families := born.Families(); len(families) > 1 {
		out.Second = &SecondFamily{families[1].ServiceCIDR, families[1].PodCIDR}
	}
	return out, nil
}

func (s *server) createToken(r *http.Request, who apiserver.Identity) (any, error) {
	var in TokenRequest
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		return nil, fmt.Errorf("read request: %w", err)
	}
	switch {
	case in.Role != api.RoleServer && in.Role != api.RoleAgent:
		return nil, fmt.Errorf("role %q: expected %s or %s", in.Role, api.RoleServer, api.RoleAgent)
	case in.TTL == 0:
		in.TTL = defaultTokenTTL
	case in.TTL < 0 || in.TTL > maxTokenTTL:
		return nil, fmt.Errorf("ttl %s: expected up to %s: who finds a token can join with it", in.TTL, maxTokenTTL)
	}
	issuer, err := s.issuer()
	if err != nil {
		return nil, err
	}
	text, obj, err := pki.NewToken(issuer.Fingerprints(), api.JoinTokenSpec{Role: in.Role, Node: in.Node, By: who.Name}, in.TTL, time.Now())
	if err != nil {
		return nil, err
	}
	obj.SetGroupVersionKind(api.GroupVersion.WithKind("JoinToken"))
	res, err := s.store.Propose(r.Context(), command.Txn{
		Key: "token/" + obj.Name, Actor: "server/" + s.id, Reason: "token for " + in.Role + " by user/" + who.Name,
		Mutations: []api.Mutation{{Verb: api.Create, Key: api.KeyOf(obj), Object: obj}},
	})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("make token: %w", err)
	}
	s.cfg.Log.Info("token made", "id", obj.Name, "role", in.Role, "node", in.Node, "ttl", in.TTL, "user", who.Name)
	t := describeToken(obj)
	t.Text = text
	return t, nil
}

func describeToken(o *api.JoinToken) Token {
	return Token{ID: o.Name, Role: o.Spec.Role, Node: o.Spec.Node, By: o.Spec.By, Expires: o.Spec.Expires}
}

func (s *server) listTokens(r *http.Request, _ apiserver.Identity) (any, error) {
	view, err := s.store.Read(r.Context())
	if err != nil {
		return nil, err
	}
	list := []Token{}
	for o := range api.List[*api.JoinToken](view, "") {
		if time.Now().Before(o.Spec.Expires.Time) {
			list = append(list, describeToken(o))
		}
	}
	return list, nil
}

func (s *server) revokeToken(r *http.Request, who apiserver.Identity) (any, error) {
	id := r.PathValue("id")
	found := false
	err := s.change(r.Context(), "revoke token "+id+" by user/"+who.Name, func(view api.Reader) ([]api.Mutation, error) {
		o, ok := api.Get[*api.JoinToken](view, "", id)
		if !ok {
			return nil, nil
		}
		found = true
		return []api.Mutation{api.Guarded(api.Delete, o)}, nil
	})
	if err == nil && !found {
		return nil, apierrors.NewNotFound(api.GroupVersion.WithResource("tokens").GroupResource(), id)
	}
	return struct{}{}, err
}

func (s *server) caStatus() (*CAStatus, error) {
	a, ok := api.Get[*api.Authority](s.store.View(), "", api.AuthorityName)
	if !ok {
		return nil, errNoCA
	}
	fleet := s.fleet()
	step, err := pki.PlanRotation(a.Spec, fleet, time.Now())
	if err != nil {
		return nil, err
	}
	out := &CAStatus{Stage: step.Stage, Waiting: step.Waiting, CAs: []CA{}}
	for _, ca := range a.Spec.CAs {
		row := CA{Fingerprint: ca.Fingerprint, Active: ca.Fingerprint == a.Spec.Active, Since: ca.Since}
		for _, h := range append(fleet.Servers, fleet.Agents...) {
			if h.Issuer == ca.Fingerprint {
				row.Machines++
			}
		}
		out.CAs = append(out.CAs, row)
	}
	return out, nil
}
