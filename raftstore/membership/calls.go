package membership

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// The names of the calls between servers.
const (
	callStatus   = "status"
	callAnnounce = "announce"
	callServers  = "servers"
	callRemove   = "remove"
	callTransfer = "transfer"
)

// Handlers are the calls that a Keeper answers.
func (k *Keeper) Handlers() map[string]peer.Handler {
	return map[string]peer.Handler{
		callStatus:   peer.On(func(context.Context, peer.Identity, struct{}) (any, error) { return k.status(), nil }),
		callAnnounce: peer.On(k.admit),
		callServers:  peer.On(func(context.Context, peer.Identity, struct{}) (any, error) { return k.Servers() }),
		callRemove: peer.On(func(ctx context.Context, _ peer.Identity, in target) (any, error) {
			return struct{}{}, k.removeHere(ctx, in.ID, in.Why)
		}),
		callTransfer: peer.On(func(ctx context.Context, _ peer.Identity, in target) (any, error) {
			return struct{}{}, k.Store.TransferLeadership(ctx, in.ID)
		}),
	}
}

type target struct {
	ID  string `json:"id"`
	Why string `json:"why,omitempty"`
}

// Announce tells the leader who this server is, and so joins the cluster if it is not
// in it yet. servers are addresses to ask; any server passes the word on. What is refused
// for good matches [IsRemoved] or [IsTooOld].
func (k *Keeper) Announce(ctx context.Context, servers []string) error {
	var errs []error
	for _, address := range servers {
		err := k.Peers.Call(ctx, address, callAnnounce, k.Self(), nil)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("tell the cluster about this server: %w", errors.Join(errs...))
}

// admit takes down what a server says of itself, and adds it to the cluster if it is
// new. A server that does not lead passes the word on, once.
func (k *Keeper) admit(ctx context.Context, from peer.Identity, who Self) (any, error) {
	passedOn := slices.Contains(from.Groups, pki.GroupServers) && from.Name != pki.ServerPrefix+who.Node
	if !slices.Contains(from.Groups, pki.GroupServers) {
		return nil, fmt.Errorf("%s is no server", from.Name)
	}
	if !k.Store.Leads() {
		_, leader := k.Store.Leader()
		if passedOn || leader == "" {
			return nil, fmt.Errorf("announce %s: %w", who.ID, raftstore.ErrNotLeader)
		}
		return struct{}{}, k.Peers.Call(ctx, leader, callAnnounce, who, nil)
	}
	return struct{}{}, k.AdmitHere(ctx, who)
}

// AdmitHere is [Keeper.Announce] on the leader. What it refuses for good matches
// [IsRemoved] or [IsTooOld].
func (k *Keeper) AdmitHere(ctx context.Context, who Self) error {
	// First the word, then the membership: what formats may be written depends on what
	// every member understands.
	for {
		view, err := k.Store.Read(ctx)
		if err != nil {
			return err
		}
		if !isMember(k.Store.Members(), who.ID) {
			if err := k.Store.CheckFormat(who.ID, who.Format); err != nil {
				return err
			}
		}
		m, gone, err := admission(view, who)
		if IsRemoved(err) && who.ID == k.Self().ID && isMember(k.Store.Members(), who.ID) {
			return nil // it leads, so it has to complete its own removal
		}
		if err != nil {
			return err
		}
		for _, id := range gone {
			k.Log.Info("server", "action", "replace", "id", id, "by", who.ID)
			if err := k.Store.RemoveMember(ctx, id); err != nil {
				return err
			}
		}
		if m == nil {
			break
		}
		if err := k.propose(ctx, "server "+who.ID+" announces itself", *m); err != nil && !overtaken(err) {
			return err
		}
	}
	m := raftstore.Member{ID: who.ID, Address: who.Address}
	for _, have := range k.Store.Members() {
		if have.ID == who.ID {
			m.Voter = have.Voter // Plan gives it or takes it
		}
	}
	return k.Store.SetMember(ctx, m)
}

// removedError says that a server was taken out of the cluster.
type removedError struct{ server *api.Server }

// overtaken says whether a write was refused because another one came first: what
// to write is decided anew then. A server announces itself twice at the same time
// when it has just become the leader.
func overtaken(err error) bool {
	rejected, ok := errors.AsType[*command.Rejection](err)
	return ok && (rejected.Code == command.Exists || rejected.Code == command.NotFound || rejected.Code == command.Conflict)
}

const codeRemoved = "removed"

func (e *removedError) Error() string {
	return fmt.Sprintf("server %s was removed from the cluster at %s: to come back it needs a new token (decree token create --role server) and an empty data folder",
		e.server.Name, e.server.Status.Removed.UTC().Format(time.RFC3339))
}

// Out returns what a server of a machine is told after it was taken out of the
// cluster, an error for [IsRemoved]; nil: it was not. As long as it is a member it is
// heard: it may be the one without which its removal cannot be completed. It is pure.
func Out(view api.Reader, members []raftstore.Member, node string) error {
	for s := range api.List[*api.Server](view, "") {
		if s.Spec.Node == node && s.Status.Removed != nil && !isMember(members, s.Name) {
			return &removedError{s}
		}
	}
	return nil
}

// Leaving reports whether a server is noted as removed and still a member. It is pure.
func Leaving(view api.Reader, members []raftstore.Member) bool {
	for s := range api.List[*api.Server](view, "") {
		if s.Status.Removed != nil && isMember(members, s.Name) {
			return true
		}
	}
	return false
}

// Mistaken reports whether something else is noted of a server than it says of itself: what
// it said before it was started again may arrive after what it said since. It is pure.
func Mistaken(view api.Reader, who Self) bool {
	o, ok := api.Get[*api.Server](view, "", who.ID)
	return ok && o.Status.Removed == nil && (o.Spec != who.ServerSpec || !reflect.DeepEqual(o.Status, who.ServerStatus))
}

// isMember reports whether a server is in the configuration.
func isMember(members []raftstore.Member, id string) bool {
	return slices.ContainsFunc(members, func(m raftstore.Member) bool { return m.ID == id })
}

// ErrorCode tells other servers what the error is.
func (*removedError) ErrorCode() string { return codeRemoved }

// IsRemoved reports whether err says that a server was taken out of the cluster for
// good, whichever server found that.
func IsRemoved(err error) bool { return hasCode(err, codeRemoved) }

// IsTooOld reports whether err says that a server could not read the cluster's log,
// whichever server found that: its version has to be replaced.
func IsTooOld(err error) bool { return hasCode(err, raftstore.CodeTooOld) }

func hasCode(err error, code string) bool {
	coded, ok := errors.AsType[interface {
		error
		ErrorCode() string
	}](err)
	return ok && coded.ErrorCode() == code
}

// admission decides what is written next when a server announces itself, nil for
// nothing more, and which servers it takes the place of: earlier ones of the same
// machine, whose disks are gone. It is pure.
func admission(view api.Reader, who Self) (next *api.Mutation, gone []string, err error) {
	for s := range api.List[*api.Server](view, "") {
		same := s.Spec.Node == who.Node
		switch {
		case s.Status.Removed != nil && (same || s.Name == who.ID):
			return nil, nil, &removedError{s}
		case s.Name == who.ID:
		case same:
			return &api.Mutation{Verb: api.Delete, Key: api.KeyOf(s)}, []string{s.Name}, nil
		case s.Spec.Address == who.Address && s.Status.Removed == nil:
			return nil, nil, fmt.Errorf("server %s is at %s already: choose another address, or remove it first (decree members remove %s)", s.Name, who.Address, s.Name)
		}
	}
	o := &api.Server{ObjectMeta: metav1.ObjectMeta{Name: who.ID}, Spec: who.ServerSpec, Status: who.ServerStatus}
	o.GetObjectKind().SetGroupVersionKind(api.GroupVersion.WithKind("Server"))
	m := &api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o}
	old, exists := api.Get[*api.Server](view, "", who.ID)
	switch {
	case !exists:
		return m, nil, nil
	case old.Spec != o.Spec:
		m.Verb = api.Update
		return m, nil, nil
	case Mistaken(view, who):
		m.Verb = api.UpdateStatus
		return m, nil, nil
	}
	return nil, nil, nil
}

// Remove takes a server, named by its id or its node, out of the cluster for good.
// Any server can be asked.
func (k *Keeper) Remove(ctx context.Context, name, why string) error {
	id, err := k.find(name)
	if err != nil {
		return err
	}
	return k.onLeader(ctx, callRemove, target{id, why}, func() error { return k.removeHere(ctx, id, why) })
}

// Transfer hands the lead over to a server, or to the best one when name is empty.
func (k *Keeper) Transfer(ctx context.Context, name string) error {
	id := ""
	if name != "" {
		var err error
		if id, err = k.find(name); err != nil {
			return err
		}
	}
	return k.onLeader(ctx, callTransfer, target{ID: id}, func() error { return k.Store.TransferLeadership(ctx, id) })
}

// List describes all servers, whichever is asked.
func (k *Keeper) List(ctx context.Context) (list []Server, err error) {
	err = k.Store.OnLeader(ctx,
		func() (err error) { list, err = k.Servers(); return err },
		func(leader string) error { return k.Peers.Call(ctx, leader, callServers, struct{}{}, &list) })
	if errors.Is(err, raftstore.ErrNotLeader) {
		err = fmt.Errorf("no quorum answers: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("list the servers: %w", err)
	}
	return list, nil
}

func (k *Keeper) onLeader(ctx context.Context, call string, in target, here func() error) error {
	return k.Store.OnLeader(ctx, here, func(leader string) error { return k.Peers.Call(ctx, leader, call, in, nil) })
}

// find returns the id of the server that is called name.
func (k *Keeper) find(name string) (string, error) {
	view := k.Store.View()
	var known []string
	for _, m := range k.Store.Members() {
		s, ok := api.Get[*api.Server](view, "", m.ID)
		if m.ID == name || ok && s.Spec.Node == name {
			return m.ID, nil
		}
		known = append(known, m.ID)
	}
	return "", fmt.Errorf("no server is called %q; there are: %v", name, known)
}

func (k *Keeper) removeHere(ctx context.Context, id, why string) error {
	k.observe(ctx) // who has just begun to lead knows nobody yet
	alive := map[string]bool{}
	k.mu.Lock()
	for id, c := range k.seen {
		alive[id] = c.err == nil && time.Since(c.last) <= Alive
	}
	k.mu.Unlock()
	voters, healthy := 0, 0
	for _, m := range k.Store.Members() {
		if m.Voter && m.ID != id {
			voters++
			if alive[m.ID] || m.Leader {
				healthy++
			}
		}
	}
	if healthy <= voters/2 {
		return fmt.Errorf("remove server %s: of the %d voters that remain only %d answer, the cluster would stop: bring the others back first", id, voters, healthy)
	}
	return k.remove(ctx, id, why)
}

// remove takes a server out of the configuration and notes that it is, so that it
// cannot come back by itself.
//
// A leader hands over first, and the next one removes it: nobody is left without a
// leader for that.
func (k *Keeper) remove(ctx context.Context, id, why string) error {
	if id == k.Self().ID && slices.ContainsFunc(k.Store.Members(), func(m raftstore.Member) bool { return m.Voter && m.ID != id }) {
		if err := k.Store.TransferLeadership(ctx, ""); err != nil {
			return fmt.Errorf("remove server %s, which leads: %w", id, err)
		}
		return raftstore.ErrNotLeader
	}
	if s, ok := api.Get[*api.Server](k.Store.View(), "", id); ok && s.Status.Removed == nil {
		next := api.Clone(s)
		now := metav1.NewTime(time.Now().UTC().Truncate(time.Second))
		next.Status.Removed = &now
		ms := []api.Mutation{{Verb: api.UpdateStatus, Key: api.KeyOf(next), Object: next}}
		// Its certificate is renewed no more, and its name is free for another machine.
		machine := api.Key{Resource: api.Machines, Name: api.MachineName(api.RoleServer, s.Spec.Node)}
		if _, ok := k.Store.View().Get(machine); ok {
			ms = append(ms, api.Mutation{Verb: api.Delete, Key: machine})
		}
		if err := k.propose(ctx, "remove server "+id+": "+why, ms...); err != nil {
			return err
		}
	}
	return k.Store.RemoveMember(ctx, id)
}
