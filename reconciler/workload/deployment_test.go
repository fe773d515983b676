package workload_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

func TestDeploymentFirstRollout(t *testing.T) {
	w := newWorld(t)
	w.commit(web(3, "web:1"))
	ms, _ := w.stepDeployment()
	rs := w.sets()[0]
	if *rs.Spec.Replicas != 3 || rs.Labels["pod-template-hash"] == "" || rs.Name != "web-"+rs.Labels["pod-template-hash"] ||
		rs.Spec.Selector.MatchLabels["pod-template-hash"] != rs.Labels["pod-template-hash"] || rs.Annotations["deployment.kubernetes.io/revision"] != "1" ||
		rs.OwnerReferences[0].UID != w.deployment().UID || !*rs.OwnerReferences[0].Controller || rs.OwnerReferences[0].APIVersion != "apps/v1" {
		t.Errorf("replica set %+v", rs)
	}
	if _, git := api.OriginOf(rs); git {
		t.Error("a derived object says that it comes from git")
	}
	if !slices.ContainsFunc(ms, func(m api.Mutation) bool {
		e, ok := m.Object.(*corev1.Event)
		return ok && e.Reason == "ScalingReplicaSet" && e.Message == "Scaled up replica set "+rs.Name+" from 0 to 3"
	}) {
		t.Error("no event about the scaling")
	}
	if ms, _ := w.stepDeployment(); len(ms) != 0 {
		t.Errorf("a second pass does %v", ms)
	}
	if c := condition(t, w.deployment(), appsv1.DeploymentAvailable); c.Status != corev1.ConditionFalse {
		t.Errorf("available before any pod: %+v", c)
	}
	w.stepSet(0)
	pods := w.pods()
	if len(pods) != 3 || pods[0].OwnerReferences[0].UID != rs.UID || pods[0].Labels["app"] != "web" || !strings.HasPrefix(pods[0].Name, rs.Name+"-") {
		t.Fatalf("pods %+v", pods)
	}
	w.settle()
	s := w.deployment().Status
	if s.Replicas != 3 || s.UpdatedReplicas != 3 || s.ReadyReplicas != 3 || s.AvailableReplicas != 3 || s.UnavailableReplicas != 0 || s.ObservedGeneration != 1 {
		t.Errorf("status %+v", s)
	}
	if c := condition(t, w.deployment(), appsv1.DeploymentProgressing); c.Reason != "NewReplicaSetAvailable" || c.Status != corev1.ConditionTrue {
		t.Errorf("progressing %+v", c)
	}
	if s := workload.Rollout(w.reader(), w.deployment()); !s.Done || s.Line != `deployments.apps "default/web": 3 of 3 ready` {
		t.Errorf("rollout %+v", s)
	}
}

func TestDeploymentRollsBackToTheOldSet(t *testing.T) {
	w := newWorld(t)
	for _, image := range []string{"web:1", "web:2", "web:1"} {
		w.commit(web(3, image))
		w.settle()
		if got := w.byImage(); got[image] != 3 || got["web:1"]+got["web:2"] != 3 {
			t.Fatalf("after %s: %v", image, got)
		}
	}
	revisions := map[string]string{}
	for _, rs := range w.sets() {
		revisions[rs.Spec.Template.Spec.Containers[0].Image] = rs.Annotations["deployment.kubernetes.io/revision"]
	}
	if !maps.Equal(revisions, map[string]string{"web:1": "3", "web:2": "2"}) {
		t.Errorf("revisions %v", revisions)
	}
}

func TestDeploymentKeepsItsHistoryLimit(t *testing.T) {
	w := newWorld(t)
	limit := int32(2)
	for i := range 6 {
		d := web(1, fmt.Sprint("web:", i))
		d.Spec.RevisionHistoryLimit = &limit
		w.commit(d)
		w.settle()
	}
	if got := w.byImage(); !maps.Equal(got, map[string]int32{"web:3": 0, "web:4": 0, "web:5": 1}) {
		t.Errorf("sets %v", got)
	}
}

func TestDeploymentRecreate(t *testing.T) {
	w := newWorld(t)
	d := web(2, "web:1")
	d.Spec.Strategy.Type = appsv1.RecreateDeploymentStrategyType
	w.commit(d)
	w.settle()
	d.Spec.Template.Spec.Containers[0].Image = "web:2"
	w.commit(d)
	for range 3 {
		w.stepDeployment()
		for i := range w.sets() {
			w.stepSet(i)
		}
	}
	if got := w.byImage(); got["web:1"] != 0 || got["web:2"] != 0 {
		t.Fatalf("new pods before the old ones are gone: %v", got)
	}
	for _, p := range w.pods() {
		if p.DeletionTimestamp == nil {
			t.Errorf("pod %s is not stopped", p.Name)
		}
	}
	w.settle()
	if got := w.byImage(); got["web:2"] != 2 {
		t.Errorf("sets %v", got)
	}
}

func TestDeploymentPausedScalesButDoesNotRoll(t *testing.T) {
	w := newWorld(t)
	w.commit(web(2, "web:1"))
	w.settle()
	d := web(3, "web:2")
	d.Spec.Paused = true
	w.commit(d)
	w.settle()
	if got := w.byImage(); !maps.Equal(got, map[string]int32{"web:1": 3}) {
		t.Errorf("paused: %v", got)
	}
	if c := condition(t, w.deployment(), appsv1.DeploymentProgressing); c.Reason != "DeploymentPaused" {
		t.Errorf("progressing %+v", c)
	}
	d.Spec.Paused = false
	w.commit(d)
	w.settle()
	if got := w.byImage(); !maps.Equal(got, map[string]int32{"web:1": 0, "web:2": 3}) {
		t.Errorf("resumed: %v", got)
	}
}

func TestDeploymentProportionalScaling(t *testing.T) {
	for _, c := range []struct {
		size             int32
		old, new         int32 // shares in the middle of a rollout of 10 with surge 3
		wantOld, wantNew int32
	}{
		{15, 8, 5, 11, 7}, // 18 in all: 8*18/13 = 11.08, 5*18/13 = 6.9
		{5, 8, 5, 5, 3},   // 8 in all
		{0, 8, 5, 0, 0},
	} {
		w := newWorld(t)
		three, two := intstr.FromInt32(3), intstr.FromInt32(2)
		d := web(10, "web:1")
		d.Spec.Strategy = appsv1.DeploymentStrategy{Type: appsv1.RollingUpdateDeploymentStrategyType,
			RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: &three, MaxUnavailable: &two}}
		w.commit(d)
		w.settle()
		d.Spec.Template.Spec.Containers[0].Image = "web:2"
		w.commit(d)
		w.stepDeployment() // makes the new set with 3 and takes 2 of the old
		w.stepDeployment()
		for i := range w.sets() {
			w.stepSet(i)
		}
		for _, p := range w.pods() {
			if p.DeletionTimestamp != nil {
				delete(w.objects, api.KeyOf(p))
			}
		}
		w.stepDeployment() // two old are gone: five new
		if got := w.byImage(); got["web:1"] != c.old || got["web:2"] != c.new {
			t.Fatalf("before scaling: %v", got)
		}
		d.Spec.Replicas = &c.size
		w.commit(d)
		w.stepDeployment()
		if got := w.byImage(); got["web:1"] != c.wantOld || got["web:2"] != c.wantNew {
			t.Errorf("scaled to %d: %v, want %d and %d", c.size, got, c.wantOld, c.wantNew)
		}
		w.settle()
		if got := w.byImage(); got["web:1"] != 0 || got["web:2"] != c.size {
			t.Errorf("in the end: %v", got)
		}
	}
}

func TestDeploymentDeadline(t *testing.T) {
	w := newWorld(t)
	d := web(2, "web:1")
	minute := int32(60)
	d.Spec.ProgressDeadlineSeconds = &minute
	w.commit(d)
	w.settle()
	d.Spec.Template.Spec.Containers[0].Image = "missing:1"
	w.commit(d)
	var wait time.Duration
	for range 5 {
		_, wait = w.stepDeployment()
		for i := range w.sets() {
			w.stepSet(i)
		}
	}
	if wait <= 0 || wait > time.Minute {
		t.Fatalf("wants to be called in %v, want before the deadline", wait)
	}
	for _, p := range w.pods() {
		if p.Spec.Containers[0].Image == "missing:1" {
			p = api.Clone(p)
			p.Spec.NodeName = "n1"
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "web", State: corev1.ContainerState{
				Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "not found"}}}}
			w.put(p)
		}
	}
	s := workload.Rollout(w.reader(), w.deployment())
	if s.Done || s.Failed || !strings.Contains(s.Line, "1 of 2 updated, 2 ready, 2 old still running") || !strings.Contains(s.Line, "container web: ErrImagePull: not found") {
		t.Errorf("rollout %+v", s)
	}
	w.now = w.now.Add(wait)
	w.stepDeployment()
	c := condition(t, w.deployment(), appsv1.DeploymentProgressing)
	if c.Reason != "ProgressDeadlineExceeded" || c.Status != corev1.ConditionFalse {
		t.Errorf("progressing %+v", c)
	}
	if s := workload.Rollout(w.reader(), w.deployment()); !s.Failed || !strings.Contains(s.Line, "no progress for 60 s") {
		t.Errorf("rollout %+v", s)
	}
	if ms, wait := w.stepDeployment(); len(ms) != 0 || wait != 0 {
		t.Errorf("after the deadline: %v, %v", ms, wait)
	}
	if got := w.byImage(); got["web:1"] != 2 {
		t.Errorf("the good pods suffer: %v", got)
	}
	d.Spec.Template.Spec.Containers[0].Image = "web:1"
	w.commit(d)
	w.settle()
	if c := condition(t, w.deployment(), appsv1.DeploymentProgressing); c.Reason != "NewReplicaSetAvailable" {
		t.Errorf("after the rollback: %+v", c)
	}
}

func TestDeploymentIgnoresWhatIsNotSelected(t *testing.T) {
	w := newWorld(t)
	d := web(2, "web:1")
	d.Spec.Selector.MatchLabels = map[string]string{"app": "other"}
	w.commit(d)
	if ms, _ := w.stepDeployment(); len(ms) != 0 {
		t.Errorf("acts on a selector that does not match: %v", ms)
	}
}

// TestDeploymentNeverBreaksItsPromises drives rollouts by random steps: controllers
// run in any order, pods start and stop in any order, new commits arrive at any
// moment. There are never more than want+surge active pods nor fewer than
// want-unavailable available ones, and in the end there is what the last commit
// wants and nothing is left to do.
func TestDeploymentNeverBreaksItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		d := web(rapid.Int32Range(1, 8).Draw(t, "replicas"), "web:0")
		surge := drawAmount(t, "surge")
		unavailable := drawAmount(t, "unavailable")
		d.Spec.MinReadySeconds = rapid.SampledFrom([]int32{0, 0, 10}).Draw(t, "minReady")
		d.Spec.Strategy = appsv1.DeploymentStrategy{Type: appsv1.RollingUpdateDeploymentStrategyType,
			RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: &surge, MaxUnavailable: &unavailable}}
		w.commit(d)
		w.settle()
		want := int(*d.Spec.Replicas)
		s, _ := intstr.GetScaledValueFromIntOrPercent(&surge, want, true)
		u, _ := intstr.GetScaledValueFromIntOrPercent(&unavailable, want, false)
		if s == 0 && u == 0 {
			u = 1
		}
		minReady := time.Duration(d.Spec.MinReadySeconds) * time.Second
		for i := range rapid.IntRange(20, 80).Draw(t, "steps") {
			if rapid.IntRange(0, 9).Draw(t, "commit") == 0 || i == 0 {
				d.Spec.Template.Spec.Containers[0].Image = rapid.SampledFrom([]string{"web:0", "web:1", "web:2"}).Draw(t, "image")
				w.commit(d)
			}
			randomStep(t, w)
			active, available := 0, 0
			for _, p := range w.pods() {
				if api.PodActive(p) {
					active++
					if api.PodAvailable(p, minReady, w.now) {
						available++
					}
				}
			}
			if active > want+s {
				t.Fatalf("step %d: %d active pods, at most %d+%d", i, active, want, s)
			}
			if available < want-u {
				t.Fatalf("step %d: %d available pods, at least %d-%d", i, available, want, u)
			}
		}
		w.settle()
		image := d.Spec.Template.Spec.Containers[0].Image
		if got := w.byImage(); int(got[image]) != want || len(w.pods()) != want {
			t.Fatalf("in the end %v, %d pods", got, len(w.pods()))
		}
	})
}

func drawAmount(t *rapid.T, name string) intstr.IntOrString {
	if rapid.Bool().Draw(t, name+" in percent") {
		return intstr.FromString(fmt.Sprintf("%d%%", rapid.IntRange(0, 100).Draw(t, name)))
	}
	return intstr.FromInt(rapid.IntRange(0, 3).Draw(t, name))
}

func randomStep(t *rapid.T, w *world) {
	switch rapid.IntRange(0, 4).Draw(t, "step") {
	case 0:
		w.stepDeployment()
	case 1:
		w.stepSet(rapid.IntRange(0, len(w.sets())-1).Draw(t, "set"))
	case 2: // a pod starts
		if p := pick(t, w, func(p *corev1.Pod) bool { return p.DeletionTimestamp == nil && !api.PodReady(p) }); p != nil {
			w.start(p, true)
		}
	case 3: // a pod is gone
		if p := pick(t, w, func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil }); p != nil {
			delete(w.objects, api.KeyOf(p))
		}
	case 4:
		w.now = w.now.Add(3 * time.Second)
	}
}

func pick(t *rapid.T, w *world, ok func(*corev1.Pod) bool) *corev1.Pod {
	pods := slices.DeleteFunc(w.pods(), func(p *corev1.Pod) bool { return !ok(p) })
	if len(pods) == 0 {
		return nil
	}
	return rapid.SampledFrom(pods).Draw(t, "pod")
}
