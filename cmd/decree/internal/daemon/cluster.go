package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/join"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// registry is what the replicated state knows about machines, in the words of join:
// it implements [join.Cluster].
type registry struct{ *server }

var _ join.Cluster = registry{}

// Token implements join.Cluster.
func (r registry) Token(ctx context.Context, id string) (*api.JoinToken, bool, error) {
	view, err := r.store.Read(ctx)
	if err != nil {
		return nil, false, err
	}
	t, ok := api.Get[*api.JoinToken](view, "", id)
	return t, ok, nil
}

// Issuer implements join.Cluster.
func (r registry) Issuer(ctx context.Context) (*pki.Issuer, error) {
	// The newest: a CA that was given up meanwhile must sign nothing.
	if _, err := r.store.Read(ctx); err != nil {
		return nil, err
	}
	return r.issuer()
}

// issuer signs for the cluster; any server can, once it has the state.
func (s *server) issuer() (*pki.Issuer, error) {
	a, ok := api.Get[*api.Authority](s.store.View(), "", api.AuthorityName)
	if !ok {
		return nil, errNoState
	}
	return pki.NewIssuer(a.Spec)
}

// Admit implements join.Cluster.
func (r registry) Admit(ctx context.Context, a join.Admission) error {
	return r.change(ctx, "admit "+a.Role+" "+a.Node, func(view api.Reader) ([]api.Mutation, error) {
		var ms []api.Mutation
		if a.Role == api.RoleServer { // the token lets it back in
			for s := range api.List[*api.Server](view, "") {
				if s.Spec.Node == a.Node && s.Status.Removed != nil {
					ms = append(ms, api.Guarded(api.Delete, s))
				}
			}
		}
		next := machine(a.Role, a.Node, a.Key)
		old, exists := api.Get[*api.Machine](view, "", next.Name)
		switch {
		case !exists:
			return append(ms, api.Mutation{Verb: api.Create, Key: api.KeyOf(next), Object: next}), nil
		case old.Spec.Key == a.Key:
			return ms, nil
		case !a.Replace:
			return nil, join.ErrNameTaken
		}
		return append(ms, rekey(old, a.Key)), nil
	})
}

// machine is a machine that was just admitted: one that is never heard of again must
// not hold up the rotation of the CA for longer than its certificate lasts.
func machine(role, node, key string) *api.Machine {
	m := &api.Machine{
		ObjectMeta: metav1.ObjectMeta{Name: api.MachineName(role, node)}, Spec: api.MachineSpec{Role: role, Node: node, Key: key},
		Status: api.MachineStatus{Expires: metav1.NewTime(time.Now().Add(pki.DefaultLifetime).UTC().Truncate(time.Second))},
	}
	m.SetGroupVersionKind(api.GroupVersion.WithKind("Machine"))
	return m
}

func rekey(old *api.Machine, key string) api.Mutation {
	next := api.Clone(old)
	next.Spec.Key = key
	return api.Guarded(api.Update, next)
}

// Renew implements join.Cluster.
func (r registry) Renew(ctx context.Context, n join.Renewal) error {
	return r.change(ctx, "renew "+n.Role+" "+n.Node, func(view api.Reader) ([]api.Mutation, error) {
		old, ok := api.Get[*api.Machine](view, "", api.MachineName(n.Role, n.Node))
		switch {
		case !ok:
			return nil, join.ErrRemoved
		case old.Spec.Key == n.New:
			return nil, nil
		case old.Spec.Key != n.Old:
			return nil, join.ErrReplaced
		}
		return []api.Mutation{rekey(old, n.New)}, nil
	})
}

// Seen implements join.Cluster: what a machine holds is written down when it changes,
// a few times a year.
func (r registry) Seen(ctx context.Context, role, node string, h pki.Holder) {
	err := r.change(ctx, "certificates of "+role+" "+node, func(view api.Reader) ([]api.Mutation, error) {
		old, ok := api.Get[*api.Machine](view, "", api.MachineName(role, node))
		if !ok {
			return nil, nil
		}
		status := api.MachineStatus{Issuer: h.Issuer, Trusts: h.Trusts, Expires: metav1.NewTime(h.Expires.UTC().Truncate(time.Second))}
		if old.Status.Issuer == status.Issuer && slices.Equal(old.Status.Trusts, status.Trusts) && old.Status.Expires.Equal(&status.Expires) {
			return nil, nil
		}
		next := api.Clone(old)
		next.Status = status
		return []api.Mutation{api.Guarded(api.UpdateStatus, next)}, nil
	})
	if err != nil && ctx.Err() == nil {
		r.cfg.Log.Warn("note what a machine holds", "role", role, "node", node, "error", err)
	}
}

// Info implements join.Cluster.
func (r registry) Info(context.Context) (join.Info, error) {
	return join.Info{ClusterID: r.store.ClusterID(), Servers: r.addresses()}, nil
}

// addresses are where the servers are found, this one first.
func (s *server) addresses() []string {
	list := []string{s.cfg.Advertise}
	for _, m := range s.store.Members() {
		if m.Address != s.cfg.Advertise {
			list = append(list, m.Address)
		}
	}
	return list
}

// maxChanges bounds how often a change is planned again because the state moved on.
const maxChanges = 8

// change proposes what plan makes of the newest state, until it holds.
func (s *server) change(ctx context.Context, reason string, plan func(api.Reader) ([]api.Mutation, error)) error {
	var err error
	for range maxChanges {
		view, readErr := s.store.Read(ctx)
		if readErr != nil {
			return fmt.Errorf("%s: %w", reason, readErr)
		}
		ms, planErr := plan(view)
		if planErr != nil || len(ms) == 0 {
			return planErr
		}
		var res command.Result
		res, err = s.store.Propose(ctx, command.Txn{Key: rand.Text(), Actor: "server/" + s.id, Reason: reason, Mutations: ms})
		if err == nil {
			err = res.Err()
		}
		var rejected *command.Rejection
		if err == nil || !errors.As(err, &rejected) {
			break
		}
		switch rejected.Code {
		case command.Conflict, command.Exists, command.NotFound: // somebody was faster
			continue
		}
		break
	}
	if err != nil {
		return fmt.Errorf("%s: %w", reason, err)
	}
	return nil
}

// settleAuthority gives the cluster the CA that this machine founded it with, and then
// forgets its key. It does nothing where that was done before.
func (s *server) settleAuthority(ctx context.Context) error {
	if s.creds.founder == nil {
		return nil
	}
	hash, err := keyHash(s.creds.keeper)
	if err != nil {
		return err
	}
	err = s.change(ctx, "the cluster's CA", func(view api.Reader) ([]api.Mutation, error) {
		var ms []api.Mutation
		if _, ok := api.Get[*api.Authority](view, "", api.AuthorityName); !ok {
			a := &api.Authority{ObjectMeta: metav1.ObjectMeta{Name: api.AuthorityName}, Spec: *s.creds.founder}
			ms = append(ms, api.Mutation{Verb: api.Create, Key: api.KeyOf(a), Object: a})
		}
		m := machine(api.RoleServer, s.cfg.Node, hash)
		if _, ok := view.Get(api.KeyOf(m)); !ok {
			ms = append(ms, api.Mutation{Verb: api.Create, Key: api.KeyOf(m), Object: m})
		}
		return ms, nil
	})
	if err != nil {
		return err
	}
	if err := removeFile(s.cfg.caKey()); err != nil {
		return fmt.Errorf("the CA's key is replicated now, remove the file: %w", err)
	}
	s.creds.founder = nil
	return nil
}

// rotateCA takes the rotation of the CA one step further, if its conditions hold.
func (s *server) rotateCA(ctx context.Context) error {
	a, ok := api.Get[*api.Authority](s.store.View(), "", api.AuthorityName)
	if !ok {
		return nil
	}
	step, err := pki.PlanRotation(a.Spec, s.fleet(), time.Now())
	if err != nil {
		return err
	}
	switch {
	case step.Stage == pki.StageMake:
		return s.newCA(ctx)
	case step.Next == nil:
		return nil
	}
	s.cfg.Log.Info("CA rotation goes on", "stage", step.Stage)
	next := api.Clone(a)
	next.Spec = *step.Next
	res, err := s.store.Propose(ctx, command.Txn{
		Key: rand.Text(), Actor: "server/" + s.id, Reason: "CA rotation: " + string(step.Stage), Mutations: []api.Mutation{api.Guarded(api.Update, next)},
	})
	if err == nil {
		err = res.Err()
	}
	return err
}

// newCA begins the rotation of the CA; while one is under way there is nothing to do.
func (s *server) newCA(ctx context.Context) error {
	return s.change(ctx, "new CA", func(view api.Reader) ([]api.Mutation, error) {
		a, ok := api.Get[*api.Authority](view, "", api.AuthorityName)
		if !ok {
			return nil, errNoCA
		}
		if len(a.Spec.CAs) > 1 {
			return nil, nil
		}
		next := api.Clone(a)
		var err error
		if next.Spec, err = pki.Successor(a.Spec, time.Now()); err != nil {
			return nil, err
		}
		return []api.Mutation{api.Guarded(api.Update, next)}, nil
	})
}

// fleet is who holds certificates of the cluster.
func (s *server) fleet() pki.Fleet {
	view := s.store.View()
	members := map[string]bool{}
	for _, m := range s.store.Members() {
		if o, ok := api.Get[*api.Server](view, "", m.ID); ok {
			members[o.Spec.Node] = true
		}
	}
	f := pki.Fleet{Overlap: s.cfg.CAOverlap}
	for m := range api.List[*api.Machine](view, "") {
		h := pki.Holder{Name: m.Spec.Role + " " + m.Spec.Node, Issuer: m.Status.Issuer, Trusts: m.Status.Trusts, Expires: m.Status.Expires.Time}
		switch {
		case m.Spec.Role != api.RoleServer:
			f.Agents = append(f.Agents, h)
		case members[m.Spec.Node]:
			f.Servers = append(f.Servers, h)
		}
	}
	return f
}

// sweep removes tokens that have expired.
func (s *server) sweep(ctx context.Context) error {
	now := time.Now()
	return s.change(ctx, "expired tokens", func(view api.Reader) ([]api.Mutation, error) {
		var ms []api.Mutation
		for t := range api.List[*api.JoinToken](view, "") {
			if now.After(t.Spec.Expires.Time) {
				ms = append(ms, api.Guarded(api.Delete, t))
			}
		}
		return ms, nil
	})
}

// announce tells the cluster what this server is, until it knows, and again whenever
// that changes.
func (s *server) announce(ctx context.Context) error {
	for wait := 200 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		changed := s.creds.keeper.Changed()
		err := s.announceOnce(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			select {
			case <-changed:
			case <-s.renewed:
			case <-ctx.Done():
				return nil
			}
			wait = 200 * time.Millisecond
			continue
		}
		if membership.IsRemoved(err) || membership.IsTooOld(err) {
			return err
		}
		s.cfg.Log.Info("the cluster does not know this server yet", "error", err, "retry", wait)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-s.store.LeaderChange():
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

func (s *server) announceOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var err error
	if s.store.Leads() {
		err = s.members.AdmitHere(ctx, s.self())
	} else {
		var others []string
		if _, leader := s.store.Leader(); leader != "" {
			others = append(others, leader)
		}
		for _, a := range append(s.addresses()[1:], s.knownServers()...) {
			if a != s.cfg.Advertise && !slices.Contains(others, a) {
				others = append(others, a)
			}
		}
		if len(others) == 0 {
			return raftstore.ErrNotLeader
		}
		err = s.members.Announce(ctx, others)
	}
	return err
}
