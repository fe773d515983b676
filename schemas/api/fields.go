package api

import (
	"strconv"

	corev1 "k8s.io/api/core/v1"
)

// The fields that field selectors may name, as in Kubernetes.
var (
	namespaceFields = map[string]func(Object) string{
		"status.phase": field(func(o *corev1.Namespace) string { return string(o.Status.Phase) }),
	}
	nodeFields = map[string]func(Object) string{
		"spec.unschedulable": field(func(o *corev1.Node) string { return strconv.FormatBool(o.Spec.Unschedulable) }),
	}
	podFields = map[string]func(Object) string{
		"spec.nodeName":            field(func(o *corev1.Pod) string { return o.Spec.NodeName }),
		"spec.restartPolicy":       field(func(o *corev1.Pod) string { return string(o.Spec.RestartPolicy) }),
		"spec.schedulerName":       field(func(o *corev1.Pod) string { return o.Spec.SchedulerName }),
		"spec.serviceAccountName":  field(func(o *corev1.Pod) string { return o.Spec.ServiceAccountName }),
		"status.phase":             field(func(o *corev1.Pod) string { return string(o.Status.Phase) }),
		"status.podIP":             field(func(o *corev1.Pod) string { return o.Status.PodIP }),
		"status.nominatedNodeName": field(func(o *corev1.Pod) string { return o.Status.NominatedNodeName }),
	}
	serviceFields = map[string]func(Object) string{
		"spec.clusterIP": field(func(o *corev1.Service) string { return o.Spec.ClusterIP }),
		"spec.type":      field(func(o *corev1.Service) string { return string(o.Spec.Type) }),
	}
	secretFields = map[string]func(Object) string{
		"type": field(func(o *corev1.Secret) string { return string(o.Type) }),
	}
	eventFields = map[string]func(Object) string{
		"involvedObject.kind":            field(func(o *corev1.Event) string { return o.InvolvedObject.Kind }),
		"involvedObject.namespace":       field(func(o *corev1.Event) string { return o.InvolvedObject.Namespace }),
		"involvedObject.name":            field(func(o *corev1.Event) string { return o.InvolvedObject.Name }),
		"involvedObject.uid":             field(func(o *corev1.Event) string { return string(o.InvolvedObject.UID) }),
		"involvedObject.apiVersion":      field(func(o *corev1.Event) string { return o.InvolvedObject.APIVersion }),
		"involvedObject.resourceVersion": field(func(o *corev1.Event) string { return o.InvolvedObject.ResourceVersion }),
		"involvedObject.fieldPath":       field(func(o *corev1.Event) string { return o.InvolvedObject.FieldPath }),
		"reason":                         field(func(o *corev1.Event) string { return o.Reason }),
		"reportingComponent":             field(func(o *corev1.Event) string { return o.ReportingController }),
		"source":                         field(func(o *corev1.Event) string { return o.Source.Component }),
		"type":                           field(func(o *corev1.Event) string { return o.Type }),
	}
	revisionFields = map[string]func(Object) string{
		"spec.source": field(func(o *Revision) string { return o.Spec.Source }),
		"spec.commit": field(func(o *Revision) string { return o.Spec.Commit }),
		"spec.result": field(func(o *Revision) string { return o.Spec.Result }),
	}
)

func field[T Object](f func(T) string) func(Object) string {
	return func(o Object) string { return f(o.(T)) }
}
