package delivery_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

func TestApply(t *testing.T) {
	w := newWorld(t)
	before := w.store.proposals()
	c := commit("first", tree(configMap("a", "1")+configMap("b", "1")))
	out := w.applied(c)
	if n := w.store.proposals() - before; n != 1 {
		t.Errorf("one commit took %d transactions", n)
	}
	a, ok := api.Get[*corev1.ConfigMap](w.store.View(), "default", "a")
	if !ok {
		t.Fatal("no object")
	}
	if origin, _ := api.OriginOf(a); origin.Source != "decree" || origin.Commit != c.Hash || origin.Pos.String() != "shop.cue:2" {
		t.Errorf("origin %+v", origin)
	}
	src := w.source("decree")
	if src.Status.Applied != c.Hash || src.Status.Objects != 2 {
		t.Errorf("status %+v", src.Status)
	}
	if out.Revision != w.store.View().Revision() {
		t.Errorf("revision %d, the state is at %d", out.Revision, w.store.View().Revision())
	}
	revs := w.revisions("decree")
	if len(revs) != 1 || revs[0].Result != api.RevisionApplied || revs[0].Commit != c.Hash || len(revs[0].Changes) != 2 {
		t.Errorf("revisions %+v", revs)
	}

	// The next one changes one object and removes the other.
	d := commit("second", tree(configMap("a", "2")))
	w.applied(d)
	if w.exists(api.ConfigMaps, "b") {
		t.Error("b was not pruned")
	}
	if a, _ := api.Get[*corev1.ConfigMap](w.store.View(), "default", "a"); a.Data["x"] != "2" {
		t.Errorf("a is %v", a.Data)
	}
	if revs := w.revisions("decree"); revs[1].Parent != c.Hash {
		t.Errorf("parent %s", revs[1].Parent)
	}
}

func TestCommitInForceIsNoOp(t *testing.T) {
	w := newWorld(t)
	c := commit("first", tree(configMap("a", "1")))
	first := w.applied(c)
	before := w.store.proposals()
	if out := w.applied(c); out.Revision != first.Revision || len(out.Plan.Mutations) != 0 {
		t.Errorf("%+v", out)
	}
	if n := w.store.proposals() - before; n != 0 {
		t.Errorf("%d transactions", n)
	}
	// Another commit with the same tree is another commit.
	w.applied(commit("same tree", c.Tree))
	if n := len(w.revisions("decree")); n != 2 {
		t.Errorf("%d revisions", n)
	}
}

func TestCompileErrorIsRecordedOnce(t *testing.T) {
	w := newWorld(t)
	w.applied(commit("good", tree(configMap("a", "1"))))
	bad := commit("bad", tree(`a: {apiVersion: "v1", kind: "ConfigMap", metadata: name: "a", data: x: 1}`))
	out := w.deliver(bad)
	if out.Applied || out.Reason != delivery.ReasonCompileError || len(out.Diagnostics) == 0 {
		t.Fatalf("%+v", out)
	}
	contains(t, out.Diagnostics[0].Error(), "shop.cue:2:", "data")
	w.refusedOnce(bad)
	if a, _ := api.Get[*corev1.ConfigMap](w.store.View(), "default", "a"); a.Data["x"] != "1" {
		t.Errorf("a refused commit changed %v", a.Data)
	}
}

// refusedOnce delivers a refused commit again and looks for one record of it.
func (w *world) refusedOnce(c *gitsource.Commit) {
	w.t.Helper()
	before := w.store.View().Revision()
	w.deliver(c)
	if after := w.store.View().Revision(); after != before {
		w.t.Errorf("refused again, the state moved from %d to %d", before, after)
	}
	n := 0
	for _, r := range w.revisions("decree") {
		if r.Commit == c.Hash {
			n++
			if r.Result != api.RevisionRefused || r.Message == "" {
				w.t.Errorf("%+v", r)
			}
		}
	}
	if n != 1 {
		w.t.Errorf("%d records of the refused commit", n)
	}
	if w.source("decree").Status.Applied == c.Hash {
		w.t.Error("it is in force")
	}
}

func TestRefusalSaysWhere(t *testing.T) {
	w := newWorld(t)
	for name, test := range map[string]struct{ reason, cue, pos, text string }{
		"reserved annotation": {
			delivery.ReasonCompileError,
			`a: {apiVersion: "v1", kind: "ConfigMap", metadata: {` + "\n" + `name: "a"` + "\n" + `annotations: "decree.dev/source": "other"` + "\n}}",
			"shop.cue:4:", "decree.dev/",
		},
		"reserved label": {
			delivery.ReasonPlanRefused,
			`a: {apiVersion: "v1", kind: "ConfigMap", metadata: {` + "\n" + `name: "a"` + "\n" + `labels: "decree.dev/x": "y"` + "\n}}",
			"shop.cue:4:", "decree.dev/",
		},
		"namespace missing": {
			delivery.ReasonPlanRefused,
			`a: {apiVersion: "v1", kind: "ConfigMap", metadata: {name: "a"` + "\n" + `namespace: "nowhere"}}`,
			"shop.cue:3:", `"nowhere" does not exist`,
		},
		"foreign object": {
			delivery.ReasonPlanRefused,
			`s: {apiVersion: "decree.dev/v1", kind: "Source", metadata: name: "decree"}`,
			"shop.cue:2:", "was not made by a commit",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := commit(name, tree(test.cue))
			out := w.deliver(c)
			if out.Applied || out.Reason != test.reason || len(out.Diagnostics) != 1 {
				t.Fatalf("%+v", out)
			}
			contains(t, out.Diagnostics[0].Error(), test.pos, test.text)
			w.refusedOnce(c)
		})
	}
}

func TestDeletionTrailer(t *testing.T) {
	w := newWorld(t)
	var many strings.Builder
	for i := range 12 {
		many.WriteString(configMap(fmt.Sprint("m", i), "1"))
	}
	w.applied(commit("many", tree(many.String())))
	few := tree(configMap("m0", "1"))
	if out := w.deliver(commit("few", few)); out.Applied {
		t.Fatal("11 of 12 objects were deleted")
	}
	if out := w.deliver(commit("nonsense\n\nDecree-Allow-Deletions: lots\n", few)); out.Applied || len(out.Diagnostics) != 1 {
		t.Fatalf("%+v", out)
	}
	w.applied(commit("few, and meant\n\nDecree-Allow-Deletions: 11\n", few))
	if w.exists(api.ConfigMaps, "m1") || !w.exists(api.ConfigMaps, "m0") {
		t.Error("wrong objects")
	}
}

func TestConcurrentDeliveriesLoseNothing(t *testing.T) {
	w := newWorld(t)
	w.applied(commit("base", tree(configMap("base", "1"))))
	parent := w.source("decree").Status.Applied
	errs := make([]error, 2)
	var wg sync.WaitGroup
	for i, name := range []string{"left", "right"} {
		wg.Go(func() {
			c := commit(name, tree(configMap("base", "1")+configMap(name, "1")))
			out, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: c, Parent: parent})
			if err == nil && !out.Applied {
				err = fmt.Errorf("refused: %v", out.Diagnostics)
			}
			errs[i] = err
		})
	}
	wg.Wait()
	// Neither knows of the other: one wins, and the other must fetch it first.
	won, lost := 0, 1
	if errs[0] != nil {
		won, lost = 1, 0
	}
	if errs[won] != nil || !errors.Is(errs[lost], delivery.ErrSuperseded) {
		t.Fatalf("%v, %v", errs[0], errs[1])
	}
	contains(t, errs[lost].Error(), "fetch it first")
	names := []string{"left", "right"}
	if !w.exists(api.ConfigMaps, names[won]) || w.exists(api.ConfigMaps, names[lost]) {
		t.Error("what is in force is not what the winner wrote")
	}
	// After fetching it delivers both.
	w.applied(commit("merged", tree(configMap("base", "1")+configMap("left", "1")+configMap("right", "1"))))
	if !w.exists(api.ConfigMaps, "left") || !w.exists(api.ConfigMaps, "right") {
		t.Error("something was lost")
	}
}

// A status that changes between plan and proposal does not hold up a commit, and an
// object that appears in between is refused with its place.
func TestStateChangesWhilePlanned(t *testing.T) {
	w := newWorld(t)
	app := func(replicas int) string {
		return fmt.Sprintf(`import "decree.dev/app"
web: app.#App & {name: "web", image: "decree.dev/hello:v1", port: 8080, replicas: %d}
`, replicas)
	}
	w.applied(commit("two", tree(app(2))))
	times := 0
	w.store.onPropose(func(t command.Txn) error {
		if t.Commit == nil {
			return nil
		}
		times++
		d, _ := api.Get[*appsv1.Deployment](w.store.View(), "default", "web")
		d = api.Clone(d)
		d.Status.Replicas++
		w.mutate(api.Guarded(api.UpdateStatus, d))
		return nil
	})
	w.applied(commit("three", tree(app(3))))
	if times != 1 {
		t.Errorf("%d proposals", times)
	}
	d, _ := api.Get[*appsv1.Deployment](w.store.View(), "default", "web")
	if *d.Spec.Replicas != 3 || d.Status.Replicas != 1 {
		t.Errorf("replicas %d, status %d", *d.Spec.Replicas, d.Status.Replicas)
	}

	times = 0
	w.store.onPropose(func(t command.Txn) error {
		if t.Commit == nil || t.Commit.Revision.Spec.Result != api.RevisionApplied {
			return nil
		}
		if times++; times == 1 {
			w.create(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "late"}})
		}
		return nil
	})
	out := w.deliver(commit("late", tree(app(3)+configMap("late", "1"))))
	if out.Applied || times != 1 {
		t.Fatalf("applied %v after %d proposals", out.Applied, times)
	}
	contains(t, out.Diagnostics[0].Error(), "shop.cue:4:", "was not made by a commit")
}

// A delivery whose plans are rejected for ever gives up.
func TestPlanningEnds(t *testing.T) {
	w := newWorld(t)
	w.store.reject(&command.Rejection{Code: command.Conflict, Message: "was changed"})
	before := w.store.proposals()
	_, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: commit("a", tree(configMap("a", "1")))})
	if err == nil {
		t.Fatal("no error")
	}
	contains(t, err.Error(), "kept changing", "was changed", "push again")
	if n := w.store.proposals() - before; n > 10 || w.compiler.runs() != 1 {
		t.Errorf("%d proposals, compiled %d times", n, w.compiler.runs())
	}
}

func TestDurable(t *testing.T) {
	w := newWorld(t)
	before := w.store.View().Revision()
	c := commit("first", tree(configMap("a", "1")))
	full := errors.New("the disk is full")
	_, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: c, Durable: func() error { return full }})
	if !errors.Is(err, full) {
		t.Fatal(err)
	}
	if w.store.View().Revision() != before {
		t.Error("the state has changed")
	}
	// It is called once, and not for a commit that is refused.
	times := 0
	durable := func() error { times++; return nil }
	if _, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: commit("bad", tree("a: 1 & 2")), Durable: durable}); err != nil || times != 0 {
		t.Fatalf("%v, called %d times", err, times)
	}
	if _, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: c, Durable: durable}); err != nil || times != 1 {
		t.Fatalf("%v, called %d times", err, times)
	}
}

func TestStoreErrors(t *testing.T) {
	w := newWorld(t)
	lost := errors.New("leadership was lost")
	w.store.onPropose(func(command.Txn) error { return lost })
	c := commit("first", tree(configMap("a", "1")))
	_, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: c})
	if !errors.Is(err, lost) {
		t.Fatal(err)
	}
	contains(t, err.Error(), `source "decree"`, "into force", c.Hash[:7])

	// A refusal that cannot be recorded is still explained.
	out, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: commit("bad", tree("a: 1 & 2"))})
	if !errors.Is(err, lost) || out == nil || len(out.Diagnostics) == 0 {
		t.Fatalf("%+v, %v", out, err)
	}
	if _, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "nobody", Commit: c}); !errors.Is(err, delivery.ErrNoSource) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(w.ctx())
	cancel()
	if _, err := w.pipeline.Deliver(ctx, delivery.Request{Source: "decree", Commit: c}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestSuspendedSourceTakesNothing(t *testing.T) {
	w := newWorld(t)
	var once sync.Once
	w.store.onPropose(func(txn command.Txn) error {
		if txn.Actor == "user/bob" { // something else is written in between, and must stay
			once.Do(func() {
				src := api.Clone(w.source("decree"))
				src.Status.Fetched = "123"
				w.mutate(api.Guarded(api.UpdateStatus, src))
			})
		}
		return nil
	})
	if err := w.pipeline.Suspend(w.ctx(), "decree", "bob", &api.Suspension{By: "bob", At: metav1.Now(), Reason: "freeze"}); err != nil {
		t.Fatal(err)
	}
	if s := w.source("decree").Status; s.Fetched != "123" || s.Suspended == nil {
		t.Errorf("%+v", s)
	}
	_, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: commit("x", tree(configMap("a", "1")))})
	if !errors.Is(err, delivery.ErrSuspended) {
		t.Fatal(err)
	}
	contains(t, err.Error(), "bob", "freeze", "decree source resume decree")
	if w.compiler.runs() != 0 {
		t.Error("it was compiled")
	}
	if err := w.pipeline.Suspend(w.ctx(), "decree", "bob", nil); err != nil {
		t.Fatal(err)
	}
	w.applied(commit("x", tree(configMap("a", "1"))))
	if err := w.pipeline.Suspend(w.ctx(), "nobody", "bob", nil); !errors.Is(err, delivery.ErrNoSource) {
		t.Error(err)
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	w := newWorld(t)
	w.applied(commit("first", tree(configMap("a", "1")+configMap("b", "1"))))
	before := w.store.proposals()
	out, err := w.pipeline.DryRun(w.ctx(), "decree", tree(configMap("a", "2")))
	if err != nil || len(out.Plan.Changes) != 2 || out.Reason != "" {
		t.Fatalf("%+v, %v", out, err)
	}
	out, err = w.pipeline.DryRun(w.ctx(), "decree", tree("a: 1 & 2"))
	if err != nil || out.Reason != delivery.ReasonCompileError {
		t.Fatalf("%+v, %v", out, err)
	}
	if n := w.store.proposals() - before; n != 0 {
		t.Errorf("%d proposals", n)
	}
}

func TestHugeTextsAreCut(t *testing.T) {
	w := newWorld(t)
	c := commit("first", tree(configMap("a", "1")))
	c.Subject = strings.Repeat("ü\xff", 100_000)
	c.Author = c.Subject
	w.applied(c)
	if r := w.revisions("decree")[0]; len(r.Subject) > 1024 || len(r.Author) > 1024 {
		t.Errorf("%d bytes of subject, %d of author", len(r.Subject), len(r.Author))
	}
}
