package agent

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// conditions computes the agent's conditions and keeps everybody else's.
func (s *statusWriter) conditions(st *corev1.PodStatus, initialized bool) []corev1.PodCondition {
	var own []corev1.PodCondition
	if !slices.ContainsFunc(s.pod.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodScheduled }) {
		own = append(own, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue})
	}
	own = append(own, s.initializedCondition(st, initialized))
	ready := s.containersReady(st)
	own = append(own, ready)
	ready.Type = corev1.PodReady
	if ready.Status == corev1.ConditionTrue {
		if missing := s.openGates(); len(missing) > 0 {
			ready.Status, ready.Reason = corev1.ConditionFalse, "ReadinessGatesNotReady"
			ready.Message = "corresponding conditions of pod readiness gates are not True: " + quoteList(missing)
		}
	}
	own = append(own, ready)
	var out []corev1.PodCondition
	for _, c := range s.pod.Status.Conditions {
		if i := slices.IndexFunc(own, func(o corev1.PodCondition) bool { return o.Type == c.Type }); i >= 0 {
			n := own[i]
			n.LastTransitionTime = c.LastTransitionTime
			n.LastProbeTime = c.LastProbeTime
			if n.Status != c.Status {
				n.LastTransitionTime = *seconds(s.now)
			}
			c = n
			own = slices.Delete(own, i, i+1)
		}
		out = append(out, c)
	}
	for _, c := range own {
		c.LastTransitionTime = *seconds(s.now)
		out = append(out, c)
	}
	return out
}

func (s *statusWriter) initializedCondition(st *corev1.PodStatus, initialized bool) corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.PodInitialized, Status: corev1.ConditionTrue, ObservedGeneration: s.pod.Generation}
	switch {
	case st.Phase == corev1.PodSucceeded:
		c.Reason = "PodCompleted"
	case !initialized:
		c.Status, c.Reason = corev1.ConditionFalse, "ContainersNotInitialized"
		c.Message = "containers with incomplete status: " + quoteList(s.uninitialized())
	}
	return c
}

func (s *statusWriter) containersReady(st *corev1.PodStatus) corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.ContainersReady, Status: corev1.ConditionFalse, ObservedGeneration: s.pod.Generation}
	switch st.Phase {
	case corev1.PodSucceeded:
		c.Reason = "PodCompleted"
		return c
	case corev1.PodFailed:
		c.Reason = "PodFailed"
		return c
	}
	var unready []string
	for i := range s.pod.Spec.InitContainers {
		if isSidecar(&s.pod.Spec.InitContainers[i]) && !st.InitContainerStatuses[i].Ready {
			unready = append(unready, st.InitContainerStatuses[i].Name)
		}
	}
	for _, cs := range st.ContainerStatuses {
		if !cs.Ready {
			unready = append(unready, cs.Name)
		}
	}
	if len(unready) > 0 {
		c.Reason, c.Message = "ContainersNotReady", "containers with unready status: "+quoteList(unready)
		return c
	}
	c.Status = corev1.ConditionTrue
	return c
}

func (s *statusWriter) openGates() (missing []string) {
	for _, g := range s.pod.Spec.ReadinessGates {
		if !slices.ContainsFunc(s.pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == g.ConditionType && c.Status == corev1.ConditionTrue
		}) {
			missing = append(missing, string(g.ConditionType))
		}
	}
	return missing
}

// QOSClass classifies a pod by its requests and limits of CPU and memory, as
// Kubernetes does.
func QOSClass(pod *corev1.Pod) corev1.PodQOSClass {
	if pod.Status.QOSClass != "" {
		return pod.Status.QOSClass
	}
	guaranteed, any := true, false
	for _, c := range allContainers(pod) {
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			req, lim := c.Resources.Requests[name], c.Resources.Limits[name]
			any = any || !req.IsZero() || !lim.IsZero()
			if lim.IsZero() || (!req.IsZero() && req.Cmp(lim) != 0) {
				guaranteed = false
			}
		}
	}
	switch {
	case !any:
		return corev1.PodQOSBestEffort
	case guaranteed:
		return corev1.PodQOSGuaranteed
	}
	return corev1.PodQOSBurstable
}

// podResources sums up what a whole pod asks for: its containers together, or the
// largest init container, if that is more; plus overhead. A limit is set only if
// every container has it.
func podResources(pod *corev1.Pod) corev1.ResourceRequirements {
	sum := corev1.ResourceRequirements{Requests: corev1.ResourceList{}, Limits: corev1.ResourceList{}}
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		if q := podResource(pod, name, func(c *corev1.Container) corev1.ResourceList {
			if _, ok := c.Resources.Requests[name]; ok {
				return c.Resources.Requests
			}
			return c.Resources.Limits
		}); !q.IsZero() {
			sum.Requests[name] = q
		}
		if !everyContainerLimits(pod, name) {
			continue
		}
		if q := podResource(pod, name, func(c *corev1.Container) corev1.ResourceList { return c.Resources.Limits }); !q.IsZero() {
			sum.Limits[name] = q
		}
	}
	return sum
}

func everyContainerLimits(pod *corev1.Pod, name corev1.ResourceName) bool {
	for _, c := range allContainers(pod) {
		if q, ok := c.Resources.Limits[name]; !ok || q.IsZero() {
			return false
		}
	}
	return true
}

func podResource(pod *corev1.Pod, name corev1.ResourceName, of func(*corev1.Container) corev1.ResourceList) resource.Quantity {
	var total, sidecars, most resource.Quantity
	for i := range pod.Spec.Containers {
		q := of(&pod.Spec.Containers[i])[name]
		total.Add(q)
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		q := of(c)[name].DeepCopy()
		if isSidecar(c) {
			total.Add(q)
			sidecars.Add(q)
			continue
		}
		q.Add(sidecars)
		if q.Cmp(most) > 0 {
			most = q
		}
	}
	if most.Cmp(total) > 0 {
		total = most
	}
	total.Add(pod.Spec.Overhead[name])
	return total
}
