package state_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

func sources(t *testing.T, names ...string) *world {
	w := newWorld(t)
	for _, name := range names {
		w.must(txn(api.Create, sourceObject(name)))
	}
	return w
}

func TestCommitAdvancesItsSource(t *testing.T) {
	w := sources(t, "shop")
	w.must(commit("shop", "", "c1", mutation(api.Create, from(configMap("a", "1"), "shop")), mutation(api.Create, from(service("s"), "shop"))))
	s := fetch[*api.Source](w, "", "shop")
	if s.Status.Applied != "c1" || s.Status.Fetched != "c1" || s.Status.Objects != 2 || !s.Status.AppliedAt.Time.Equal(time.Unix(1_700_000_000, 0)) {
		t.Fatalf("status %+v", s.Status)
	}
	r := fetch[*api.Revision](w, "", "shop-000001")
	if r.Spec.Commit != "c1" || r.UID == "" || r.CreationTimestamp.IsZero() {
		t.Fatalf("revision %+v", r)
	}
	if len(w.events) != 4 || w.events[3].Revision != w.s.Revision() {
		t.Fatalf("%d events", len(w.events))
	}
	w.refuse(command.Conflict, commit("shop", "", "c2"), "c1 is in force", "no commit")
	w.must(commit("shop", "c1", "c2", mutation(api.Delete, configMap("a", ""))))
	if s := fetch[*api.Source](w, "", "shop"); s.Status.Applied != "c2" || s.Status.Objects != 1 {
		t.Fatalf("status %+v", s.Status)
	}
	if r := fetch[*api.Revision](w, "", "shop-000002"); r.Spec.Parent != "c1" {
		t.Fatalf("revision %+v", r.Spec)
	}
}

func TestRefusedCommitLeavesARecordOnly(t *testing.T) {
	w := sources(t, "shop")
	w.must(commit("shop", "", "c1"))
	refused := commit("shop", "wrong parent", "c2")
	refused.Commit.Revision.Spec.Result = api.RevisionRefused
	w.must(refused)
	if s := fetch[*api.Source](w, "", "shop"); s.Status.Applied != "c1" || s.Status.Fetched != "c1" {
		t.Fatalf("status %+v", s.Status)
	}
	if r := fetch[*api.Revision](w, "", "shop-000002"); r.Spec.Result != api.RevisionRefused || len(w.events) != 1 {
		t.Fatalf("revision %+v", r.Spec)
	}
	refused.Mutations = []api.Mutation{mutation(api.Create, from(configMap("a", "1"), "shop"))}
	w.refuse(command.Invalid, refused, "1 mutations")
}

func TestMalformedCommits(t *testing.T) {
	w := sources(t, "shop", "blog")
	w.refuse(command.NotFound, commit("nobody", "", "c1"), "does not exist")
	bad := commit("shop", "", "c1")
	bad.Commit.Revision = nil
	w.refuse(command.Invalid, bad, "Revision")
	bad = commit("shop", "", "c1")
	bad.Commit.Revision.Spec.Source = "blog"
	w.refuse(command.Invalid, bad, `"blog"`)
	bad = commit("shop", "", "c1")
	bad.Commit.Revision.Spec.Result = "Maybe"
	w.refuse(command.Invalid, bad, "Maybe")
	w.refuse(command.Invalid, commit("shop", "", ""), "no hash")
	w.refuse(command.Invalid, commit("shop", "", "c1", mutation(api.Create, configMap("a", "1"))), "without its origin")
	w.refuse(command.Forbidden, commit("shop", "", "c1", mutation(api.Create, from(configMap("a", "1"), "blog"))), `commit of source "shop"`, "blog/web.cue:14")
}

func TestObjectsFromGitBelongToTheirSource(t *testing.T) {
	w := sources(t, "shop", "blog")
	w.must(commit("shop", "", "c1", mutation(api.Create, from(configMap("a", "1"), "shop"))))
	w.must(txn(api.Create, configMap("mine", "1")))
	place := `source "shop", shop/web.cue:14 at 3f2a1c9`

	w.refuse(command.Forbidden, txn(api.Update, configMap("a", "2")), "comes from git", place)
	w.refuse(command.Forbidden, txn(api.Update, from(configMap("a", "2"), "shop")), place)
	w.refuse(command.Forbidden, txn(api.UpdateStatus, configMap("a", "2")), place) // has no status: an update
	w.refuse(command.Forbidden, txn(api.Delete, configMap("a", "2")), place)
	w.refuse(command.Forbidden, txn(api.Create, from(configMap("b", "2"), "shop")), "only a commit", "controller/test")
	w.refuse(command.Forbidden, txn(api.Update, from(configMap("mine", "2"), "shop")), "only a commit")

	blog := func(v api.Verb) command.Txn {
		return commit("blog", "", "b1", mutation(v, from(configMap("a", "9"), "blog")))
	}
	w.refuse(command.Forbidden, blog(api.Create), place, `source "blog", blog/web.cue:14`)
	w.refuse(command.Forbidden, blog(api.Update), place, `source "blog", blog/web.cue:14`)
	w.refuse(command.Forbidden, blog(api.Delete), place)
	w.refuse(command.Forbidden, commit("blog", "", "b1", mutation(api.Create, from(configMap("mine", "9"), "blog"))), "not made from git", "at revision")
	w.refuse(command.Forbidden, commit("blog", "", "b1", mutation(api.Delete, configMap("mine", "9"))), "not made from git")
	w.refuse(command.Exists, commit("shop", "c1", "c2", mutation(api.Create, from(configMap("a", "9"), "shop"))), place)

	w.must(commit("shop", "c1", "c2", mutation(api.Update, from(configMap("a", "2"), "shop"))))
	w.must(commit("shop", "c2", "c3", mutation(api.Delete, configMap("a", "2"))))
}

func TestPodFromGit(t *testing.T) {
	w := sources(t, "shop")
	w.must(commit("shop", "", "c1", mutation(api.Create, from(pod("p", ""), "shop"))))
	changed := from(pod("p", "n1"), "shop")
	changed.Spec.Containers[0].Image = "other"
	w.refuse(command.Forbidden, txn(api.Update, changed), "comes from git")
	bound := from(pod("p", "n1"), "shop")
	api.SetPodCondition(bound, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}, time.Unix(1, 0)) // as the scheduler says it
	w.must(txn(api.Update, bound))
	if p := fetch[*corev1.Pod](w, "default", "p"); api.PodCondition(p, corev1.PodScheduled) == nil {
		t.Errorf("a bound pod from git does not say that it is scheduled: %+v", p.Status)
	}
	running := pod("p", "")
	running.Status.Phase = corev1.PodRunning
	w.must(txn(api.UpdateStatus, running))
	w.refuse(command.Forbidden, txn(api.Delete, running), "comes from git")
	w.must(commit("shop", "c1", "c2", mutation(api.Delete, running)))
	if p := fetch[*corev1.Pod](w, "default", "p"); p.DeletionTimestamp == nil || p.Spec.NodeName != "n1" {
		t.Fatalf("got %+v", p)
	}
	m := mutation(api.Delete, running)
	m.Grace = new(int64)
	w.must(command.Txn{Actor: "node/n1", Mutations: []api.Mutation{m}}) // the node has stopped it
}

func TestStatusOfObjectsFromGitIsFree(t *testing.T) {
	w := sources(t, "shop")
	w.must(commit("shop", "", "c1", mutation(api.Create, from(service("s"), "shop"))))
	s := service("s")
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "1.2.3.4"}}
	w.must(txn(api.UpdateStatus, s))
	w.must(txn(api.Update, from(service("s"), "shop"))) // changes nothing
	if len(w.events) != 0 {
		t.Fatal("an update that changes nothing made events")
	}
}

func TestSourceMayDeleteItself(t *testing.T) {
	w := sources(t, "root")
	w.must(commit("root", "", "c1", mutation(api.Create, from(sourceObject("shop"), "root"))))
	w.must(commit("shop", "", "s1"))
	w.must(commit("root", "c1", "c2", mutation(api.Delete, sourceObject("shop"))))
	w.must(commit("root", "c2", "c3", mutation(api.Create, from(sourceObject("shop"), "root"))))
	w.must(commit("shop", "", "s2"))
	fetch[*api.Revision](w, "", "shop-000002") // the numbers go on
}

func TestOldRevisionsGo(t *testing.T) {
	w := sources(t, "shop")
	s, parent := w.s, ""
	for i := range state.KeepRevisions + 5 {
		hash := fmt.Sprint("c", i)
		next, r, _ := state.Reduce(s, uint64(i), commit("shop", parent, hash))
		if r.Rejected != nil {
			t.Fatal(r.Rejected)
		}
		s, parent = next, hash
	}
	if n := s.Len(api.Revisions); n != state.KeepRevisions {
		t.Fatalf("%d revisions are kept", n)
	}
	for o := range s.List(api.Revisions, "") {
		if o.GetName() != "shop-000006" {
			t.Fatalf("the oldest is %s", o.GetName())
		}
		break
	}
}

func TestNoNameOfASourceBreaksRevisions(t *testing.T) {
	w := newWorld(t)
	long := strings.Repeat("s", 250)
	w.must(txn(api.Create, sourceObject(long)))
	w.refuse(command.Invalid, commit(long, "", "c1"), "not a name")
}
