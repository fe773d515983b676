package cli

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func (w *sheet) pod(p *corev1.Pod, now time.Time) {
	w.line("Node:", orNone(p.Spec.NodeName))
	status := string(phase(p))
	if p.Status.Reason != "" {
		status += " (" + p.Status.Reason + ")"
	}
	w.line("Status:", status)
	w.optional("Message:", p.Status.Message)
	var ips []string
	for _, ip := range p.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	w.line("IP:", orNone(strings.Join(ips, ", ")))
	w.pairs("Node Selector:", p.Spec.NodeSelector)
	statuses := slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses)
	w.containers(&p.Spec, func(c *corev1.Container) {
		i := slices.IndexFunc(statuses, func(s corev1.ContainerStatus) bool { return s.Name == c.Name })
		if i < 0 {
			w.line("    State:", "not created yet")
			return
		}
		w.containerStatus(&statuses[i], now)
	})
	w.volumes(p.Spec.Volumes)
	w.conditions(conditionsOf(p.Status.Conditions, func(c corev1.PodCondition) metav1.Condition {
		return metav1.Condition{Type: string(c.Type), Status: metav1.ConditionStatus(c.Status), LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message}
	}), now)
}

// template writes what the pods of a workload are made from.
func (w *sheet) template(t *corev1.PodTemplateSpec) {
	w.line("Pod Template:")
	w.pairs("  Labels:", t.Labels)
	w.containers(&t.Spec, func(*corev1.Container) {})
	w.volumes(t.Spec.Volumes)
}

// containers writes all containers of a pod; state adds what is known of each.
func (w *sheet) containers(spec *corev1.PodSpec, state func(*corev1.Container)) {
	for _, part := range []struct {
		title string
		list  []corev1.Container
	}{{"Init Containers:", spec.InitContainers}, {"Containers:", spec.Containers}} {
		if len(part.list) > 0 {
			w.line(part.title)
		}
		for i := range part.list {
			w.container(&part.list[i])
			state(&part.list[i])
		}
	}
}

func (w *sheet) container(c *corev1.Container) {
	w.line("  " + c.Name + ":")
	w.line("    Image:", c.Image)
	if len(c.Command)+len(c.Args) > 0 {
		w.line("    Command:", strings.Join(append(slices.Clone(c.Command), c.Args...), " "))
	}
	for _, p := range c.Ports {
		w.line("    Port:", fmt.Sprintf("%d/%s", p.ContainerPort, p.Protocol))
	}
	w.environment(c)
	w.optional("    Requests:", quantities(c.Resources.Requests))
	w.optional("    Limits:", quantities(c.Resources.Limits))
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
}

// environment writes variables; of secrets only where the value comes from.
func (w *sheet) environment(c *corev1.Container) {
	title := "    Environment:"
	add := func(text string) {
		w.line(title, text)
		title = ""
	}
	for _, f := range c.EnvFrom {
		switch {
		case f.ConfigMapRef != nil:
			add(f.Prefix + "* from config map " + f.ConfigMapRef.Name)
		case f.SecretRef != nil:
			add(f.Prefix + "* from secret " + f.SecretRef.Name)
		}
	}
	for _, v := range c.Env {
		switch from := v.ValueFrom; {
		case from == nil:
			add(v.Name + "=" + v.Value)
		case from.ConfigMapKeyRef != nil:
			add(fmt.Sprintf("%s from config map %s, key %s", v.Name, from.ConfigMapKeyRef.Name, from.ConfigMapKeyRef.Key))
		case from.SecretKeyRef != nil:
			add(fmt.Sprintf("%s from secret %s, key %s", v.Name, from.SecretKeyRef.Name, from.SecretKeyRef.Key))
		case from.FieldRef != nil:
			add(v.Name + " from field " + from.FieldRef.FieldPath)
		case from.ResourceFieldRef != nil:
			add(v.Name + " from " + from.ResourceFieldRef.Resource)
		}
	}
}

func (w *sheet) containerStatus(s *corev1.ContainerStatus, now time.Time) {
	w.state("    State:", s.State, now)
	if s.LastTerminationState != (corev1.ContainerState{}) {
		w.state("    Last State:", s.LastTerminationState, now)
	}
	w.line("    Ready:", fmt.Sprint(s.Ready))
	w.line("    Restart Count:", fmt.Sprint(s.RestartCount))
	w.optional("    Image ID:", s.ImageID)
	w.optional("    Container ID:", s.ContainerID)
}

func (w *sheet) state(title string, s corev1.ContainerState, now time.Time) {
	switch {
	case s.Running != nil:
		w.line(title, sentence("Running", "since "+orUnknown(moment(&s.Running.StartedAt, now))))
	case s.Waiting != nil:
		w.line(title, sentence("Waiting", s.Waiting.Reason, s.Waiting.Message))
	case s.Terminated != nil:
		t := s.Terminated
		code := fmt.Sprintf("exit code %d", t.ExitCode)
		if name := signalName(t.ExitCode - 128); t.ExitCode > 128 && name != "" {
			code += " (" + name + ")"
		}
		w.line(title, sentence("Terminated", t.Reason, code, t.Message, "at "+orUnknown(moment(&t.FinishedAt, now))))
	}
}

// sentence joins the parts that are not empty with commas.
func sentence(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), ", ")
}

func orUnknown(s string) string {
	if s == "" {
		return "an unknown time"
	}
	return s
}

func (w *sheet) volumes(volumes []corev1.Volume) {
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
		default:
			w.line("  "+v.Name+":", "another kind: see -o yaml")
		}
	}
}

// quantities is "cpu=50m memory=64Mi".
func quantities(list corev1.ResourceList) string {
	var parts []string
	for _, name := range sortedKeys(list) {
		q := list[name]
		parts = append(parts, string(name)+"="+q.String())
	}
	return strings.Join(parts, " ")
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

// signalName is the name of a Linux signal by number, "" if it has none.
func signalName(n int32) string { return unix.SignalName(syscall.Signal(n)) }
