package pki

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"decree.dev/decree/schemas/api"
)

// Holder is one process that holds a certificate of the cluster, as far as the
// leader knows.
type Holder struct {
	Name   string   // for messages: "server s1", "agent n3"
	Issuer string   // fingerprint of the CA that signed its certificate; empty: not known
	Trusts []string // fingerprints of the CAs it trusts; empty: not known
	// Expires is when its certificate ends; zero: not known. A holder whose
	// certificate has ended must join anew, and is not waited for.
	Expires time.Time
}

// Fleet is everything that the leader must know to advance the rotation of a CA. A
// holder that is left out is not waited for, and is locked out when the old CA goes:
// that is how an operator gives up on a machine.
type Fleet struct {
	Servers []Holder // every server of the Raft configuration, this one included
	Agents  []Holder // everyone else who was given a certificate
	// Rotate asks for a new CA. It is for the caller to forget the wish once there is one.
	Rotate bool
	// Overlap is how long after its making a new CA stands beside the old one at
	// least, for holders that nobody knows of: kubeconfigs that were copied away.
	Overlap time.Duration
}

// Stage is where the rotation of a CA stands.
type Stage string

// The stages of a rotation, in order.
const (
	StageSteady Stage = "steady" // one CA, good for long
	StageMake   Stage = "make"   // a new CA is wanted: [Successor] makes it
	StageSpread Stage = "spread" // the new CA becomes known everywhere
	StageRenew  Stage = "renew"  // the new CA signs, all renew their certificates
)

// Step is what to do next.
type Step struct {
	Stage Stage
	// Next is the spec to propose; nil: nothing to write now.
	Next *api.AuthoritySpec
	// Waiting says who or what keeps Next from being written.
	Waiting []string
}

// PlanRotation says how the rotation of the CA goes on, given what the spec and the
// fleet are now. Call it whenever one of them has changed, and once an hour; propose
// Next only on the spec it was made from. It changes nothing and needs no memory of
// its own: the spec says which stage it is.
//
//  1. Make. The operator asks, or two thirds of the CA's life are over. [Successor]
//     adds a CA that signs nothing yet.
//  2. Spread. All servers must trust the new CA before it signs, because they verify
//     everyone. Agents are waited for only if the old CA could not certify the new
//     one: otherwise chains lead to either CA, and an agent that was off does not
//     hold up the replacement of a CA that may have been stolen.
//  3. Renew. The new CA signs. When everyone has a certificate of it and trusts it,
//     and the overlap is over, the old one is dropped.
func PlanRotation(spec api.AuthoritySpec, fleet Fleet, now time.Time) (Step, error) {
	if len(spec.CAs) == 0 {
		return Step{}, errors.New("plan rotation: there is no CA")
	}
	if len(fleet.Servers) == 0 {
		return Step{}, errors.New("plan rotation: no server is known, not even this one")
	}
	newest := spec.CAs[len(spec.CAs)-1]
	switch {
	case len(spec.CAs) == 1:
		return planMake(newest, fleet, now)
	case spec.Active != newest.Fingerprint:
		return planSpread(spec, newest, fleet, now), nil
	default:
		return planDrop(spec, newest, fleet, now), nil
	}
}

func planMake(ca api.CertificateAuthority, fleet Fleet, now time.Time) (Step, error) {
	cert, err := parseCA(ca)
	if err != nil {
		return Step{}, fmt.Errorf("plan rotation: %w", err)
	}
	if fleet.Rotate || !now.Before(renewAt(cert)) {
		return Step{Stage: StageMake}, nil
	}
	return Step{Stage: StageSteady}, nil
}

func planSpread(spec api.AuthoritySpec, newest api.CertificateAuthority, fleet Fleet, now time.Time) Step {
	step := Step{Stage: StageSpread}
	wait := slices.Clone(fleet.Servers)
	if newest.Cross == "" {
		wait = append(wait, fleet.Agents...)
	}
	for _, h := range alive(wait, now) {
		if !slices.Contains(h.Trusts, newest.Fingerprint) {
			step.Waiting = append(step.Waiting, h.Name+" to trust the new CA")
		}
	}
	if len(step.Waiting) == 0 {
		next := cloneSpec(spec)
		next.Active = newest.Fingerprint
		step.Next = &next
	}
	return step
}

func planDrop(spec api.AuthoritySpec, newest api.CertificateAuthority, fleet Fleet, now time.Time) Step {
	step := Step{Stage: StageRenew}
	for _, h := range alive(append(slices.Clone(fleet.Servers), fleet.Agents...), now) {
		switch {
		case h.Issuer != newest.Fingerprint:
			step.Waiting = append(step.Waiting, h.Name+" to renew its certificate")
		case !slices.Contains(h.Trusts, newest.Fingerprint):
			step.Waiting = append(step.Waiting, h.Name+" to trust the new CA")
		}
	}
	if until := newest.Since.Add(fleet.Overlap); now.Before(until) {
		step.Waiting = append(step.Waiting, "the overlap to end at "+until.UTC().Format(time.RFC3339))
	}
	if len(step.Waiting) == 0 {
		next := cloneSpec(spec)
		next.CAs = next.CAs[len(next.CAs)-1:]
		next.CAs[0].Cross = "" // it leads to a CA that nobody trusts any more
		step.Next = &next
	}
	return step
}

// alive leaves out those whose certificate has ended, and sorts the rest.
func alive(holders []Holder, now time.Time) []Holder {
	list := slices.DeleteFunc(slices.Clone(holders), func(h Holder) bool {
		return !h.Expires.IsZero() && !now.Before(h.Expires)
	})
	slices.SortStableFunc(list, func(a, b Holder) int { return strings.Compare(a.Name, b.Name) })
	return list
}

func cloneSpec(spec api.AuthoritySpec) api.AuthoritySpec {
	spec.CAs = slices.Clone(spec.CAs)
	return spec
}

// Successor returns the spec with a new CA, which the active one certifies and which
// signs nothing yet. It makes a key: calling it twice makes two different CAs, of
// which only one may be proposed.
func Successor(spec api.AuthoritySpec, now time.Time) (api.AuthoritySpec, error) {
	if len(spec.CAs) != 1 {
		return spec, fmt.Errorf("make a new CA: %d are trusted: wait for the rotation under way, or give up on the machines that hold it up", len(spec.CAs))
	}
	old, err := NewIssuer(spec)
	if err != nil {
		return spec, fmt.Errorf("make a new CA: %w", err)
	}
	made, err := NewAuthoritySpec(now)
	if err != nil {
		return spec, err
	}
	next := made.CAs[0]
	cert, err := parseCA(next)
	if err != nil {
		return spec, err
	}
	cross, err := old.crossSign(cert, now)
	if err != nil {
		return spec, err
	}
	next.Cross = string(cross)
	spec = cloneSpec(spec)
	spec.CAs = append(spec.CAs, next)
	return spec, nil
}
