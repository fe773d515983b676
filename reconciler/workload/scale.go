package workload

import (
	"cmp"
	"slices"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
)

// isScaling reports whether d's number of replicas changed since it was last
// shared out among the sets.
func (w *rollout) isScaling() bool {
	for _, s := range w.sets {
		desired, err := strconv.Atoi(s.Annotations[annotationDesired])
		if s.spec() > 0 && err == nil && int32(desired) != w.want {
			return true
		}
	}
	return false
}

// scale brings the sum of all sets to d's new size, each in proportion to its
// share, so that a scaling amid a rollout does not put all its pods on one side.
func (w *rollout) scale() {
	if only := w.onlyActive(); only != nil {
		only.target = w.want
		return
	}
	if w.current != nil && w.current.spec() == w.want && w.current.available >= w.want {
		for _, s := range w.others() {
			s.target = 0
		}
		return
	}
	if w.d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
		return
	}
	var active []*set
	total := int32(0)
	for _, s := range w.sets {
		if s.spec() > 0 {
			active = append(active, s)
			total += s.spec()
		}
	}
	limit := int32(0)
	if w.want > 0 {
		limit = w.want + w.surge
	}
	w.share(active, limit, limit-total)
}

// share gives add pods (or takes them, when negative) to sets by their size.
func (w *rollout) share(sets []*set, limit, add int32) {
	slices.SortStableFunc(sets, func(a, b *set) int {
		if add > 0 { // the larger, then the newer gains first
			return cmp.Or(cmp.Compare(b.spec(), a.spec()), oldestFirst(b, a))
		}
		return cmp.Or(cmp.Compare(b.spec(), a.spec()), oldestFirst(a, b))
	})
	left := add
	for _, s := range sets {
		if add == 0 {
			break
		}
		before, err := strconv.Atoi(s.Annotations[annotationMax])
		if err != nil || before <= 0 {
			before = int(max(1, w.d.Status.Replicas))
		}
		// Rounded half up, as int32 does not overflow here in 64 bits.
		part := int32((2*int64(s.spec())*int64(limit)+int64(before))/(2*int64(before))) - s.spec()
		if add > 0 {
			part = max(0, min(part, left))
		} else {
			part = min(0, max(part, left))
		}
		s.target = max(0, s.spec()+part)
		left -= s.target - s.spec()
	}
	for _, s := range sets { // what rounding left over
		n := max(s.target+left, 0) - s.target
		s.target += n
		left -= n
	}
}

// onlyActive returns the set that has all the pods; when none has any, the current
// or else the newest one.
func (w *rollout) onlyActive() *set {
	var active []*set
	for _, s := range w.sets {
		if s.spec() > 0 {
			active = append(active, s)
		}
	}
	switch {
	case len(active) == 1:
		return active[0]
	case len(active) > 1:
		return nil
	case w.current != nil:
		return w.current
	case len(w.sets) > 0:
		return w.sets[len(w.sets)-1]
	}
	return nil
}
