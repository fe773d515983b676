package plan_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"decree.dev/decree/reconciler/plan"
	"decree.dev/decree/schemas/api"
)

// world stores objects as the state machine would, as far as plans can tell.
type world struct {
	revision uint64
	objects  map[api.Key]api.Object
}

func newWorld(objects ...api.Object) *world {
	w := &world{objects: map[api.Key]api.Object{}}
	for _, o := range objects {
		w.apply(api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: api.Clone(o)})
	}
	return w
}

func (w *world) reader() api.Reader {
	return api.NewSnapshot(w.revision, slices.Collect(maps.Values(w.objects))...)
}

func (w *world) apply(ms ...api.Mutation) {
	for _, m := range ms {
		w.revision++
		old, exists := w.objects[m.Key]
		if m.Verb == api.Delete {
			delete(w.objects, m.Key)
			continue
		}
		if exists == (m.Verb == api.Create) {
			panic(fmt.Sprintf("%s of %s, exists: %v", m.Verb, m.Key, exists))
		}
		if exists && m.UID != old.GetUID() {
			panic("wrong UID for " + m.Key.String())
		}
		o := api.Clone(m.Object)
		o.SetResourceVersion(strconv.FormatUint(w.revision, 10))
		if o.GetUID() == "" {
			o.SetUID(types.UID(fmt.Sprint("uid-", w.revision)))
		}
		if svc, ok := o.(*corev1.Service); ok && svc.Spec.ClusterIP == "" {
			svc.Spec.ClusterIP = fmt.Sprint("10.97.0.", w.revision)
			svc.Spec.ClusterIPs = []string{svc.Spec.ClusterIP}
		}
		w.objects[m.Key] = o
	}
}

func source(name string) *api.Source {
	return &api.Source{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func at(file string, line int) api.Position { return api.Position{File: file, Line: line} }

func want(file string, line int, o api.Object) plan.Desired {
	return plan.Desired{Object: o, Pos: at(file, line)}
}

func meta(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Name: name} }

func deployment(name string, replicas int32, image string) *appsv1.Deployment {
	labels := map[string]string{"app": name}
	return &appsv1.Deployment{ObjectMeta: meta(name), Spec: appsv1.DeploymentSpec{
		Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "web", Image: image}}}},
	}}
}

func service(name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: meta(name), Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": name}, Ports: []corev1.ServicePort{{Port: 80}}}}
}

func configMap(name, value string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: meta(name), Data: map[string]string{"key": value}}
}

func text(t *testing.T, c plan.ChangeSet) string {
	t.Helper()
	var b bytes.Buffer
	if err := c.Text(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// commit plans, fails the test on refusals, applies, and returns the plan.
func commit(t *testing.T, w *world, hash string, desired ...plan.Desired) plan.ChangeSet {
	t.Helper()
	c := plan.Plan(plan.Input{Source: source("shop"), Commit: hash, Desired: desired, Current: w.reader()})
	if len(c.Refusals) > 0 {
		t.Fatalf("commit %s is refused:\n%s", hash, text(t, c))
	}
	w.apply(c.Mutations...)
	return c
}

func TestPlanTheWayOfAnApplication(t *testing.T) {
	w := newWorld()
	hello := want("hello.cue", 3, deployment("hello", 2, "hello:1"))
	hello.Fields = map[string]api.Position{"spec.replicas": at("hello.cue", 6)}
	svc := want("hello.cue", 20, service("hello"))
	ns := want("ns.cue", 1, &corev1.Namespace{ObjectMeta: meta("shop")})
	cm := configMap("settings", "a")
	cm.Namespace = "shop"

	c := commit(t, w, "c1", svc, hello, want("ns.cue", 5, cm), ns)
	if got, want := text(t, c), strings.TrimLeft(`
+ namespaces "shop"                 ns.cue:1
+ configmaps "shop/settings"        ns.cue:5
+ services "default/hello"          hello.cue:20
+ deployments.apps "default/hello"  hello.cue:3
0 to change, 4 to add, 0 to delete, 0 unchanged
`, "\n"); got != want {
		t.Errorf("first commit:\n%swant:\n%s", got, want)
	}
	d := w.objects[api.Key{Resource: api.Deployments, Namespace: "default", Name: "hello"}].(*appsv1.Deployment)
	if o, _ := api.OriginOf(d); o.Source != "shop" || o.Commit != "c1" || o.Pos != at("hello.cue", 3) {
		t.Errorf("origin %+v", o)
	}
	if *d.Spec.ProgressDeadlineSeconds != 600 || d.Kind != "Deployment" {
		t.Error("defaults or kind are missing")
	}
	if hello.Object.(*appsv1.Deployment).Annotations != nil {
		t.Error("the input was modified")
	}

	// Status and placement move, the address is assigned: nothing to do.
	d = api.Clone(d)
	d.Status.Replicas, d.Generation = 2, 7
	w.objects[api.KeyOf(d)] = d
	moved := svc
	moved.Pos.Line = 99
	c = commit(t, w, "c2", moved, hello, want("ns.cue", 5, cm), ns)
	if got := text(t, c); got != "0 to change, 0 to add, 0 to delete, 4 unchanged\n" {
		t.Errorf("the same again:\n%s", got)
	}

	hello.Object = deployment("hello", 4, "hello:1")
	c = commit(t, w, "c3", svc, hello, want("ns.cue", 5, cm), ns)
	if got, want := text(t, c), `~ deployments.apps "default/hello"  spec.replicas: 2 → 4  hello.cue:6`+"\n1 to change, 0 to add, 0 to delete, 3 unchanged\n"; got != want {
		t.Errorf("replicas:\n%swant:\n%s", got, want)
	}
	if m := c.Mutations[0]; m.Verb != api.Update || m.UID != d.UID {
		t.Errorf("mutation %+v", m)
	}
	if f := c.Changes[0]; f.Verb != "update" || f.File != "hello.cue:3" || !slices.Equal(f.Fields, []string{"spec.replicas"}) {
		t.Errorf("change %+v", f)
	}
	if o, _ := api.OriginOf(w.objects[api.KeyOf(d)]); o.Commit != "c3" {
		t.Errorf("the changed object says commit %s", o.Commit)
	}
	if o, _ := api.OriginOf(w.objects[api.Key{Resource: api.Services, Namespace: "default", Name: "hello"}]); o.Commit != "c1" || o.Pos.Line != 20 {
		t.Errorf("the unchanged object says %v", o)
	}

	c = commit(t, w, "c4", hello, svc)
	if got, want := text(t, c), strings.TrimLeft(`
- configmaps "shop/settings"  ns.cue:5
- namespaces "shop"           ns.cue:1
0 to change, 0 to add, 2 to delete, 2 unchanged
`, "\n"); got != want {
		t.Errorf("prune:\n%swant:\n%s", got, want)
	}
}

func TestPlanManyFields(t *testing.T) {
	w := newWorld()
	data := map[string]string{}
	for i := range 100 {
		data[fmt.Sprintf("k%02d", i)] = "old"
	}
	cm := &corev1.ConfigMap{ObjectMeta: meta("m"), Data: data}
	commit(t, w, "c1", want("a.cue", 1, cm))
	cm = cm.DeepCopy()
	for k := range cm.Data {
		cm.Data[k] = "a b"
	}
	cm.Data["new/key"] = strings.Repeat("x", 100)
	c := commit(t, w, "c2", want("a.cue", 1, cm))
	out := text(t, c)
	if len(c.Changes[0].Fields) != 32 || !strings.Contains(out, `data.k00: old → "a b"`) || !strings.Contains(out, "only the first 32") {
		t.Errorf("%d fields:\n%s", len(c.Changes[0].Fields), out)
	}
	cm.Data = map[string]string{"new/key": cm.Data["new/key"], "k00": "a b"}
	cm.Labels = map[string]string{"app.kubernetes.io/name": "m"}
	c = commit(t, w, "c3", want("a.cue", 1, cm))
	if out := text(t, c); !strings.Contains(out, `data.k01: removed "a b"`) {
		t.Errorf("removal:\n%s", out)
	}
}

func TestPlanNeverShowsSecrets(t *testing.T) {
	w := newWorld()
	s := &corev1.Secret{ObjectMeta: meta("s"), StringData: map[string]string{"password": "hunter2"}}
	commit(t, w, "c1", want("s.cue", 1, s))
	if c := commit(t, w, "c2", want("s.cue", 1, s)); c.Unchanged != 1 {
		t.Errorf("the same secret counts as changed: %s", text(t, c))
	}
	s.StringData["password"] = "hunter3"
	c := commit(t, w, "c3", want("s.cue", 1, s))
	if out := text(t, c); out != "~ secrets \"default/s\"  data.password: changed (secret)  s.cue:1\n1 to change, 0 to add, 0 to delete, 0 unchanged\n" {
		t.Error(out)
	}
	if e := c.Edits[0][0]; e.Old != "" || e.New != "" {
		t.Errorf("edit carries the value: %+v", e)
	}
}

func TestPlanRefusals(t *testing.T) {
	existing := func() *world {
		w := newWorld()
		immutable := true
		headless := service("headless")
		headless.Spec.ClusterIP = corev1.ClusterIPNone
		fixed := configMap("fixed", "a")
		fixed.Immutable = &immutable
		pod := &corev1.Pod{ObjectMeta: meta("naked"), Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "a:1"}}}}
		commit(t, w, "c1", want("a.cue", 1, deployment("web", 1, "w:1")), want("a.cue", 20, service("web")),
			want("a.cue", 30, headless), want("a.cue", 40, fixed), want("a.cue", 50, pod))
		other := configMap("theirs", "x")
		other.Namespace = "default"
		api.Origin{Source: "bank", Commit: "abcdef0123", Pos: at("bank.cue", 7)}.Set(other)
		made := configMap("made", "x")
		made.Namespace = "default"
		w.apply(api.Mutation{Verb: api.Create, Key: api.KeyOf(other), Object: other}, api.Mutation{Verb: api.Create, Key: api.KeyOf(made), Object: made})
		return w
	}
	selector := deployment("web", 1, "w:1")
	selector.Spec.Selector.MatchLabels = map[string]string{"app": "web", "tier": "front"}
	selector.Spec.Template.Labels = selector.Spec.Selector.MatchLabels
	mismatch := deployment("new", 1, "w:1")
	mismatch.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "other"}}
	address := service("web")
	address.Spec.ClusterIP = "10.97.9.9"
	fixed := configMap("fixed", "b")
	pod := &corev1.Pod{ObjectMeta: meta("naked"), Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "a:2", Args: []string{"-v"}}}}}
	lost := configMap("lost", "x")
	lost.Namespace = "nowhere"
	reserved := configMap("reserved", "x")
	reserved.Annotations = map[string]string{"decree.dev/source": "bank"}
	for name, c := range map[string]struct {
		desired []plan.Desired
		says    []string // parts of the one refusal
	}{
		"selector":       {[]plan.Desired{want("b.cue", 2, selector)}, []string{"b.cue:2: ", `deployments.apps "default/web"`, "spec.selector.matchLabels.tier", "the selector cannot change", "another name"}},
		"mismatch":       {[]plan.Desired{want("b.cue", 2, mismatch)}, []string{"b.cue:2: ", "spec.selector: the selector does not match the labels"}},
		"address":        {[]plan.Desired{want("b.cue", 2, address)}, []string{"b.cue:2: ", "spec.clusterIP: the address of a service cannot change"}},
		"headless to IP": {[]plan.Desired{want("b.cue", 2, service("headless"))}, []string{"spec.clusterIP: the address of a service cannot change"}},
		"immutable":      {[]plan.Desired{want("b.cue", 2, fixed)}, []string{"b.cue:2: ", "the config map is immutable"}},
		"pod":            {[]plan.Desired{want("b.cue", 2, pod)}, []string{"b.cue:2: ", "spec.containers[0].args", "only the images of a pod can change"}},
		"other source":   {[]plan.Desired{want("b.cue", 2, configMap("theirs", "x"))}, []string{"b.cue:2: ", `source "bank", bank.cue:7 at abcdef0`}},
		"no origin":      {[]plan.Desired{want("b.cue", 2, configMap("made", "x"))}, []string{"b.cue:2: ", "was not made by a commit"}},
		"no namespace":   {[]plan.Desired{want("b.cue", 2, lost)}, []string{"b.cue:2: ", `namespace "nowhere" does not exist`, "add a Namespace"}},
		"reserved":       {[]plan.Desired{want("b.cue", 2, reserved)}, []string{"b.cue:2: ", "names under decree.dev/ are set by Decree"}},
		"duplicate":      {[]plan.Desired{want("b.cue", 2, configMap("x", "1")), want("c.cue", 5, configMap("x", "2"))}, []string{"c.cue:5: ", "written twice; the other place is b.cue:2"}},
		"built in":       {[]plan.Desired{want("b.cue", 2, &corev1.Namespace{ObjectMeta: meta("default")})}, []string{"exists in every cluster"}},
		"derived kind":   {[]plan.Desired{want("b.cue", 2, &corev1.Node{ObjectMeta: meta("n1")})}, []string{"Node objects are made by Decree"}},
	} {
		t.Run(name, func(t *testing.T) {
			keep := false
			src := source("shop")
			src.Spec.Prune = &keep // only what the case is about
			out := plan.Plan(plan.Input{Source: src, Commit: "c2", Desired: c.desired, Current: existing().reader()})
			if len(out.Refusals) != 1 || len(out.Mutations)+len(out.Changes) != 0 {
				t.Fatalf("%d refusals, %d mutations:\n%s", len(out.Refusals), len(out.Mutations), text(t, out))
			}
			for _, part := range c.says {
				if got := out.Refusals[0].Error(); !strings.Contains(got, part) {
					t.Errorf("refusal %q lacks %q", got, part)
				}
			}
		})
	}
}

func TestPlanAllowedBesideImmutable(t *testing.T) {
	w := newWorld()
	pod := &corev1.Pod{ObjectMeta: meta("naked"), Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "a:1"}}}}
	commit(t, w, "c1", want("a.cue", 1, pod))
	key := api.Key{Resource: api.Pods, Namespace: "default", Name: "naked"}
	bound := api.Clone(w.objects[key].(*corev1.Pod))
	bound.Spec.NodeName = "n1"
	w.objects[key] = bound
	if c := commit(t, w, "c2", want("a.cue", 1, pod)); c.Unchanged != 1 {
		t.Errorf("the binding counts as a difference:\n%s", text(t, c))
	}
	pod = pod.DeepCopy()
	pod.Spec.Containers[0].Image = "a:2"
	commit(t, w, "c3", want("a.cue", 1, pod))
	got := w.objects[key].(*corev1.Pod)
	if got.Spec.NodeName != "n1" || got.Spec.Containers[0].Image != "a:2" {
		t.Errorf("the image change lost the binding: %+v", got.Spec)
	}
}

func TestPlanDeletionBudget(t *testing.T) {
	objects := func(n int) []plan.Desired {
		var out []plan.Desired
		for i := range n {
			out = append(out, want("a.cue", i+1, configMap(fmt.Sprintf("m%02d", i), "x")))
		}
		return out
	}
	number, all, bad := intstr.FromInt32(7), intstr.FromString("100%"), intstr.FromString("lots")
	for name, c := range map[string]struct {
		have, left int
		budget     *intstr.IntOrString
		allow      int
		refused    string // "" if not
	}{
		"half":             {10, 5, nil, 0, ""},
		"more than half":   {10, 4, nil, 0, `delete 6 of the 10 objects of source "shop"; the deletion budget is 50% (5)`},
		"one is always ok": {2, 1, nil, 0, ""},
		"one of one":       {1, 0, nil, 0, "no objects at all"},
		"everything":       {10, 0, nil, 0, "would delete all 10"},
		"number":           {10, 3, &number, 0, ""},
		"over the number":  {10, 2, &number, 0, "budget is 7 (7)"},
		"100% and nothing": {10, 0, &all, 0, ""},
		"trailer all":      {10, 0, nil, -1, ""},
		"trailer number":   {10, 2, nil, 8, ""},
		"trailer too low":  {10, 2, nil, 7, "7 by the commit message"},
		"bad budget":       {10, 2, &bad, 0, "neither a number nor a percentage"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			commit(t, w, "c1", objects(c.have)...)
			src := source("shop")
			src.Spec.DeletionBudget = c.budget
			out := plan.Plan(plan.Input{Source: src, Commit: "c2", Desired: objects(c.left), Current: w.reader(), AllowDeletions: c.allow})
			got := text(t, out)
			if c.refused == "" && len(out.Mutations) != c.have-c.left || c.refused != "" && !strings.Contains(got, c.refused) {
				t.Errorf("got %s", got)
			}
			if c.refused != "" && name != "bad budget" && !strings.Contains(got, fmt.Sprintf(`"Decree-Allow-Deletions: %d"`, c.have-c.left)) {
				t.Errorf("the refusal does not say how to allow it: %s", got)
			}
			keep := false
			src.Spec.Prune = &keep
			out = plan.Plan(plan.Input{Source: src, Commit: "c2", Desired: objects(c.left), Current: w.reader()})
			if len(out.Mutations)+len(out.Refusals) != 0 {
				t.Errorf("without prune: %s", text(t, out))
			}
		})
	}
}

func TestPlanNamespaceInUse(t *testing.T) {
	w := newWorld()
	inside := configMap("m", "x")
	inside.Namespace = "shop"
	ns := want("ns.cue", 1, &corev1.Namespace{ObjectMeta: meta("shop")})
	keep := []plan.Desired{want("k.cue", 1, configMap("k1", "x")), want("k.cue", 2, configMap("k2", "x"))}
	commit(t, w, "c1", append(keep, ns, want("ns.cue", 5, inside))...)
	out := plan.Plan(plan.Input{Source: source("shop"), Commit: "c2", Desired: append(keep, want("ns.cue", 5, inside)), Current: w.reader()})
	if got := text(t, out); !strings.Contains(got, `namespace "shop" is deleted by this commit (it was at ns.cue:1)`) {
		t.Error(got)
	}
	theirs := configMap("theirs", "x")
	theirs.Namespace = "shop"
	api.Origin{Source: "bank", Commit: "abcdef0123", Pos: at("bank.cue", 7)}.Set(theirs)
	w.apply(api.Mutation{Verb: api.Create, Key: api.KeyOf(theirs), Object: theirs})
	out = plan.Plan(plan.Input{Source: source("shop"), Commit: "c2", Desired: keep, Current: w.reader()})
	if got := text(t, out); !strings.Contains(got, "bank.cue:7") || !strings.HasPrefix(got, "ns.cue:1: ") {
		t.Error(got)
	}
}

func TestPlanSourceInUse(t *testing.T) {
	w := newWorld()
	keep := want("k.cue", 1, configMap("k", "x"))
	commit(t, w, "c1", keep, want("s.cue", 4, source("bank")))
	theirs := configMap("theirs", "x")
	theirs.Namespace = "default"
	api.Origin{Source: "bank", Commit: "abcdef0123", Pos: at("bank.cue", 7)}.Set(theirs)
	w.apply(api.Mutation{Verb: api.Create, Key: api.KeyOf(theirs), Object: theirs})
	in := plan.Input{Source: source("shop"), Commit: "c2", Desired: []plan.Desired{keep}, Current: w.reader()}
	if got := text(t, plan.Plan(in)); !strings.HasPrefix(got, `s.cue:4: sources.decree.dev "bank": the source would be deleted while 1 of its objects are in force`) {
		t.Error(got)
	}
	delete(w.objects, api.KeyOf(theirs))
	in.Current = w.reader()
	if out := plan.Plan(in); len(out.Mutations) != 1 {
		t.Error(text(t, out))
	}
}

// TestChangeSetAsJSON: what a dry run sends over the wire renders the same.
func TestChangeSetAsJSON(t *testing.T) {
	w := newWorld()
	commit(t, w, "c1", want("a.cue", 1, configMap("m", "x")))
	c := plan.Plan(plan.Input{Source: source("shop"), Commit: "c2", Desired: []plan.Desired{want("a.cue", 1, configMap("m", "y"))}, Current: w.reader()})
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var back plan.ChangeSet
	if err := json.Unmarshal(raw, &back); err != nil {
		t.Fatal(err)
	}
	if a, b := text(t, c), text(t, back); a != b || !strings.Contains(a, "data.key: x → y") {
		t.Errorf("%s\n%s", a, b)
	}
}

func TestAllowDeletions(t *testing.T) {
	for message, want := range map[string]int{
		"Remove all\n\nDecree-Allow-Deletions: all\n":                         -1,
		"Remove\n\nbody\n\nSigned-off-by: A\ndecree-allow-deletions: 12":      12,
		"Decree-Allow-Deletions: 3\n\nit was only mentioned in the subject\n": 0,
		"Nothing": 0,
	} {
		if got, err := plan.AllowDeletions(message); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", message, got, err, want)
		}
	}
	for _, value := range []string{"many", "0", "-1", ""} {
		if _, err := plan.AllowDeletions("x\n\nDecree-Allow-Deletions: " + value); err == nil {
			t.Errorf("%q is accepted", value)
		}
	}
}

// TestPlanConverges: whatever is in force and whatever a commit wants, applying its
// plan leaves nothing to do, and the order of the objects does not matter.
func TestPlanConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		for i := range rapid.IntRange(1, 4).Draw(t, "commits") {
			desired := drawDesired(t)
			shuffled := rapid.Permutation(desired).Draw(t, "order")
			in := plan.Input{Source: source("shop"), Commit: fmt.Sprint("c", i), Desired: desired, Current: w.reader(), AllowDeletions: -1}
			c := plan.Plan(in)
			in.Desired = shuffled
			if again := plan.Plan(in); fmt.Sprint(again.Changes) != fmt.Sprint(c.Changes) || again.Unchanged != c.Unchanged {
				t.Fatalf("the order of objects changes the plan:\n%v\n%v", c.Changes, again.Changes)
			}
			if len(c.Refusals) > 0 {
				t.Fatalf("refused: %v", c.Refusals)
			}
			w.apply(c.Mutations...)
			in.Current = w.reader()
			if again := plan.Plan(in); len(again.Mutations)+len(again.Refusals) != 0 || again.Unchanged != len(desired) {
				t.Fatalf("not empty after it was applied: %v %v", again.Changes, again.Refusals)
			}
		}
	})
}

func drawDesired(t *rapid.T) []plan.Desired {
	var out []plan.Desired
	for i, name := range []string{"a", "b", "c", "d"} {
		value := rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, "value")
		if value == "" {
			continue
		}
		switch i {
		case 0:
			out = append(out, want("a.cue", i, configMap(name, value)))
		case 1:
			out = append(out, want("a.cue", i, deployment(name, rapid.Int32Range(0, 3).Draw(t, "replicas"), "img:"+value)))
		case 2:
			svc := service(name)
			svc.Spec.Ports[0].Name = value
			out = append(out, want("a.cue", i, svc))
		case 3:
			out = append(out, want("a.cue", i, &corev1.Secret{ObjectMeta: meta(name), StringData: map[string]string{"k": value}}))
		}
	}
	return out
}
