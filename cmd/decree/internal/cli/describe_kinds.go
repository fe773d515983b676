package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

func (w *sheet) deployment(d *appsv1.Deployment, sets []*appsv1.ReplicaSet, now time.Time) {
	s := d.Status
	w.line("Selector:", metav1.FormatLabelSelector(d.Spec.Selector))
	w.line("Replicas:", fmt.Sprintf("%d desired, %d updated, %d total, %d available, %d unavailable",
		wanted(d.Spec.Replicas), s.UpdatedReplicas, s.Replicas, s.AvailableReplicas, s.UnavailableReplicas))
	strategy := string(d.Spec.Strategy.Type)
	if r := d.Spec.Strategy.RollingUpdate; r != nil {
		strategy += fmt.Sprintf(", %s max unavailable, %s max surge", r.MaxUnavailable, r.MaxSurge)
	}
	w.line("Strategy:", strategy)
	w.template(&d.Spec.Template)
	if len(sets) > 0 {
		w.line("Replica Sets:")
	}
	slices.SortFunc(sets, func(a, b *appsv1.ReplicaSet) int { return cmp.Compare(b.Status.Replicas, a.Status.Replicas) })
	for _, rs := range sets {
		w.line("  "+rs.Name, fmt.Sprintf("%d of %d ready", rs.Status.ReadyReplicas, wanted(rs.Spec.Replicas)))
	}
	w.conditions(conditionsOf(s.Conditions, func(c appsv1.DeploymentCondition) metav1.Condition {
		return metav1.Condition{Type: string(c.Type), Status: metav1.ConditionStatus(c.Status), LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message}
	}), now)
}

func (w *sheet) replicaSet(rs *appsv1.ReplicaSet) {
	w.line("Selector:", metav1.FormatLabelSelector(rs.Spec.Selector))
	w.line("Replicas:", fmt.Sprintf("%d desired, %d current, %d ready, %d available",
		wanted(rs.Spec.Replicas), rs.Status.Replicas, rs.Status.ReadyReplicas, rs.Status.AvailableReplicas))
	w.template(&rs.Spec.Template)
}

// wanted is a number of replicas; nil means one.
func wanted(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

// endpointAddresses is "10.98.0.2:8080".
func endpointAddresses(slice *discoveryv1.EndpointSlice, e discoveryv1.Endpoint) string {
	var list []string
	for _, a := range e.Addresses {
		for _, p := range slice.Ports {
			if p.Port != nil {
				list = append(list, fmt.Sprintf("%s:%d", a, *p.Port))
			}
		}
	}
	return strings.Join(list, ", ")
}

func (w *sheet) endpointSlice(s *discoveryv1.EndpointSlice) {
	w.line("Address Type:", string(s.AddressType))
	for _, p := range s.Ports {
		text := "all"
		if p.Port != nil {
			text = strconv.Itoa(int(*p.Port))
		}
		if p.Protocol != nil {
			text += "/" + string(*p.Protocol)
		}
		if p.Name != nil {
			text = strings.TrimSpace(*p.Name + " " + text)
		}
		w.line("Port:", text)
	}
	if len(s.Endpoints) == 0 {
		w.line("Endpoints:", "<none>")
		return
	}
	w.line("Endpoints:")
	w.line("  ADDRESS", "READY", "NODE", "TARGET")
	for _, e := range s.Endpoints {
		var node, to string
		if e.NodeName != nil {
			node = *e.NodeName
		}
		if e.TargetRef != nil {
			to = e.TargetRef.Kind + "/" + e.TargetRef.Name
		}
		w.line("  "+strings.Join(e.Addresses, ","), fmt.Sprint(e.Conditions.Ready == nil || *e.Conditions.Ready), orNone(node), orNone(to))
	}
}

func (w *sheet) node(n *corev1.Node, pods []*corev1.Pod, now time.Time) {
	for _, a := range n.Status.Addresses {
		w.line(string(a.Type)+":", a.Address)
	}
	w.line("Pod Range:", orNone(strings.Join(n.Spec.PodCIDRs, ", ")))
	w.line("Unschedulable:", fmt.Sprint(n.Spec.Unschedulable))
	for _, t := range n.Spec.Taints {
		w.line("Taint:", t.ToString())
	}
	i := n.Status.NodeInfo
	w.line("System:", sentence(i.OSImage, "Linux "+i.KernelVersion, i.Architecture))
	w.line("Version:", sentence("decree "+i.KubeletVersion, i.ContainerRuntimeVersion))
	w.line("Capacity:", orNone(quantities(n.Status.Capacity)))
	w.line("Allocatable:", orNone(quantities(n.Status.Allocatable)))
	requested := corev1.ResourceList{}
	for _, p := range pods {
		for _, c := range p.Spec.Containers {
			for name, q := range c.Resources.Requests {
				sum := requested[name]
				sum.Add(q)
				requested[name] = sum
			}
		}
	}
	requested[corev1.ResourcePods] = *resource.NewQuantity(int64(len(pods)), resource.DecimalSI)
	w.line("Requested:", quantities(requested))
	if len(pods) > 0 {
		w.line("Pods:")
		w.line("  NAMESPACE", "NAME", "STATUS")
	}
	for _, p := range pods {
		w.line("  "+p.Namespace, p.Name, api.PodReason(p))
	}
	w.conditions(conditionsOf(n.Status.Conditions, func(c corev1.NodeCondition) metav1.Condition {
		return metav1.Condition{Type: string(c.Type), Status: metav1.ConditionStatus(c.Status), LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message}
	}), now)
}

func (w *sheet) configMap(m *corev1.ConfigMap) {
	if len(m.Data)+len(m.BinaryData) == 0 {
		w.line("Data:", "<none>")
		return
	}
	w.line("Data:")
	for _, k := range sortedKeys(m.Data) {
		v := strings.TrimSuffix(m.Data[k], "\n")
		if !strings.Contains(v, "\n") {
			w.line("  "+k+":", v)
			continue
		}
		w.line("  " + k + ":")
		for line := range strings.Lines(v) {
			w.line("    " + strings.ReplaceAll(strings.TrimSuffix(line, "\n"), "\t", "    "))
		}
	}
	for _, k := range sortedKeys(m.BinaryData) {
		w.line("  "+k+":", count(len(m.BinaryData[k]), "byte"))
	}
}

func (w *sheet) secret(s *corev1.Secret) {
	w.line("Type:", string(s.Type))
	if len(s.Data) > 0 {
		w.line("Data:")
	}
	for _, k := range sortedKeys(s.Data) {
		w.line("  "+k+":", count(len(s.Data[k]), "byte"))
	}
}

func (w *sheet) event(ev *corev1.Event, now time.Time) {
	w.line("Type:", ev.Type)
	w.line("Reason:", ev.Reason)
	w.line("Object:", ev.InvolvedObject.Kind+"/"+ev.InvolvedObject.Name)
	w.optional("Part:", ev.InvolvedObject.FieldPath)
	w.line("Message:", strings.TrimSpace(ev.Message))
	w.line("Source:", sentence(eventSource(ev), ev.Source.Host))
	w.optional("First Seen:", moment(&ev.FirstTimestamp, now))
	w.line("Last Seen:", moment(&metav1.Time{Time: lastSeen(ev)}, now))
	w.line("Count:", fmt.Sprint(max(1, ev.Count)))
}

// recent is how many revisions the description of a source shows.
const recent = 10

func (w *sheet) source(s *api.Source, revisions []*api.Revision, now time.Time) {
	if s.Spec.URL == "" {
		w.line("URL:", "<built-in>")
	} else {
		w.line("URL:", api.RedactURL(s.Spec.URL))
		w.line("Interval:", s.Spec.Interval.Duration.String())
	}
	w.optional("Branch:", s.Spec.Branch)
	w.optional("Tag:", s.Spec.Tag)
	w.optional("Commit:", s.Spec.Commit)
	w.optional("Path:", s.Spec.Path)
	if s.Spec.SecretRef != nil {
		w.line("Credentials:", "secret "+api.SystemNamespace+"/"+s.Spec.SecretRef.Name)
	}
	w.line("Prune:", fmt.Sprint(s.Spec.Prune == nil || *s.Spec.Prune))
	if s.Spec.DeletionBudget != nil {
		w.line("Deletion Budget:", s.Spec.DeletionBudget.String())
	}
	w.line("Applied:", sentence(orNone(s.Status.Applied), moment(s.Status.AppliedAt, now)))
	w.line("Fetched:", sentence(orNone(s.Status.Fetched), moment(s.Status.FetchedAt, now)))
	w.line("Objects:", fmt.Sprint(s.Status.Objects))
	if s.Spec.Suspend {
		w.line("Suspended:", "in Git")
	}
	if p := s.Status.Suspended; p != nil {
		w.line("Suspended:", sentence("by "+p.By, p.Reason, moment(&p.At, now)))
	}
	w.conditions(s.Status.Conditions, now)
	if len(revisions) > 0 {
		w.line("Revisions:")
		w.line("  NAME", "COMMIT", "RESULT", "AGE", "SUBJECT")
	}
	for _, r := range revisions[:min(recent, len(revisions))] {
		w.line("  "+r.Name, fmt.Sprintf("%.7s", r.Spec.Commit), r.Spec.Result, age(r.CreationTimestamp.Time, now), r.Spec.Subject)
	}
	if older := len(revisions) - recent; older > 0 {
		w.line(fmt.Sprintf("  and %d older: decree get revisions --field-selector spec.source=%s", older, s.Name))
	}
}

func (w *sheet) revision(r *api.Revision, now time.Time) {
	s := r.Spec
	w.line("Source:", s.Source)
	w.line("Commit:", s.Commit)
	w.optional("Parent:", s.Parent)
	w.optional("Author:", s.Author)
	w.optional("Committed:", moment(&s.Time, now))
	w.optional("Subject:", s.Subject)
	w.optional("Pusher:", s.Pusher)
	w.optional("Signer:", s.Signer)
	w.line("Result:", s.Result)
	for i, line := range strings.Split(strings.TrimSpace(s.Message), "\n") {
		if i == 0 {
			w.optional("Message:", line)
			continue
		}
		w.line("", line)
	}
	if len(s.Changes) == 0 {
		w.line("Changes:", "none")
		return
	}
	w.line("Changes:")
	w.line("  VERB", "OBJECT", "FILE", "FIELDS")
	for _, c := range s.Changes {
		w.line("  "+c.Verb, c.Key.String(), orNone(c.File), strings.Join(c.Fields, ", "))
	}
}

func (w *sheet) server(s *api.Server, now time.Time) {
	w.line("Node:", s.Spec.Node)
	w.line("Address:", s.Spec.Address)
	w.line("Site:", orNone(s.Spec.Site))
	w.line("Votes:", strconv.FormatBool(!s.Spec.NonVoter))
	w.line("Version:", orNone(s.Status.Version))
	w.line("Log format:", strconv.Itoa(s.Status.Format))
	w.line("Key epoch:", strconv.FormatInt(s.Status.KeyEpoch, 10))
	w.line("Issuer:", orNone(s.Status.Issuer))
	w.optional("Removed:", moment(s.Status.Removed, now))
}
