package membership

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// Self is what a server says of itself.
type Self struct {
	ID string `json:"id"`
	api.ServerSpec
	api.ServerStatus
}

// Status is what a server answers when it is asked how it does.
type Status struct {
	Self
	raftstore.Progress
	// Leader is the id of the server that it follows, its own if it leads.
	Leader string `json:"leader,omitempty"`
	// Trouble says what is wrong with it, empty if nothing is.
	Trouble string `json:"trouble,omitempty"`
}

// Caller calls the handlers of other servers, as [peer.Client] does.
type Caller interface {
	Call(ctx context.Context, address, name string, in, out any) error
}

// Keeper is one server's part in looking after all of them. Store, Peers, Self and
// Log are required.
type Keeper struct {
	Store *raftstore.Store
	Peers Caller
	// Self returns what this server says of itself now.
	Self func() Self
	// Trouble says what is wrong with this server; nil: nothing ever is.
	Trouble func() string
	Policy  Policy
	Log     *slog.Logger

	mu      sync.Mutex
	seen    map[string]*contact // by id; in the leader's memory only
	probing string              // the leader of whom it is being found out whether its process has ended
}

// contact is what was seen of a server.
type contact struct {
	first         time.Time // when it was first among the members
	last, healthy time.Time // when it last answered, and since when it always has
	status        Status
	behind        uint64 // log entries, when it answered
	err           error
}

const (
	// look is the time between two looks at the servers.
	look = 500 * time.Millisecond
	// patience is how long one has to answer.
	patience = 2 * time.Second
)

// status describes this server.
func (k *Keeper) status() Status {
	st := Status{Self: k.Self(), Progress: k.Store.Progress()}
	st.Leader, _ = k.Store.Leader()
	if k.Trouble != nil {
		st.Trouble = k.Trouble()
	}
	return st
}

// Lead looks after the servers until ctx ends: run it while this server leads.
func (k *Keeper) Lead(ctx context.Context) error {
	k.mu.Lock()
	k.seen = map[string]*contact{}
	k.mu.Unlock()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		k.observe(ctx)
		if err := k.act(ctx); err != nil && ctx.Err() == nil {
			k.Log.Warn("looking after the servers", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// observe asks every server how it does.
func (k *Keeper) observe(ctx context.Context) {
	begun, commit := time.Now(), k.Store.Progress().Commit // before they answer: who is up to date is not behind
	answers := k.ask(ctx)
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.seen == nil {
		k.seen = map[string]*contact{}
	}
	for id, a := range answers {
		c := k.seen[id]
		if c == nil {
			c = &contact{first: begun}
			k.seen[id] = c
		}
		if c.err = a.err; a.err != nil {
			c.healthy = time.Time{}
			continue
		}
		c.last, c.status = now, a.status
		c.behind = commit - min(commit, a.status.Applied)
		if c.healthy.IsZero() {
			c.healthy = now
		}
	}
}

type answer struct {
	status Status
	err    error
}

// ask calls every server of the configuration, this one included.
func (k *Keeper) ask(ctx context.Context) map[string]answer {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var mu sync.Mutex
	var calls sync.WaitGroup
	answers := map[string]answer{}
	self := k.Self().ID
	for _, m := range k.Store.Members() {
		if m.ID == self {
			mine := answer{status: k.status()}
			mu.Lock() // the others may answer already
			answers[m.ID] = mine
			mu.Unlock()
			continue
		}
		calls.Go(func() {
			var a answer
			a.err = k.Peers.Call(ctx, m.Address, callStatus, struct{}{}, &a.status)
			if a.err == nil && a.status.ID != m.ID {
				a.err = fmt.Errorf("another server answers at %s: %s", m.Address, a.status.ID)
			}
			mu.Lock()
			defer mu.Unlock()
			answers[m.ID] = a
		})
	}
	calls.Wait()
	return answers
}

// changed returns what members say of themselves, where the state has something else: what
// a server announced may have been overtaken by what it had announced before.
func (k *Keeper) changed() (list []Self) {
	k.mu.Lock()
	defer k.mu.Unlock()
	view := k.Store.View()
	for _, m := range k.Store.Members() {
		if c := k.seen[m.ID]; c != nil && c.err == nil && c.status.ID == m.ID {
			if next, _, err := admission(view, c.status.Self); err == nil && next != nil {
				list = append(list, c.status.Self)
			}
		}
	}
	return list
}

// act takes the step that the plan asks for, and takes down what servers say.
func (k *Keeper) act(ctx context.Context) error {
	for _, who := range k.changed() {
		if err := k.AdmitHere(ctx, who); err != nil {
			return err
		}
	}
	now := time.Now()
	action, ok := Plan(now, k.Policy, k.observations(now))
	if !ok {
		return nil
	}
	k.Log.Info("server", "action", action.Verb, "id", action.ID, "why", action.Why)
	if action.Verb == Remove {
		return k.remove(ctx, action.ID, action.Why)
	}
	for _, m := range k.Store.Members() {
		if m.ID == action.ID {
			m.Voter = action.Verb == Promote
			return k.Store.SetMember(ctx, m)
		}
	}
	return nil
}

// observations puts together what is known. Nobody is held to have been silent before
// this server began to look, by its own clock: that of the state may be another one's.
func (k *Keeper) observations(now time.Time) []Observation {
	k.mu.Lock()
	defer k.mu.Unlock()
	view := k.Store.View()
	var list []Observation
	for _, m := range k.Store.Members() {
		o := Observation{ID: m.ID, Voter: m.Voter, WantsVote: true, Leader: m.Leader, Joined: now}
		if s, ok := api.Get[*api.Server](view, "", m.ID); ok {
			o.Node, o.WantsVote, o.Removed = s.Spec.Node, !s.Spec.NonVoter, s.Status.Removed != nil
		} else {
			o.Removed = !m.Leader // who joins is in the state first, so this one was let in again before it was out
		}
		if c := k.seen[m.ID]; c != nil {
			o.Joined, o.Contact, o.Healthy, o.Behind = c.first, c.last, c.healthy, c.behind
		}
		list = append(list, o)
	}
	return list
}

// Server is one row of `decree members`.
type Server struct {
	ID      string `json:"id"`
	Node    string `json:"node"`
	Address string `json:"address"`
	Site    string `json:"site,omitempty"`
	Version string `json:"version,omitempty"`
	// Role is "leader", "voter", "learner" (gets a vote when it has caught up) or
	// "non-voter".
	Role string `json:"role"`
	// State is "healthy", "unreachable" or what trouble the server tells of.
	State string `json:"state"`
	// ContactMillis is how long ago it answered the leader, -1 for never since this
	// leader leads; Behind how many log entries it has yet to apply.
	ContactMillis int64  `json:"contactMillis"`
	Behind        uint64 `json:"behind"`
	Applied       uint64 `json:"applied"`
	Error         string `json:"error,omitempty"`
}

// Servers describes all servers as the leader sees them. On the leader only.
func (k *Keeper) Servers() ([]Server, error) {
	if !k.Store.Leads() {
		return nil, fmt.Errorf("list the servers: %w", raftstore.ErrNotLeader)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	now, view := time.Now(), k.Store.View()
	list := []Server{}
	for _, m := range k.Store.Members() {
		row := Server{ID: m.ID, Address: m.Address, Role: "voter", State: "unreachable", ContactMillis: -1}
		wantsVote := true
		if s, ok := api.Get[*api.Server](view, "", m.ID); ok {
			row.Node, row.Site, row.Version, wantsVote = s.Spec.Node, s.Spec.Site, s.Status.Version, !s.Spec.NonVoter
		}
		switch {
		case m.Leader:
			row.Role = "leader"
		case !m.Voter && wantsVote:
			row.Role = "learner"
		case !m.Voter:
			row.Role = "non-voter"
		}
		if c := k.seen[m.ID]; c != nil {
			k.describe(&row, c, now)
		}
		list = append(list, row)
	}
	slices.SortFunc(list, func(a, b Server) int { return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.ID, b.ID)) })
	return list, nil
}

func (k *Keeper) describe(row *Server, c *contact, now time.Time) {
	row.Applied, row.Behind = c.status.Applied, c.behind
	if !c.last.IsZero() {
		row.ContactMillis = now.Sub(c.last).Milliseconds()
	}
	if c.err != nil {
		row.Error = c.err.Error()
	}
	if now.Sub(c.last) <= Alive {
		row.State = cmp.Or(c.status.Trouble, "healthy")
	}
}

// propose writes about servers.
func (k *Keeper) propose(ctx context.Context, reason string, ms ...api.Mutation) error {
	res, err := k.Store.Propose(ctx, command.Txn{Key: rand.Text(), Actor: "server/" + k.Self().ID, Reason: reason, Mutations: ms})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", reason, err)
	}
	return nil
}
