package workload_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

func readyNode(name string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "AgentReady"}}
	return n
}

func (w *world) node(name string) *corev1.Node {
	n, _ := api.Get[*corev1.Node](w.reader(), "", name)
	return n
}

func (w *world) stepNodes(contact map[string]time.Time) ([]api.Mutation, time.Duration) {
	w.t.Helper()
	ms, wait := workload.Nodes(w.now, w.reader(), contact)
	w.apply(ms)
	return ms, wait
}

func (w *world) pod(name string) *corev1.Pod {
	p, _ := api.Get[*corev1.Pod](w.reader(), "default", name)
	return p
}

func TestNodesGoSilentAndComeBack(t *testing.T) {
	w := newWorld(t)
	w.put(readyNode("n1"))
	w.put(readyNode("n2"))
	w.put(readyNode("unheard"))
	w.put(backend("plain", "10.98.0.1", true))
	w.put(backend("stays", "10.98.0.2", true, func(p *corev1.Pod) {
		p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
	}))
	ten := int64(10)
	w.put(backend("hasty", "10.98.0.3", true, func(p *corev1.Pod) {
		p.Spec.Tolerations = []corev1.Toleration{{Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, TolerationSeconds: &ten}}
	}))
	git := backend("from-git", "10.98.0.4", true)
	api.Origin{Source: "shop", Commit: "c1", Pos: api.Position{File: "a.cue", Line: 1}}.Set(git)
	w.put(git)
	w.put(backend("elsewhere", "10.98.0.5", true, func(p *corev1.Pod) { p.Spec.NodeName = "n2" }))
	start := w.now
	contact := map[string]time.Time{"n1": start, "n2": start}
	if ms, wait := w.stepNodes(contact); len(ms) != 0 || wait != 40*time.Second {
		t.Fatalf("healthy nodes: %v, again in %v", ms, wait)
	}
	w.now = start.Add(39 * time.Second)
	contact["n2"] = w.now
	if ms, wait := w.stepNodes(contact); len(ms) != 0 || wait != time.Second {
		t.Fatalf("after 39 s: %v, again in %v", ms, wait)
	}
	w.now = start.Add(40 * time.Second)
	w.stepNodes(contact)
	c := w.node("n1").Status.Conditions[0]
	if c.Status != corev1.ConditionUnknown || !strings.Contains(c.Message, "no word from the node's agent since") {
		t.Fatalf("after 40 s: %+v", c)
	}
	w.stepNodes(contact)
	if taints := w.node("n1").Spec.Taints; len(taints) != 2 || taints[1].Key != corev1.TaintNodeUnreachable || taints[1].Effect != corev1.TaintEffectNoExecute || taints[1].TimeAdded == nil {
		t.Errorf("taints %+v", taints)
	}
	for name, ready := range map[string]bool{"plain": false, "from-git": false, "elsewhere": true} {
		if api.PodReady(w.pod(name)) != ready {
			t.Errorf("pod %s ready: %v", name, !ready)
		}
	}
	ms, wait := w.stepNodes(contact)
	if len(ms) != 0 || wait != 10*time.Second {
		t.Fatalf("in between: %v, again in %v", ms, wait)
	}
	w.now = w.now.Add(10 * time.Second)
	contact["n2"] = w.now
	w.stepNodes(contact)
	if w.pod("hasty").DeletionTimestamp == nil || w.pod("plain").DeletionTimestamp != nil {
		t.Error("after ten seconds only the pod that tolerates ten seconds goes")
	}
	w.now = w.now.Add(290 * time.Second)
	contact["n2"] = w.now
	w.stepNodes(contact)
	if w.pod("plain").DeletionTimestamp == nil || w.pod("stays").DeletionTimestamp != nil || w.pod("from-git").DeletionTimestamp != nil {
		t.Error("after five minutes plain goes, stays and from-git do not")
	}
	// The agent is back and reports.
	back := api.Clone(w.node("n1"))
	back.Status.Conditions[0] = corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionTrue}
	w.put(back)
	contact["n1"] = w.now
	w.stepNodes(contact)
	if taints := w.node("n1").Spec.Taints; len(taints) != 0 {
		t.Errorf("taints after the return: %+v", taints)
	}
	if ms, _ := w.stepNodes(contact); len(ms) != 0 {
		t.Errorf("after the return: %v", ms)
	}
	if len(w.node("unheard").Spec.Taints) != 0 {
		t.Error("a node that is not in the map was judged")
	}
}

func TestTheFirstTaintThatIsNotToleratedCounts(t *testing.T) {
	w := newWorld(t)
	n := readyNode("n1")
	at := metav1.NewTime(w.now)
	n.Spec.Taints = []corev1.Taint{
		{Key: "slow", Effect: corev1.TaintEffectNoExecute, TimeAdded: &at}, {Key: "fast", Effect: corev1.TaintEffectNoExecute, TimeAdded: &at},
	}
	w.put(n)
	tolerate := func(seconds map[string]int64) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			for key, s := range seconds {
				p.Spec.Tolerations = append(p.Spec.Tolerations, corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, TolerationSeconds: &s})
			}
		}
	}
	w.put(backend("both", "10.98.0.1", true, tolerate(map[string]int64{"slow": 100, "fast": 20})))
	w.put(backend("none", "10.98.0.2", true))
	if _, wait := w.stepNodes(nil); wait != 20*time.Second || w.pod("none").DeletionTimestamp == nil || w.pod("both").DeletionTimestamp != nil {
		t.Errorf("again in %v, want 20s; the pod without toleration goes at once", wait)
	}
	w.now = w.now.Add(20 * time.Second)
	if w.stepNodes(nil); w.pod("both").DeletionTimestamp == nil {
		t.Error("the shorter toleration does not count")
	}
}

func TestGarbage(t *testing.T) {
	w := newWorld(t)
	w.put(readyNode("n1"))
	w.put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	w.put(webSet(1))
	w.stepSet(0)
	child := w.pods()[0]
	w.put(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "gone", Name: "homeless"}})
	gitMap := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "gone", Name: "from-git"}}
	api.Origin{Source: "shop", Commit: "c1", Pos: api.Position{File: "a.cue", Line: 1}}.Set(gitMap)
	w.put(gitMap)
	w.put(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "fine"}})
	stray := backend("stray", "10.98.0.1", true, func(p *corev1.Pod) { p.Spec.NodeName = "gone" })
	w.put(stray)
	w.put(backend("leaving", "10.98.0.2", true, terminating(w), func(p *corev1.Pod) { p.Spec.NodeName = "gone" }))
	w.put(backend("leaving-well", "10.98.0.2", true, terminating(w)))
	gitPod := backend("git-pod", "10.98.0.3", true, func(p *corev1.Pod) { p.Spec.NodeName = "gone" })
	api.Origin{Source: "shop", Commit: "c1", Pos: api.Position{File: "a.cue", Line: 1}}.Set(gitPod)
	w.put(gitPod)
	ghost := backend("ghost", "10.98.0.4", true)
	ghost.OwnerReferences = slices.Clone(child.OwnerReferences)
	ghost.OwnerReferences[0].UID = "another"
	w.put(ghost)
	foreign := backend("foreign", "10.98.0.5", true)
	foreign.OwnerReferences = slices.Clone(child.OwnerReferences)
	foreign.OwnerReferences[0].Kind = "Workflow"
	w.put(foreign)
	old := &corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "old"}, LastTimestamp: metav1.NewTime(w.now.Add(-61 * time.Minute))}
	w.put(old)
	w.put(&corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "recent"}, LastTimestamp: metav1.NewTime(w.now.Add(-59 * time.Minute))})

	ms := workload.Garbage(w.now, w.reader())
	var got []string
	for _, m := range ms {
		grace := ""
		if m.Grace != nil {
			grace = " now"
		}
		got = append(got, m.Verb.String()+" "+m.Key.Name+grace)
	}
	slices.Sort(got)
	want := []string{"delete ghost", "delete homeless", "delete leaving now", "delete old", "delete stray now", "update status git-pod"}
	if !slices.Equal(got, want) {
		t.Errorf("garbage %q, want %q", got, want)
	}
	w.apply(ms)
	if p := w.pod("git-pod"); p.Status.Phase != corev1.PodFailed || p.Status.Reason != "NodeLost" || api.PodReady(p) {
		t.Errorf("pod from git on a lost node: %+v", p.Status)
	}
	ghostGone := api.Clone(w.pod("ghost")) // bound, so only marked: its node removes it
	delete(w.objects, api.KeyOf(ghostGone))
	if ms := workload.Garbage(w.now, w.reader()); len(ms) != 0 {
		t.Errorf("a second pass does %v", ms)
	}
}

func TestWhyNotReady(t *testing.T) {
	waiting := func(reason, message string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}
		}
	}
	for name, c := range map[string]struct {
		change func(*corev1.Pod)
		want   string
	}{
		"ready":    {func(p *corev1.Pod) { p.Status.Conditions[0].Status = corev1.ConditionTrue }, ""},
		"starting": {waiting("ContainerCreating", ""), ""},
		"image":    {waiting("ImagePullBackOff", "not found"), "container c: ImagePullBackOff: not found"},
		"crash loop": {func(p *corev1.Pod) {
			waiting("CrashLoopBackOff", "")(p)
			p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 137, Signal: 9, Reason: "OOMKilled"}
		}, "container c: CrashLoopBackOff, last run: killed by signal 9 (OOMKilled)"},
		"exited": {func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 2, Reason: "Error"}}}}
		}, "container c: exit code 2"},
		"readiness": {func(p *corev1.Pod) {
			p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{}
			p.Status.Conditions[0].Message = "http 503"
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}
		}, "container c: readiness probe has not passed (http 503)"},
		"unplaced": {func(p *corev1.Pod) {
			p.Spec.NodeName = ""
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0 of 1 nodes: 1 is cordoned"}}
		}, "not placed: 0 of 1 nodes: 1 is cordoned"},
		"failed": {func(p *corev1.Pod) {
			p.Status.Phase, p.Status.Reason, p.Status.Message = corev1.PodFailed, "Evicted", "no disk"
		}, "Evicted: no disk"},
	} {
		if got := workload.WhyNotReady(backend("p", "10.98.0.1", false, c.change)); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
