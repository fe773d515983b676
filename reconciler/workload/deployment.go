package workload

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/schemas/api"
)

// The annotations of a ReplicaSet that belongs to a Deployment, as kubectl knows
// them.
const (
	annotationRevision = "deployment.kubernetes.io/revision"
	annotationDesired  = "deployment.kubernetes.io/desired-replicas"
	annotationMax      = "deployment.kubernetes.io/max-replicas"
)

// Deployment returns the next step of d's rollout: ReplicaSets to create, scale and
// delete, and d's status. wait is the time after which it should be called again
// without any change, zero for never.
//
// It counts pods itself instead of trusting the status of ReplicaSets, which lags:
// the promises of maxSurge and maxUnavailable hold for every view.
func Deployment(now time.Time, r api.Reader, d *appsv1.Deployment) (ms []api.Mutation, wait time.Duration) {
	if d.DeletionTimestamp != nil || !selectorOf(d.Spec.Selector).Matches(labels.Set(d.Spec.Template.Labels)) {
		return nil, 0
	}
	w := observe(now, r, d)
	switch {
	case w.current == nil && !d.Spec.Paused:
		w.createCurrent()
	case w.isScaling() || d.Spec.Paused:
		w.scale()
	case d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType:
		w.recreate()
	default:
		w.roll()
	}
	if !d.Spec.Paused {
		w.stampCurrent()
		w.cleanup()
	}
	w.emit()
	wait = earliest(w.updateStatus(), w.wait)
	return w.out, wait
}

// set is a ReplicaSet of the Deployment, what it has, and what it shall become.
type set struct {
	*appsv1.ReplicaSet
	tally
	target   int32             // spec.replicas to be
	marks    map[string]string // annotations to be; nil: unchanged
	minReady int32             // spec.minReadySeconds to be
	gone     bool
}

// spec is the number of pods the set has been told to have.
func (s *set) spec() int32 { return deref(s.Spec.Replicas, 1) }

// held is the number of active pods that the set has or may make.
func (s *set) held() int32 { return max(s.spec(), s.active) }

// safe is the number of available pods that remain once the set has as many pods as
// it was told.
func (s *set) safe() int32 { return min(s.spec(), s.available) }

// rollout is one pass over one Deployment.
type rollout struct {
	now                       time.Time
	r                         api.Reader
	d                         *appsv1.Deployment
	want                      int32  // d.spec.replicas
	surge, unavailable        int32  // resolved to numbers of pods
	sets                      []*set // by creation, oldest first
	current                   *set   // the one with d's template; nil if there is none
	created, found            bool   // current is made or taken up again in this pass
	wait                      time.Duration
	out                       []api.Mutation
	observedReplicas          int32
	ready, available, updated int32
}

func observe(now time.Time, r api.Reader, d *appsv1.Deployment) *rollout {
	w := &rollout{now: now, r: r, d: d, want: deref(d.Spec.Replicas, 1)}
	w.surge, w.unavailable = fenceposts(d)
	for rs := range api.Owned[*appsv1.ReplicaSet](r, d.UID) {
		if rs.DeletionTimestamp != nil {
			continue
		}
		pods := slices.Collect(api.Owned[*corev1.Pod](r, rs.UID))
		s := &set{ReplicaSet: rs, target: deref(rs.Spec.Replicas, 1), minReady: rs.Spec.MinReadySeconds}
		s.tally = count(pods, seconds(d.Spec.MinReadySeconds), now)
		w.wait = earliest(w.wait, s.wait)
		w.sets = append(w.sets, s)
	}
	slices.SortStableFunc(w.sets, oldestFirst)
	for _, s := range w.sets {
		if w.current == nil && sameTemplate(&s.Spec.Template, &d.Spec.Template) {
			w.current = s
		}
		w.observedReplicas += s.active
		w.ready += s.ready
		w.available += s.available
	}
	if w.current != nil {
		w.updated = w.current.active
		w.found = revision(w.current.ReplicaSet) < w.highestOther()
	}
	return w
}

func oldestFirst(a, b *set) int {
	return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(revision(a.ReplicaSet), revision(b.ReplicaSet)), cmp.Compare(a.Name, b.Name))
}

// fenceposts resolves maxSurge (rounded up) and maxUnavailable (rounded down) to
// numbers of pods. Both zero would never move, so one pod may then be unavailable.
func fenceposts(d *appsv1.Deployment) (surge, unavailable int32) {
	want := int(deref(d.Spec.Replicas, 1))
	if d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
		return 0, 0
	}
	ru := deref(d.Spec.Strategy.RollingUpdate, appsv1.RollingUpdateDeployment{})
	quarter := intstr.FromString("25%")
	s, err1 := intstr.GetScaledValueFromIntOrPercent(intstr.ValueOrDefault(ru.MaxSurge, quarter), want, true)
	u, err2 := intstr.GetScaledValueFromIntOrPercent(intstr.ValueOrDefault(ru.MaxUnavailable, quarter), want, false)
	if err1 != nil || err2 != nil || s < 0 || u < 0 { // the definitions refuse such values
		s, u = 1, 0
	}
	if s == 0 && u == 0 {
		u = 1
	}
	return int32(s), int32(min(u, want))
}

// others are the sets that are not current, oldest first.
func (w *rollout) others() []*set {
	return slices.DeleteFunc(slices.Clone(w.sets), func(s *set) bool { return s == w.current })
}

// recreate stops all old pods, waits until they are gone, then starts the new ones.
func (w *rollout) recreate() {
	left := int32(0)
	for _, s := range w.others() {
		s.target = 0
		left += max(s.spec(), s.present)
	}
	if left == 0 {
		w.current.target = w.want
	} else if !w.created {
		w.current.target = min(w.current.target, w.want)
	}
}

// roll replaces old pods by new ones, never more than want+surge active pods, never
// fewer than want-unavailable available ones.
func (w *rollout) roll() {
	held, safe, old := w.current.held(), w.current.safe(), int32(0)
	for _, s := range w.others() {
		held += s.held()
		safe += s.safe()
		old += s.spec()
	}
	if room := w.want + w.surge - held; w.current.target < w.want && room > 0 {
		w.current.target = min(w.want, w.current.target+room)
	} else if w.current.target > w.want {
		w.current.target = w.want
	}
	if old == 0 {
		return
	}
	least := w.want - w.unavailable
	// Old pods that are not available go first, but only as many as still leave
	// enough pods altogether: they may be back in a moment, the new ones may not.
	idle := old + w.current.safe() - least
	for _, s := range w.others() {
		n := max(0, min(idle, s.spec()-s.available))
		s.target -= n
		idle -= n
	}
	spare := safe - least
	for _, s := range w.others() {
		if spare <= 0 {
			break
		}
		n := min(s.target, spare)
		s.target -= n
		spare -= n
	}
}

func revision(rs *appsv1.ReplicaSet) int64 {
	n, err := strconv.ParseInt(rs.Annotations[annotationRevision], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func (w *rollout) highestOther() int64 {
	highest := int64(0)
	for _, s := range w.others() {
		highest = max(highest, revision(s.ReplicaSet))
	}
	return highest
}

// stampCurrent gives the current set the highest revision, d's annotations and
// d's minReadySeconds.
func (w *rollout) stampCurrent() {
	marks := withoutReserved(w.d.Annotations)
	if marks == nil {
		marks = map[string]string{}
	}
	delete(marks, corev1.LastAppliedConfigAnnotation)
	marks[annotationRevision] = strconv.FormatInt(max(revision(w.current.ReplicaSet), w.highestOther()+1), 10)
	w.current.marks, w.current.minReady = marks, w.d.Spec.MinReadySeconds
}

// cleanup deletes the oldest sets that are not used beyond the history limit.
func (w *rollout) cleanup() {
	limit := deref(w.d.Spec.RevisionHistoryLimit, 10)
	var idle []*set
	for _, s := range w.others() {
		if s.spec() == 0 && s.target == 0 && s.present == 0 {
			idle = append(idle, s)
		}
	}
	slices.SortStableFunc(idle, func(a, b *set) int {
		return cmp.Or(cmp.Compare(revision(a.ReplicaSet), revision(b.ReplicaSet)), oldestFirst(a, b))
	})
	for _, s := range idle[:max(0, len(idle)-int(limit))] {
		s.gone = true
	}
}

// emit turns the targets into mutations, one per set.
func (w *rollout) emit() {
	if w.created {
		rs := w.current.ReplicaSet
		*rs.Spec.Replicas = w.current.target
		rs.Annotations = w.sized(w.current)
		w.out = append(w.out, create(rs))
		w.noteScaling(w.current, 0)
	}
	for _, s := range w.sets {
		if s.gone {
			w.out = append(w.out, remove(s.ReplicaSet))
			continue
		}
		marks := w.sized(s)
		if s.target == s.spec() && s.minReady == s.Spec.MinReadySeconds && maps.Equal(marks, s.Annotations) {
			continue
		}
		rs := api.Clone(s.ReplicaSet)
		rs.Spec.Replicas, rs.Spec.MinReadySeconds, rs.Annotations = &s.target, s.minReady, marks
		w.out = append(w.out, api.Guarded(api.Update, rs))
		if s.target != s.spec() {
			w.noteScaling(s, s.spec())
		}
	}
}

// sized returns the annotations of s with the Deployment's present size, which
// the next scaling needs. Sets without pods do not take part in one.
func (w *rollout) sized(s *set) map[string]string {
	marks := maps.Clone(s.marks)
	if s.marks == nil {
		marks = maps.Clone(s.Annotations)
	}
	if marks == nil {
		marks = map[string]string{}
	}
	if s.target == 0 && s.spec() == 0 && !w.created && s != w.current {
		return marks
	}
	marks[annotationDesired] = strconv.Itoa(int(w.want))
	marks[annotationMax] = strconv.Itoa(int(w.want + w.surge))
	return marks
}

func (w *rollout) noteScaling(s *set, from int32) {
	direction := "up"
	switch {
	case s.target == from:
		return
	case s.target < from:
		direction = "down"
	}
	w.out = note(w.out, w.now, w.r, api.Note{
		About: w.d, Reason: "ScalingReplicaSet", Component: "deployment-controller",
		Message: fmt.Sprintf("Scaled %s replica set %s from %d to %d", direction, s.Name, from, s.target),
	})
}
