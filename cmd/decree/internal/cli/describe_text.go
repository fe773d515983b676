package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// describe writes everything a person wants to know about one object: where it
// comes from, what it is, how it does and what happened to it. Values of secrets
// are not shown.
func describe(out io.Writer, o api.Object, r relations, now time.Time) error {
	w := &sheet{tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)}
	w.line("Name:", o.GetName())
	if o.GetNamespace() != "" {
		w.line("Namespace:", o.GetNamespace())
	}
	w.line("Kind:", api.KindOf(o).Kind)
	if g, ok := api.OriginOf(o); ok {
		w.line("From:", g.String())
	} else if r.origin != "" {
		w.line("From:", r.origin)
	}
	if ref := metav1.GetControllerOf(o); ref != nil {
		w.line("Controlled By:", ref.Kind+"/"+ref.Name)
	}
	w.optional("Created:", moment(ptr(o.GetCreationTimestamp()), now))
	w.pairs("Labels:", o.GetLabels())
	w.pairs("Annotations:", userAnnotations(o))
	if t := o.GetDeletionTimestamp(); t != nil {
		w.line("Terminating:", "until "+t.Format(time.RFC3339))
	}
	w.object(o, r, now)
	if _, ok := o.(*corev1.Event); !ok {
		w.events(r.events, now)
	}
	return w.Flush()
}

// object writes what only this kind has.
func (w *sheet) object(o api.Object, r relations, now time.Time) {
	switch o := o.(type) {
	case *corev1.Pod:
		w.pod(o, now)
	case *appsv1.Deployment:
		w.deployment(o, r.sets, now)
	case *appsv1.ReplicaSet:
		w.replicaSet(o)
	case *corev1.Service:
		w.service(o, r.slices, now)
	case *discoveryv1.EndpointSlice:
		w.endpointSlice(o)
	case *networkingv1.NetworkPolicy:
		w.networkPolicy(o)
	case *networkingv1.Ingress:
		w.ingress(o, r.routes)
	case *networkingv1.IngressClass:
		w.line("Controller:", o.Spec.Controller)
	case *corev1.Node:
		w.node(o, r.pods, now)
	case *corev1.Namespace:
		w.line("Status:", string(orActive(o.Status.Phase)))
	case *corev1.ConfigMap:
		w.configMap(o)
	case *corev1.Secret:
		w.secret(o)
	case *corev1.Event:
		w.event(o, now)
	case *api.Source:
		w.source(o, r.revisions, now)
	case *api.Revision:
		w.revision(o, now)
	case *api.AddressPool:
		w.pool(o)
	case *api.Server:
		w.server(o, now)
	}
}

// sheet is a text of aligned columns.
type sheet struct{ *tabwriter.Writer }

// line writes cells; empty ones at the end are left out.
func (w *sheet) line(cells ...string) {
	for len(cells) > 1 && cells[len(cells)-1] == "" {
		cells = cells[:len(cells)-1]
	}
	for i := range cells {
		cells[i] = printable(cells[i])
	}
	fmt.Fprintln(w, strings.Join(cells, "\t"))
}

// optional writes a line unless it has nothing to say.
func (w *sheet) optional(title, value string) {
	if value != "" {
		w.line(title, value)
	}
}

func (w *sheet) pairs(title string, m map[string]string) {
	for i, k := range sortedKeys(m) {
		if i > 0 {
			title = ""
		}
		w.line(title, k+"="+m[k])
	}
}

// conditions writes them with the time of their last change.
func (w *sheet) conditions(list []metav1.Condition, now time.Time) {
	if len(list) == 0 {
		return
	}
	w.line("Conditions:")
	w.line("  TYPE", "STATUS", "SINCE", "REASON", "MESSAGE")
	for _, c := range list {
		since := age(c.LastTransitionTime.Time, now)
		w.line("  "+c.Type, string(c.Status), since, c.Reason, c.Message)
	}
}

// conditionsOf brings the conditions of different kinds into one form.
func conditionsOf[T any](list []T, as func(T) metav1.Condition) []metav1.Condition {
	var out []metav1.Condition
	for _, c := range list {
		out = append(out, as(c))
	}
	return out
}

// events lists what happened, oldest first.
func (w *sheet) events(events []*corev1.Event, now time.Time) {
	if len(events) == 0 {
		w.line("Events:  none in the last hour")
		return
	}
	w.line("Events:")
	w.line("  TYPE", "REASON", "AGE", "FROM", "MESSAGE")
	for _, ev := range events {
		w.line("  "+ev.Type, ev.Reason, eventAge(ev, now), eventSource(ev), strings.TrimSpace(ev.Message))
	}
}

// userAnnotations are the annotations that nobody sees elsewhere.
func userAnnotations(o api.Object) map[string]string {
	m := map[string]string{}
	for k, v := range o.GetAnnotations() {
		if k != api.AnnotationSource && k != api.AnnotationCommit && k != api.AnnotationFile {
			m[k] = v
		}
	}
	return m
}

// moment is a time and how long ago it was; empty if it is not known.
func moment(t *metav1.Time, now time.Time) string {
	if t.IsZero() {
		return ""
	}
	return fmt.Sprintf("%s (%s ago)", t.UTC().Format(time.RFC3339), age(t.Time, now))
}

func ptr[T any](v T) *T { return &v }

func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

func orActive(phase corev1.NamespacePhase) corev1.NamespacePhase {
	if phase == "" {
		return corev1.NamespaceActive
	}
	return phase
}

func sortedKeys[K ~string, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
