package state_test

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// own makes one object of each kind that the control plane is made of.
func own() []api.Object {
	objects := []api.Object{&api.Server{}, &api.Authority{}, &api.JoinToken{}, &api.Machine{}}
	for _, o := range objects {
		meta(o, "x")
	}
	return objects
}

func TestOnlyServersGovern(t *testing.T) {
	for _, o := range own() {
		t.Run(string(api.KeyOf(o).Resource), func(t *testing.T) {
			w := sources(t, "shop")
			by := func(actor string, v api.Verb) command.Txn {
				return command.Txn{Actor: actor, Mutations: []api.Mutation{mutation(v, o)}}
			}
			w.must(by("server/one", api.Create))
			w.must(by("system", api.Delete))
			w.must(by("system", api.Create))
			for _, actor := range []string{"", "controller/x", "node/n1", "user/root", "git/shop", "servers/x", "server"} {
				for _, v := range []api.Verb{api.Create, api.Update, api.UpdateStatus, api.Delete} {
					w.refuse(command.Forbidden, by(actor, v), "only a server may", string(api.KeyOf(o).Resource))
				}
			}
			bad := commit("shop", "", "c1", mutation(api.Delete, o))
			bad.Actor = "server/one"
			w.refuse(command.Forbidden, bad, "never come from git")
		})
	}
}

func TestRestore(t *testing.T) {
	w := sources(t, "shop")
	w.must(commit("shop", "", "c1", mutation(api.Create, from(service("s"), "shop"))))
	keyed := txn(api.Create, node("n"), pod("p", "n"))
	keyed.Key = "k"
	w.must(keyed)
	for _, o := range own() {
		w.must(command.Txn{Actor: "system", Mutations: []api.Mutation{mutation(api.Create, o)}})
	}
	w.part(split(t, large("a"), 2)[0])
	old := w.s
	hash := old.Hash()

	s, err := state.Restore(old, "new", w.now+5, 1_000_000)
	if err != nil || old.Hash() != hash {
		t.Fatalf("%v; or the old state was changed", err)
	}
	want := command.Restored{ClusterID: "test", Revision: old.Revision(), Time: w.now + 5}
	if b := s.Settings(); b.ClusterID != "new" || b.Restored == nil || *b.Restored != want {
		t.Fatalf("settings %+v", b)
	}
	if s.Revision() != old.Revision()+1_000_000 || s.Index() != 0 || s.Time().UnixMilli() != w.now+5 {
		t.Fatalf("revision %d, index %d, time %v", s.Revision(), s.Index(), s.Time())
	}
	if n, _ := s.Unfinished(); n != 0 {
		t.Fatal("unfinished parts are kept")
	}
	for _, kind := range api.Kinds() {
		before, after := slices.Collect(old.List(kind.Resource, "")), slices.Collect(s.List(kind.Resource, ""))
		if slices.ContainsFunc(own(), func(o api.Object) bool { return api.KindOf(o) == kind }) {
			before = nil
		}
		if !slices.Equal(before, after) {
			t.Fatalf("%s: %d, were %d", kind.Plural, len(after), len(before))
		}
	}
	w.s = reread(t, s)
	if w.s.Hash() != s.Hash() {
		t.Fatal("not the same after reading it")
	}
	// It goes on: keys are known, addresses taken, commits in order, UIDs others.
	if r := w.part(keyed); r.Rejected != nil || w.s.Len(api.Pods) != 1 || r.Revision > old.Revision() {
		t.Fatalf("a key was forgotten: %+v", r)
	}
	w.refuse(command.Conflict, commit("shop", "", "c2"), "another commit came first")
	w.must(commit("shop", "c1", "c2", mutation(api.Create, from(service("t"), "shop"))))
	if a, b := fetch[*corev1.Service](w, "default", "s"), fetch[*corev1.Service](w, "default", "t"); a.Spec.ClusterIP == b.Spec.ClusterIP || b.UID == "" {
		t.Fatalf("addresses %q and %q", a.Spec.ClusterIP, b.Spec.ClusterIP)
	}
	fetch[*api.Revision](w, "", "shop-000002")
}

func TestRestoreRefuses(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		s    *state.State
		id   string
		jump uint64
		word string
	}{
		"nothing":  {state.New(), "new", 1, "nothing in it"},
		"same id":  {w.s, "test", 1, "does not tell"},
		"no id":    {w.s, "", 1, "empty"},
		"too high": {w.s, "new", 1<<64 - 1, "cannot be raised"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := state.Restore(c.s, c.id, 1, c.jump); err == nil || !strings.Contains(err.Error(), c.word) {
				t.Fatalf("got %v", err)
			}
		})
	}
}
