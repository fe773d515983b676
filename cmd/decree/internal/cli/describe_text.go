package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"sigs.k8s.io/yaml"

	"decree.dev/decree/schemas/api"
)

// describe writes everything a person wants to know about one object: where it
// comes from, what it is, how it does and what happened to it.
func describe(out io.Writer, o api.Object, events []*corev1.Event, now time.Time) error {
	w := &sheet{tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)}
	w.line("Name:", o.GetName())
	if o.GetNamespace() != "" {
		w.line("Namespace:", o.GetNamespace())
	}
	w.line("Kind:", api.KindOf(o).Kind)
	if g, ok := api.OriginOf(o); ok {
		w.line("From:", g.String())
	}
	for _, ref := range o.GetOwnerReferences() {
		if ref.Controller != nil && *ref.Controller {
			w.line("Controlled By:", ref.Kind+"/"+ref.Name)
		}
	}
	if t := o.GetCreationTimestamp(); !t.IsZero() {
		w.line("Created:", fmt.Sprintf("%s (%s ago)", t.Format(time.RFC3339), duration.HumanDuration(now.Sub(t.Time))))
	}
	w.pairs("Labels:", o.GetLabels())
	if t := o.GetDeletionTimestamp(); t != nil {
		w.line("Terminating:", "until "+t.Format(time.RFC3339))
	}
	switch o := o.(type) {
	case *corev1.Pod:
		describePod(w, o, now)
	case *appsv1.Deployment:
		describeDeployment(w, o)
	case *corev1.Secret:
		for _, k := range sortedKeys(o.Data) {
			w.line("  "+k+":", fmt.Sprintf("%d bytes", len(o.Data[k])))
		}
	default:
		if err := w.body(o); err != nil {
			return err
		}
	}
	describeEvents(w, events, now)
	return w.Flush()
}

// sheet is a text of aligned columns.
type sheet struct{ *tabwriter.Writer }

func (w *sheet) line(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }

func (w *sheet) pairs(title string, m map[string]string) {
	for i, k := range sortedKeys(m) {
		if i > 0 {
			title = ""
		}
		w.line(title, k+"="+m[k])
	}
}

// body prints spec, data and status of a kind that has no text of its own.
func (w *sheet) body(o api.Object) error {
	data, err := yaml.Marshal(o)
	if err != nil {
		return err
	}
	var m map[string]any
	if err := yaml.Unmarshal(data, &m); err != nil {
		return err
	}
	for _, part := range []string{"apiVersion", "kind", "metadata"} {
		delete(m, part)
	}
	if data, err = yaml.Marshal(m); err != nil {
		return err
	}
	_, err = w.Write(data)
	return err
}

func describePod(w *sheet, p *corev1.Pod, now time.Time) {
	w.line("Node:", orNone(p.Spec.NodeName))
	status := string(p.Status.Phase)
	if p.Status.Reason != "" {
		status += " (" + p.Status.Reason + ")"
	}
	w.line("Status:", status)
	if p.Status.Message != "" {
		w.line("Message:", p.Status.Message)
	}
	var ips []string
	for _, ip := range p.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	w.line("IP:", orNone(strings.Join(ips, ", ")))
	statuses := slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses)
	for _, part := range []struct {
		title string
		list  []corev1.Container
	}{{"Init Containers:", p.Spec.InitContainers}, {"Containers:", p.Spec.Containers}} {
		if len(part.list) > 0 {
			w.line(part.title)
		}
		for _, c := range part.list {
			i := slices.IndexFunc(statuses, func(s corev1.ContainerStatus) bool { return s.Name == c.Name })
			var s *corev1.ContainerStatus
			if i >= 0 {
				s = &statuses[i]
			}
			describeContainer(w, &c, s, now)
		}
	}
	describeVolumes(w, p.Spec.Volumes)
	w.line("Conditions:")
	for _, c := range p.Status.Conditions {
		w.line("  "+string(c.Type), string(c.Status), c.Reason, c.Message)
	}
	w.pairs("Node-Selectors:", p.Spec.NodeSelector)
}

func describeContainer(w *sheet, c *corev1.Container, s *corev1.ContainerStatus, now time.Time) {
	w.line("  " + c.Name + ":")
	w.line("    Image:", c.Image)
	if len(c.Command)+len(c.Args) > 0 {
		w.line("    Command:", strings.Join(append(slices.Clone(c.Command), c.Args...), " "))
	}
	for _, p := range c.Ports {
		w.line("    Port:", fmt.Sprintf("%d/%s", p.ContainerPort, p.Protocol))
	}
	for _, r := range []struct {
		title string
		list  corev1.ResourceList
	}{{"    Requests:", c.Resources.Requests}, {"    Limits:", c.Resources.Limits}} {
		var parts []string
		for _, name := range sortedKeys(r.list) {
			q := r.list[name]
			parts = append(parts, string(name)+"="+q.String())
		}
		if len(parts) > 0 {
			w.line(r.title, strings.Join(parts, " "))
		}
	}
	for _, p := range []struct {
		title string
		probe *corev1.Probe
	}{{"    Liveness:", c.LivenessProbe}, {"    Readiness:", c.ReadinessProbe}, {"    Startup:", c.StartupProbe}} {
		if p.probe != nil {
			w.line(p.title, probeText(p.probe))
		}
	}
	for _, m := range c.VolumeMounts {
		w.line("    Mount:", m.MountPath+" from "+m.Name)
	}
	if s == nil {
		w.line("    State:", "not created yet")
		return
	}
	describeState(w, "    State:", s.State, now)
	if s.LastTerminationState != (corev1.ContainerState{}) {
		describeState(w, "    Last State:", s.LastTerminationState, now)
	}
	w.line("    Ready:", fmt.Sprint(s.Ready))
	w.line("    Restart Count:", fmt.Sprint(s.RestartCount))
	if s.ImageID != "" {
		w.line("    Image ID:", s.ImageID)
	}
	if s.ContainerID != "" {
		w.line("    Container ID:", s.ContainerID)
	}
}

func describeState(w *sheet, title string, s corev1.ContainerState, now time.Time) {
	switch {
	case s.Running != nil:
		w.line(title, "Running", "since "+since(s.Running.StartedAt, now))
	case s.Waiting != nil:
		w.line(title, "Waiting", s.Waiting.Reason, s.Waiting.Message)
	case s.Terminated != nil:
		t := s.Terminated
		code := fmt.Sprintf("exit code %d", t.ExitCode)
		if t.ExitCode > 128 {
			if name := signalName(t.ExitCode - 128); name != "" {
				code += " (" + name + ")"
			}
		}
		w.line(title, "Terminated", t.Reason, code, t.Message, "at "+since(t.FinishedAt, now))
	}
}

func describeDeployment(w *sheet, d *appsv1.Deployment) {
	s := d.Status
	w.line("Selector:", metav1.FormatLabelSelector(d.Spec.Selector))
	want := int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	w.line("Replicas:", fmt.Sprintf("%d desired, %d updated, %d total, %d available, %d unavailable", want, s.UpdatedReplicas, s.Replicas, s.AvailableReplicas, s.UnavailableReplicas))
	w.line("Strategy:", string(d.Spec.Strategy.Type))
	if r := d.Spec.Strategy.RollingUpdate; r != nil {
		w.line("  Rolling:", fmt.Sprintf("%s max unavailable, %s max surge", r.MaxUnavailable, r.MaxSurge))
	}
	for _, c := range d.Spec.Template.Spec.Containers {
		describeContainer(w, &c, nil, time.Time{})
	}
	w.line("Conditions:")
	for _, c := range s.Conditions {
		w.line("  "+string(c.Type), string(c.Status), c.Reason, c.Message)
	}
}

func describeVolumes(w *sheet, volumes []corev1.Volume) {
	if len(volumes) > 0 {
		w.line("Volumes:")
	}
	for _, v := range volumes {
		switch {
		case v.EmptyDir != nil:
			w.line("  "+v.Name+":", "emptyDir", string(v.EmptyDir.Medium))
		case v.ConfigMap != nil:
			w.line("  "+v.Name+":", "configMap", v.ConfigMap.Name)
		case v.Secret != nil:
			w.line("  "+v.Name+":", "secret", v.Secret.SecretName)
		}
	}
}

// describeEvents lists what happened, oldest first.
func describeEvents(w *sheet, events []*corev1.Event, now time.Time) {
	if len(events) == 0 {
		w.line("Events:", "none in the last hour")
		return
	}
	w.line("Events:")
	w.line("  TYPE", "REASON", "AGE", "FROM", "MESSAGE")
	for _, ev := range events {
		age := duration.HumanDuration(now.Sub(lastSeen(ev)))
		if ev.Count > 1 {
			age += fmt.Sprintf(" (x%d over %s)", ev.Count, duration.HumanDuration(now.Sub(ev.FirstTimestamp.Time)))
		}
		w.line("  "+ev.Type, ev.Reason, age, eventSource(ev), strings.TrimSpace(ev.Message))
	}
}

func lastSeen(ev *corev1.Event) time.Time {
	switch {
	case !ev.LastTimestamp.IsZero():
		return ev.LastTimestamp.Time
	case !ev.EventTime.IsZero():
		return ev.EventTime.Time
	}
	return ev.CreationTimestamp.Time
}

func eventSource(ev *corev1.Event) string {
	if ev.Source.Component != "" {
		return ev.Source.Component
	}
	return ev.ReportingController
}

func probeText(p *corev1.Probe) string {
	var what string
	switch {
	case p.HTTPGet != nil:
		what = fmt.Sprintf("http-get %s:%s%s", strings.ToLower(string(p.HTTPGet.Scheme)), p.HTTPGet.Port.String(), p.HTTPGet.Path)
	case p.TCPSocket != nil:
		what = "tcp " + p.TCPSocket.Port.String()
	case p.Exec != nil:
		what = "exec " + strings.Join(p.Exec.Command, " ")
	}
	return fmt.Sprintf("%s delay=%ds timeout=%ds period=%ds success=%d failure=%d", what,
		p.InitialDelaySeconds, p.TimeoutSeconds, p.PeriodSeconds, p.SuccessThreshold, p.FailureThreshold)
}

func since(t metav1.Time, now time.Time) string {
	if t.IsZero() {
		return "an unknown time"
	}
	return fmt.Sprintf("%s (%s ago)", t.Format(time.RFC3339), duration.HumanDuration(now.Sub(t.Time)))
}

func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

func sortedKeys[K ~string, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// signalName is the name of a Linux signal by number, "" if it has none.
func signalName(n int32) string { return unix.SignalName(syscall.Signal(n)) }
