package rules

import (
	"cmp"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/schemas/api"
)

// pod judges the spec of a pod or of a template, which stands at the field at.
func (j *judge) pod(at string, s *corev1.PodSpec) {
	var names, volumes []string
	where := func(i int) string {
		if i < len(s.InitContainers) {
			return item(at+".initContainers", i, "")
		}
		return item(at+".containers", i-len(s.InitContainers), "")
	}
	containers := make([]*corev1.Container, 0, len(s.InitContainers)+len(s.Containers))
	for i := range s.InitContainers {
		containers = append(containers, &s.InitContainers[i])
	}
	for i := range s.Containers {
		containers = append(containers, &s.Containers[i])
	}
	for _, c := range containers {
		names = append(names, c.Name)
	}
	for i, v := range s.Volumes {
		volumes = append(volumes, v.Name)
		j.exactlyOne(item(at+".volumes", i, ""), "a volume has exactly one source",
			choice{"emptyDir", v.EmptyDir != nil}, choice{"configMap", v.ConfigMap != nil}, choice{"secret", v.Secret != nil})
	}
	j.unique("two containers of the pod have the same name", func(i int) string { return where(i) + ".name" }, names)
	j.unique("two volumes of the pod have the same name", func(i int) string { return item(at+".volumes", i, ".name") }, volumes)
	for i, c := range containers {
		j.container(where(i), c, s, volumes, i < len(s.InitContainers))
	}
	j.hostPorts(where, containers, s.HostNetwork)
	j.podOptions(at, s)
}

// bandwidth judges the annotations of a pod or of a template, which stand at the field at.
func (j *judge) bandwidth(at string, annotations map[string]string) {
	for _, key := range []string{api.IngressBandwidth, api.EgressBandwidth} {
		if text, ok := annotations[key]; ok {
			if _, err := api.ParseBandwidth(text); err != nil {
				j.add(Problem{Field: fmt.Sprintf("%s[%q]", at, key), Message: "the value is not allowed", Expected: "bits per second between 1k and 1P, such as 10M", Found: fmt.Sprintf("%q", text)})
			}
		}
	}
}

// podOptions judges what is about the pod as a whole.
func (j *judge) podOptions(at string, s *corev1.PodSpec) {
	if s.DNSPolicy == corev1.DNSNone && (s.DNSConfig == nil || len(s.DNSConfig.Nameservers) == 0) {
		j.add(Problem{Field: at + ".dnsPolicy", Message: "the policy None needs name servers", Expected: "dnsConfig.nameservers with at least one address"})
	}
	if s.DNSConfig != nil {
		for i, a := range s.DNSConfig.Nameservers {
			if _, err := netip.ParseAddr(a); err != nil {
				j.add(Problem{Field: item(at+".dnsConfig.nameservers", i, ""), Message: "the value is not allowed", Expected: "an IP address", Found: fmt.Sprintf("%q", a)})
			}
		}
	}
	if c := s.SecurityContext; c != nil {
		j.notRoot(at+".securityContext.runAsUser", c.RunAsNonRoot, c.RunAsUser)
	}
	for i, t := range s.Tolerations {
		field := item(at+".tolerations", i, "")
		if t.Operator == corev1.TolerationOpExists && t.Value != "" {
			j.add(Problem{Field: field + ".value", Message: "the operator Exists takes no value", Hint: "remove the field"})
		}
		if t.Key == "" && t.Operator != corev1.TolerationOpExists {
			j.add(Problem{Field: field, Message: "a toleration without key is for every taint", Expected: `operator: "Exists"`})
		}
	}
}

func (j *judge) notRoot(field string, nonRoot *bool, user *int64) {
	if nonRoot != nil && *nonRoot && user != nil && *user == 0 {
		j.add(Problem{Field: field, Message: "runAsNonRoot is true, and the user 0 is root", Expected: "a user id, int >=1", Found: "0"})
	}
}

// container judges one container. first says that it runs before the others.
func (j *judge) container(at string, c *corev1.Container, s *corev1.PodSpec, volumes []string, first bool) {
	j.ports(at, c)
	var paths []string
	for i, m := range c.VolumeMounts {
		j.oneOf(item(at+".volumeMounts", i, ".name"), "the pod has no such volume", m.Name, volumes)
		paths = append(paths, m.MountPath)
	}
	j.unique("two volumes are mounted at the same path", func(i int) string { return item(at+".volumeMounts", i, ".mountPath") }, paths)
	if first {
		for _, f := range []choice{
			{"livenessProbe", c.LivenessProbe != nil}, {"readinessProbe", c.ReadinessProbe != nil},
			{"startupProbe", c.StartupProbe != nil}, {"lifecycle", c.Lifecycle != nil},
		} {
			if f.set {
				j.add(Problem{Field: at + "." + f.name, Message: "a container that runs before the others has no " + f.name, Hint: "remove the field"})
			}
		}
	}
	j.probe(at+".livenessProbe", c, c.LivenessProbe, true)
	j.probe(at+".readinessProbe", c, c.ReadinessProbe, false)
	j.probe(at+".startupProbe", c, c.StartupProbe, true)
	if c.Lifecycle != nil {
		j.hook(at+".lifecycle.postStart", c, c.Lifecycle.PostStart)
		j.hook(at+".lifecycle.preStop", c, c.Lifecycle.PreStop)
	}
	j.env(at, c, s)
	j.resources(at+".resources", &c.Resources)
	if sc := c.SecurityContext; sc != nil {
		j.notRoot(at+".securityContext.runAsUser", sc.RunAsNonRoot, sc.RunAsUser)
		if sc.Privileged != nil && *sc.Privileged && sc.AllowPrivilegeEscalation != nil && !*sc.AllowPrivilegeEscalation {
			j.add(Problem{Field: at + ".securityContext.allowPrivilegeEscalation", Message: "a privileged container cannot be denied more privileges", Expected: "true", Found: "false"})
		}
	}
}

func (j *judge) ports(at string, c *corev1.Container) {
	var names, numbers []string
	for _, p := range c.Ports {
		names = append(names, p.Name)
		numbers = append(numbers, fmt.Sprintf("%d/%s", p.ContainerPort, cmp.Or(p.Protocol, corev1.ProtocolTCP)))
	}
	j.unique("two ports of the container have the same name", func(i int) string { return item(at+".ports", i, ".name") }, names)
	j.unique("the container has this port twice", func(i int) string { return item(at+".ports", i, ".containerPort") }, numbers)
}

// hostPorts judges what the containers of a pod take of the node; where is the field of
// each container.
func (j *judge) hostPorts(where func(int) string, containers []*corev1.Container, hostNetwork bool) {
	var taken, fields []string
	for i, c := range containers {
		for k, p := range c.Ports {
			at := item(where(i)+".ports", k, "")
			if p.HostPort != 0 && hostNetwork && p.HostPort != p.ContainerPort {
				j.add(Problem{Field: at + ".hostPort", Message: "in the node's network the container has the port itself", Expected: fmt.Sprint(p.ContainerPort), Found: fmt.Sprint(p.HostPort)})
			}
			if p.HostIP != "" {
				if a, err := netip.ParseAddr(p.HostIP); err != nil || a.Zone() != "" || a.IsLoopback() || a.IsMulticast() {
					j.add(Problem{Field: at + ".hostIP", Message: "the value is not allowed", Expected: "an address of the node in its network", Found: fmt.Sprintf("%q", p.HostIP)})
				}
			}
			if p.HostPort != 0 {
				taken = append(taken, fmt.Sprintf("%d/%s", p.HostPort, cmp.Or(p.Protocol, corev1.ProtocolTCP)))
				fields = append(fields, at+".hostPort")
			}
		}
	}
	j.unique("the pod takes this port of the node twice", func(i int) string { return fields[i] }, taken)
}

// probe judges a probe; once says that one success must be enough.
func (j *judge) probe(at string, c *corev1.Container, p *corev1.Probe, once bool) {
	if p == nil {
		return
	}
	j.exactlyOne(at, "a probe does exactly one thing",
		choice{"exec", p.Exec != nil}, choice{"httpGet", p.HTTPGet != nil}, choice{"tcpSocket", p.TCPSocket != nil})
	if p.HTTPGet != nil {
		j.portName(at+".httpGet.port", c, p.HTTPGet.Port)
	}
	if p.TCPSocket != nil {
		j.portName(at+".tcpSocket.port", c, p.TCPSocket.Port)
	}
	if once && p.SuccessThreshold > 1 {
		j.add(Problem{Field: at + ".successThreshold", Message: "one success is enough here", Expected: "1", Found: fmt.Sprint(p.SuccessThreshold)})
	}
}

func (j *judge) hook(at string, c *corev1.Container, h *corev1.LifecycleHandler) {
	if h == nil {
		return
	}
	j.exactlyOne(at, "a hook does exactly one thing", choice{"exec", h.Exec != nil}, choice{"httpGet", h.HTTPGet != nil})
	if h.HTTPGet != nil {
		j.portName(at+".httpGet.port", c, h.HTTPGet.Port)
	}
}

// portName judges a port that may be the name of one of the container's.
func (j *judge) portName(at string, c *corev1.Container, port intstr.IntOrString) {
	if port.Type != intstr.String {
		return
	}
	var names []string
	for _, p := range c.Ports {
		if p.Name != "" {
			names = append(names, p.Name)
		}
	}
	j.oneOf(at, "the container has no port with this name", port.StrVal, names)
}

// env judges the variables of a container and where they come from.
func (j *judge) env(at string, c *corev1.Container, s *corev1.PodSpec) {
	for i, e := range c.Env {
		field := item(at+".env", i, "")
		f := e.ValueFrom
		if f == nil {
			continue
		}
		if e.Value != "" {
			j.add(Problem{Field: field, Message: "a variable has value or valueFrom, not both", Hint: "remove one of them"})
		}
		j.exactlyOne(field+".valueFrom", "a variable has exactly one source",
			choice{"fieldRef", f.FieldRef != nil}, choice{"resourceFieldRef", f.ResourceFieldRef != nil},
			choice{"configMapKeyRef", f.ConfigMapKeyRef != nil}, choice{"secretKeyRef", f.SecretKeyRef != nil})
		if r := f.ResourceFieldRef; r != nil && r.ContainerName != "" {
			var names []string
			for _, other := range s.Containers {
				names = append(names, other.Name)
			}
			j.oneOf(field+".valueFrom.resourceFieldRef.containerName", "the pod has no such container", r.ContainerName, names)
		}
	}
	for i, e := range c.EnvFrom {
		j.exactlyOne(item(at+".envFrom", i, ""), "there is exactly one source",
			choice{"configMapRef", e.ConfigMapRef != nil}, choice{"secretRef", e.SecretRef != nil})
	}
}

// resources judges requests against limits.
func (j *judge) resources(at string, r *corev1.ResourceRequirements) {
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		request, ok := r.Requests[name]
		limit, limited := r.Limits[name]
		if ok && limited && request.Cmp(limit) > 0 {
			j.add(Problem{
				Field: fmt.Sprintf("%s.requests.%s", at, name), Message: "the request is over the limit",
				Expected: "at most " + limit.String(), Found: request.String(),
			})
		}
	}
}
