package api

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/duration"
)

// The tables of the served kinds. They show what kubectl shows for the same kind,
// so that people and scripts find what they know.
var (
	namespaceColumns = []Column{
		text("Status", func(o *corev1.Namespace) string {
			if o.Status.Phase == "" {
				return string(corev1.NamespaceActive) // nothing else happens to one yet
			}
			return string(o.Status.Phase)
		}),
		ageColumn,
	}
	nodeColumns = []Column{
		text("Status", nodeStatus),
		text("Roles", nodeRoles),
		ageColumn,
		text("Version", func(o *corev1.Node) string { return o.Status.NodeInfo.KubeletVersion }),
		wide("Internal-IP", func(o *corev1.Node) string { return nodeAddress(o, corev1.NodeInternalIP) }),
		wide("External-IP", func(o *corev1.Node) string { return nodeAddress(o, corev1.NodeExternalIP) }),
		wide("OS-Image", func(o *corev1.Node) string { return known(o.Status.NodeInfo.OSImage) }),
		wide("Kernel-Version", func(o *corev1.Node) string { return known(o.Status.NodeInfo.KernelVersion) }),
		wide("Container-Runtime", func(o *corev1.Node) string { return known(o.Status.NodeInfo.ContainerRuntimeVersion) }),
	}
	podColumns = []Column{
		text("Ready", func(o *corev1.Pod) string {
			ready, total := readyContainers(o)
			return fmt.Sprintf("%d/%d", ready, total)
		}),
		text("Status", PodReason),
		{Name: "Restarts", Type: "string", Value: func(o Object, now time.Time) any { return podRestarts(o.(*corev1.Pod), now) }},
		ageColumn,
		wide("IP", func(o *corev1.Pod) string { return none(o.Status.PodIP) }),
		wide("Node", func(o *corev1.Pod) string { return none(o.Spec.NodeName) }),
		wide("Nominated Node", func(o *corev1.Pod) string { return none(o.Status.NominatedNodeName) }),
		wide("Readiness Gates", func(*corev1.Pod) string { return none("") }),
	}
	serviceColumns = []Column{
		text("Type", func(o *corev1.Service) string { return string(o.Spec.Type) }),
		text("Cluster-IP", func(o *corev1.Service) string { return none(o.Spec.ClusterIP) }),
		text("External-IP", serviceExternal),
		text("Port(s)", servicePorts),
		ageColumn,
		wide("Selector", func(o *corev1.Service) string { return none(labels.FormatLabels(o.Spec.Selector)) }),
	}
	configMapColumns = []Column{
		number("Data", func(o *corev1.ConfigMap) int64 { return int64(len(o.Data) + len(o.BinaryData)) }),
		ageColumn,
	}
	secretColumns = []Column{
		text("Type", func(o *corev1.Secret) string { return string(o.Type) }),
		number("Data", func(o *corev1.Secret) int64 { return int64(len(o.Data)) }),
		ageColumn,
	}
	serverColumns = []Column{
		text("Node", func(o *Server) string { return o.Spec.Node }),
		text("Address", func(o *Server) string { return o.Spec.Address }),
		text("Site", func(o *Server) string { return none(o.Spec.Site) }),
		text("Version", func(o *Server) string { return known(o.Status.Version) }),
		ageColumn,
	}
	eventColumns = []Column{
		{Name: "Last Seen", Type: "string", Value: func(o Object, now time.Time) any { return age(eventLast(o.(*corev1.Event)), now) }},
		text("Type", func(o *corev1.Event) string { return o.Type }),
		text("Reason", func(o *corev1.Event) string { return o.Reason }),
		text("Object", eventObject),
		wide("Subobject", func(o *corev1.Event) string { return o.InvolvedObject.FieldPath }),
		wide("Source", eventSource),
		text("Message", func(o *corev1.Event) string { return strings.TrimSpace(o.Message) }),
		{Name: "First Seen", Type: "string", Wide: true, Value: func(o Object, now time.Time) any { return age(eventFirst(o.(*corev1.Event)), now) }},
		{Name: "Count", Type: "integer", Wide: true, Value: func(o Object, _ time.Time) any { return eventCount(o.(*corev1.Event)) }},
		wide("Name", func(o *corev1.Event) string { return o.Name }),
	}
	deploymentColumns = []Column{
		text("Ready", func(o *appsv1.Deployment) string {
			return fmt.Sprintf("%d/%d", o.Status.ReadyReplicas, replicas(o.Spec.Replicas))
		}),
		number("Up-to-date", func(o *appsv1.Deployment) int64 { return int64(o.Status.UpdatedReplicas) }),
		number("Available", func(o *appsv1.Deployment) int64 { return int64(o.Status.AvailableReplicas) }),
		ageColumn,
		wide("Containers", func(o *appsv1.Deployment) string { return containerNames(o.Spec.Template.Spec.Containers) }),
		wide("Images", func(o *appsv1.Deployment) string { return containerImages(o.Spec.Template.Spec.Containers) }),
		wide("Selector", func(o *appsv1.Deployment) string { return metav1.FormatLabelSelector(o.Spec.Selector) }),
	}
	replicaSetColumns = []Column{
		number("Desired", func(o *appsv1.ReplicaSet) int64 { return int64(replicas(o.Spec.Replicas)) }),
		number("Current", func(o *appsv1.ReplicaSet) int64 { return int64(o.Status.Replicas) }),
		number("Ready", func(o *appsv1.ReplicaSet) int64 { return int64(o.Status.ReadyReplicas) }),
		ageColumn,
		wide("Containers", func(o *appsv1.ReplicaSet) string { return containerNames(o.Spec.Template.Spec.Containers) }),
		wide("Images", func(o *appsv1.ReplicaSet) string { return containerImages(o.Spec.Template.Spec.Containers) }),
		wide("Selector", func(o *appsv1.ReplicaSet) string { return metav1.FormatLabelSelector(o.Spec.Selector) }),
	}
	endpointSliceColumns = []Column{
		text("AddressType", func(o *discoveryv1.EndpointSlice) string { return string(o.AddressType) }),
		text("Ports", slicePorts),
		text("Endpoints", sliceEndpoints),
		ageColumn,
	}
	sourceColumns = []Column{
		text("URL", func(o *Source) string {
			if o.Spec.URL == "" {
				return "<built-in>"
			}
			return RedactURL(o.Spec.URL)
		}),
		text("Applied", func(o *Source) string { return none(short(o.Status.Applied)) }),
		text("Ready", sourceReady),
		text("Status", sourceState),
		number("Objects", func(o *Source) int64 { return o.Status.Objects }),
		ageColumn,
		wide("Fetched", func(o *Source) string { return none(short(o.Status.Fetched)) }),
	}
	poolColumns = []Column{
		text("Addresses", func(o *AddressPool) string { return strings.Join(o.Spec.Addresses, ",") }),
		text("Auto", func(o *AddressPool) string { return strconv.FormatBool(o.Spec.AutoAssign == nil || *o.Spec.AutoAssign) }),
		number("Assigned", func(o *AddressPool) int64 { return o.Status.Assigned }),
		ageColumn,
	}
	revisionColumns = []Column{
		text("Source", func(o *Revision) string { return o.Spec.Source }),
		text("Commit", func(o *Revision) string { return short(o.Spec.Commit) }),
		text("Result", func(o *Revision) string { return o.Spec.Result }),
		number("Changes", func(o *Revision) int64 { return int64(len(o.Spec.Changes)) }),
		text("Author", revisionAuthor),
		text("Pusher", func(o *Revision) string { return none(o.Spec.Pusher) }),
		text("Subject", func(o *Revision) string { return clip(o.Spec.Subject, 50) }),
		ageColumn,
		wide("Signer", func(o *Revision) string { return none(o.Spec.Signer) }),
		wide("Message", func(o *Revision) string { return none(strings.Join(strings.Fields(o.Spec.Message), " ")) }),
	}
)

// ageColumn is how long ago the object was created.
var ageColumn = Column{Name: "Age", Type: "string", Value: func(o Object, now time.Time) any { return age(o.GetCreationTimestamp().Time, now) }}

func text[T Object](name string, value func(T) string) Column {
	return Column{Name: name, Type: "string", Value: func(o Object, _ time.Time) any { return value(o.(T)) }}
}

func wide[T Object](name string, value func(T) string) Column {
	c := text(name, value)
	c.Wide = true
	return c
}

func number[T Object](name string, value func(T) int64) Column {
	return Column{Name: name, Type: "integer", Value: func(o Object, _ time.Time) any { return value(o.(T)) }}
}

func age(t, now time.Time) string {
	if t.IsZero() {
		return "<unknown>"
	}
	return duration.HumanDuration(max(0, now.Sub(t)))
}

func none(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

func known(s string) string {
	if s == "" {
		return "<unknown>"
	}
	return s
}

func short(commit string) string { return commit[:min(7, len(commit))] }

func replicas(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

func containerNames(cs []corev1.Container) string {
	return join(cs, func(c corev1.Container) string { return c.Name })
}

func containerImages(cs []corev1.Container) string {
	return join(cs, func(c corev1.Container) string { return c.Image })
}

func join[T any](xs []T, f func(T) string) string {
	parts := make([]string, len(xs))
	for i, x := range xs {
		parts[i] = f(x)
	}
	return strings.Join(parts, ",")
}

func nodeStatus(o *corev1.Node) string {
	status := "Unknown"
	for _, c := range o.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		switch c.Status {
		case corev1.ConditionTrue:
			status = "Ready"
		default:
			status = "NotReady"
		}
	}
	if o.Spec.Unschedulable {
		status += ",SchedulingDisabled"
	}
	return status
}

func nodeRoles(o *corev1.Node) string {
	const prefix = "node-role.kubernetes.io/"
	var roles []string
	for label := range o.Labels {
		if role, ok := strings.CutPrefix(label, prefix); ok && role != "" {
			roles = append(roles, role)
		}
	}
	slices.Sort(roles)
	return none(strings.Join(roles, ","))
}

func nodeAddress(o *corev1.Node, kind corev1.NodeAddressType) string {
	for _, a := range o.Status.Addresses {
		if a.Type == kind {
			return a.Address
		}
	}
	return "<none>"
}

func serviceExternal(o *corev1.Service) string {
	switch {
	case o.Spec.Type == corev1.ServiceTypeExternalName:
		return o.Spec.ExternalName
	case len(o.Status.LoadBalancer.Ingress) > 0:
		return join(o.Status.LoadBalancer.Ingress, func(i corev1.LoadBalancerIngress) string { return i.IP + i.Hostname })
	case len(o.Spec.ExternalIPs) > 0:
		return strings.Join(o.Spec.ExternalIPs, ",")
	case o.Spec.Type == corev1.ServiceTypeLoadBalancer:
		return "<pending>"
	}
	return "<none>"
}

func servicePorts(o *corev1.Service) string {
	return none(join(o.Spec.Ports, func(p corev1.ServicePort) string {
		if p.NodePort > 0 {
			return fmt.Sprintf("%d:%d/%s", p.Port, p.NodePort, p.Protocol)
		}
		return fmt.Sprintf("%d/%s", p.Port, p.Protocol)
	}))
}

func slicePorts(o *discoveryv1.EndpointSlice) string {
	return fewOf(len(o.Ports), func(i int) string {
		if p := o.Ports[i].Port; p != nil {
			return strconv.Itoa(int(*p))
		}
		return "*"
	})
}

func sliceEndpoints(o *discoveryv1.EndpointSlice) string {
	return fewOf(len(o.Endpoints), func(i int) string { return strings.Join(o.Endpoints[i].Addresses, ",") })
}

// fewOf joins the first three of n parts and counts the rest.
func fewOf(n int, part func(int) string) string {
	if n == 0 {
		return "<unset>"
	}
	var parts []string
	for i := range min(n, 3) {
		parts = append(parts, part(i))
	}
	s := strings.Join(parts, ",")
	if n > 3 {
		s += fmt.Sprintf(" + %d more...", n-3)
	}
	return s
}

func eventLast(o *corev1.Event) time.Time {
	switch {
	case o.Series != nil && !o.Series.LastObservedTime.IsZero():
		return o.Series.LastObservedTime.Time
	case !o.LastTimestamp.IsZero():
		return o.LastTimestamp.Time
	case !o.EventTime.IsZero():
		return o.EventTime.Time
	}
	return o.CreationTimestamp.Time
}

func eventFirst(o *corev1.Event) time.Time {
	if !o.FirstTimestamp.IsZero() {
		return o.FirstTimestamp.Time
	}
	return eventLast(o)
}

func eventCount(o *corev1.Event) int64 {
	if o.Series != nil {
		return int64(o.Series.Count)
	}
	return int64(max(1, o.Count))
}

func eventObject(o *corev1.Event) string {
	return strings.ToLower(o.InvolvedObject.Kind) + "/" + o.InvolvedObject.Name
}

func eventSource(o *corev1.Event) string {
	component, host := o.Source.Component, o.Source.Host
	if component == "" {
		component, host = o.ReportingController, o.ReportingInstance
	}
	if host == "" {
		return component
	}
	return component + ", " + host
}

func readyCondition(o *Source) *metav1.Condition {
	for i := range o.Status.Conditions {
		if o.Status.Conditions[i].Type == "Ready" {
			return &o.Status.Conditions[i]
		}
	}
	return nil
}

// sourceReady: the built-in repository is not followed, so nothing reports on it;
// it is ready unless somebody closed it.
func sourceReady(o *Source) string {
	c := readyCondition(o)
	switch {
	case o.Status.Suspended != nil || o.Spec.Suspend:
		return string(metav1.ConditionFalse)
	case c != nil:
		return string(c.Status)
	case o.Spec.URL == "":
		return string(metav1.ConditionTrue)
	}
	return string(metav1.ConditionUnknown)
}

// revisionAuthor is the author without the mail address.
func revisionAuthor(o *Revision) string {
	name, _, _ := strings.Cut(o.Spec.Author, " <")
	return none(clip(name, 24))
}

// clip cuts a text for a narrow column after n characters.
func clip(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

func sourceState(o *Source) string {
	switch c := readyCondition(o); {
	case o.Status.Suspended != nil:
		return "Suspended by " + o.Status.Suspended.By
	case o.Spec.Suspend:
		return "Suspended in Git"
	case c == nil && o.Spec.URL == "" && o.Status.Applied == "":
		return "Empty"
	case c == nil && o.Spec.URL == "":
		return "Applied"
	case c == nil:
		return "Pending"
	case c.Status == metav1.ConditionTrue:
		return "Following"
	default:
		return c.Reason
	}
}
