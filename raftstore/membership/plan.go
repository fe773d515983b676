// Package membership looks after the servers of the cluster: it admits and removes
// them, gives a vote to those that have caught up, removes those that are dead for
// good, and tells operators how each is doing.
//
// What to do is decided by [Plan], a pure function; [Keeper] observes and carries out.
// It knows nothing about certificates: who may call is the business of the listener.
package membership

import (
	"fmt"
	"time"
)

// Observation is what the leader knows of one server.
type Observation struct {
	ID    string
	Node  string
	Voter bool
	// WantsVote is false for servers that only follow.
	WantsVote bool
	Leader    bool
	// Removed says that it was decided to remove the server; whoever decided that did not
	// come to the end of it.
	Removed bool
	// Joined is when the leader first saw the server among the members, Contact when it
	// last answered, and Healthy since when it has answered without a break; zero for never.
	Joined, Contact, Healthy time.Time
	// Behind is how many log entries it has yet to apply.
	Behind uint64
}

// Policy says when servers get a vote and when they are given up. Times are wall time.
type Policy struct {
	// Stable is how long a server must have answered, and Lag how many log entries it
	// may be behind, before it gets a vote.
	Stable time.Duration
	Lag    uint64
	// Grace is how long a dead server is waited for; zero: for ever.
	Grace time.Duration
}

// DefaultPolicy gives up a server after an hour: long enough for a reboot or an
// upgrade, short enough for a failed machine not to be forgotten over a weekend.
var DefaultPolicy = Policy{Stable: time.Second, Lag: 1000, Grace: time.Hour}

// Alive is how long ago a server that is alive has answered at most.
const Alive = 3 * time.Second

// Verb is what to do with a server.
type Verb string

// The verbs.
const (
	Promote Verb = "promote"
	Demote  Verb = "demote"
	Remove  Verb = "remove"
)

// Action is one step, and why.
type Action struct {
	Verb Verb
	ID   string
	Why  string
}

// Plan returns the next step, if there is one. One at a time: the next look sees its
// effect.
//
// A vote is given or taken only if those that answered when they were last asked are a
// majority of the voters now, so that the change can be decided, and a majority
// afterwards, so that the cluster goes on. It is a pure function.
func Plan(now time.Time, p Policy, servers []Observation) (Action, bool) {
	alive := func(o Observation) bool { return o.Leader || now.Sub(o.Contact) <= Alive }
	answers := func(o Observation) bool { return o.Leader || alive(o) && !o.Healthy.IsZero() }
	voters, healthy := 0, 0
	for _, o := range servers {
		if o.Voter {
			voters++
			if answers(o) {
				healthy++
			}
		}
	}
	if healthy <= voters/2 {
		return Action{}, false // no change would be decided
	}
	// without reports whether those that answer are a majority without the vote of one.
	without := func(o Observation) bool {
		left := healthy
		if answers(o) {
			left--
		}
		return !o.Voter || left > (voters-1)/2
	}
	for _, o := range servers {
		if o.Removed && without(o) {
			return Action{Remove, o.ID, "its removal was not completed"}, true
		}
	}
	for _, o := range servers {
		if alive(o) || p.Grace == 0 || !without(o) {
			continue
		}
		last := o.Contact
		if o.Joined.After(last) {
			last = o.Joined
		}
		if now.Sub(last) >= p.Grace {
			return Action{Remove, o.ID, fmt.Sprintf("it has not answered for %s", now.Sub(last).Round(time.Second))}, true
		}
	}
	for _, o := range servers {
		if o.Voter || !o.WantsVote || !answers(o) {
			continue
		}
		if o.Behind <= p.Lag && now.Sub(o.Healthy) >= p.Stable {
			return Action{Promote, o.ID, "it has caught up"}, true
		}
	}
	for _, o := range servers {
		if o.Voter && !o.WantsVote && without(o) {
			return Action{Demote, o.ID, "it wants no vote"}, true
		}
	}
	return Action{}, false
}
