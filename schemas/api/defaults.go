package api

import (
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// defaults fills what users left out, with the values that the Kubernetes API
// server would write (k8s.io/kubernetes/pkg/apis/*/v1/defaults.go), so that an
// object reads the same here as there. Every function is idempotent.
//
// Not filled: what the state machine assigns (ClusterIP, IP families, pod CIDR),
// and the fields of a Source, whose zero values mean their documented default
// wherever they are used.
var defaults = map[Resource]func(Object){
	Namespaces:      as(defaultNamespace),
	Pods:            as(func(p *corev1.Pod) { defaultPodSpec(&p.Spec) }),
	Services:        as(defaultService),
	Secrets:         as(defaultSecret),
	Deployments:     as(defaultDeployment),
	ReplicaSets:     as(defaultReplicaSet),
	NetworkPolicies: as(defaultNetworkPolicy),
}

// as makes a function of one kind usable as [Kind.Default].
func as[T Object](f func(T)) func(Object) {
	return func(o Object) { f(o.(T)) }
}

// Default fills what the user left out of o, in place; o must not be shared.
func Default(o Object) {
	if k := KindOf(o); k.Default != nil {
		k.Default(o)
	}
}

// orElse sets *field when it has its zero value.
func orElse[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// orPtr points *field to value when it is nil.
func orPtr[T any](field **T, value T) {
	if *field == nil {
		*field = &value
	}
}

func defaultNamespace(n *corev1.Namespace) {
	if n.Labels == nil {
		n.Labels = make(map[string]string, 1)
	}
	n.Labels[corev1.LabelMetadataName] = n.Name
}

// defaultSecret also moves stringData into data, as the write-only field asks.
func defaultSecret(s *corev1.Secret) {
	orElse(&s.Type, corev1.SecretTypeOpaque)
	for k, v := range s.StringData {
		if s.Data == nil {
			s.Data = make(map[string][]byte, len(s.StringData))
		}
		s.Data[k] = []byte(v)
	}
	s.StringData = nil
}

func defaultDeployment(d *appsv1.Deployment) {
	s := &d.Spec
	orPtr(&s.Replicas, 1)
	orPtr(&s.RevisionHistoryLimit, 10)
	orPtr(&s.ProgressDeadlineSeconds, 600)
	orElse(&s.Strategy.Type, appsv1.RollingUpdateDeploymentStrategyType)
	if s.Strategy.Type == appsv1.RollingUpdateDeploymentStrategyType {
		orPtr(&s.Strategy.RollingUpdate, appsv1.RollingUpdateDeployment{})
		ru := s.Strategy.RollingUpdate
		orPtr(&ru.MaxSurge, intstr.FromString("25%"))
		orPtr(&ru.MaxUnavailable, intstr.FromString("25%"))
	}
	defaultPodSpec(&s.Template.Spec)
}

func defaultReplicaSet(rs *appsv1.ReplicaSet) {
	orPtr(&rs.Spec.Replicas, 1)
	defaultPodSpec(&rs.Spec.Template.Spec)
}

func defaultService(svc *corev1.Service) {
	s := &svc.Spec
	orElse(&s.Type, corev1.ServiceTypeClusterIP)
	orElse(&s.SessionAffinity, corev1.ServiceAffinityNone)
	if s.SessionAffinity == corev1.ServiceAffinityClientIP {
		orPtr(&s.SessionAffinityConfig, corev1.SessionAffinityConfig{})
		orPtr(&s.SessionAffinityConfig.ClientIP, corev1.ClientIPConfig{})
		orPtr(&s.SessionAffinityConfig.ClientIP.TimeoutSeconds, corev1.DefaultClientIPServiceAffinitySeconds)
	}
	for i := range s.Ports {
		p := &s.Ports[i]
		orElse(&p.Protocol, corev1.ProtocolTCP)
		if p.TargetPort == intstr.FromInt32(0) || p.TargetPort == intstr.FromString("") {
			p.TargetPort = intstr.FromInt32(p.Port)
		}
	}
	switch s.Type {
	case corev1.ServiceTypeExternalName:
		return
	case corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer:
		orElse(&s.ExternalTrafficPolicy, corev1.ServiceExternalTrafficPolicyCluster)
	}
	if s.Type == corev1.ServiceTypeLoadBalancer {
		orPtr(&s.AllocateLoadBalancerNodePorts, true)
	}
	orPtr(&s.InternalTrafficPolicy, corev1.ServiceInternalTrafficPolicyCluster)
}

func defaultPodSpec(s *corev1.PodSpec) {
	orElse(&s.RestartPolicy, corev1.RestartPolicyAlways)
	orElse(&s.DNSPolicy, corev1.DNSClusterFirst)
	orElse(&s.SchedulerName, corev1.DefaultSchedulerName)
	orPtr(&s.TerminationGracePeriodSeconds, int64(corev1.DefaultTerminationGracePeriodSeconds))
	orPtr(&s.EnableServiceLinks, corev1.DefaultEnableServiceLinks)
	orPtr(&s.SecurityContext, corev1.PodSecurityContext{})
	for i := range s.InitContainers {
		defaultContainer(&s.InitContainers[i], s.HostNetwork)
	}
	for i := range s.Containers {
		defaultContainer(&s.Containers[i], s.HostNetwork)
	}
	for i := range s.Volumes {
		defaultVolume(&s.Volumes[i].VolumeSource)
	}
}

func defaultContainer(c *corev1.Container, hostNetwork bool) {
	orElse(&c.ImagePullPolicy, pullPolicy(c.Image))
	orElse(&c.TerminationMessagePath, corev1.TerminationMessagePathDefault)
	orElse(&c.TerminationMessagePolicy, corev1.TerminationMessageReadFile)
	for i := range c.Ports {
		orElse(&c.Ports[i].Protocol, corev1.ProtocolTCP)
		if hostNetwork {
			orElse(&c.Ports[i].HostPort, c.Ports[i].ContainerPort)
		}
	}
	for i := range c.Env {
		if from := c.Env[i].ValueFrom; from != nil && from.FieldRef != nil {
			orElse(&from.FieldRef.APIVersion, "v1")
		}
	}
	for name, limit := range c.Resources.Limits {
		if _, set := c.Resources.Requests[name]; set {
			continue
		}
		if c.Resources.Requests == nil {
			c.Resources.Requests = make(corev1.ResourceList, len(c.Resources.Limits))
		}
		c.Resources.Requests[name] = limit.DeepCopy()
	}
	for _, p := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
		defaultProbe(p)
	}
	if c.Lifecycle != nil {
		for _, h := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
			if h != nil {
				defaultHTTPGet(h.HTTPGet)
			}
		}
	}
}

func defaultProbe(p *corev1.Probe) {
	if p == nil {
		return
	}
	orElse(&p.TimeoutSeconds, 1)
	orElse(&p.PeriodSeconds, 10)
	orElse(&p.SuccessThreshold, 1)
	orElse(&p.FailureThreshold, 3)
	defaultHTTPGet(p.HTTPGet)
	if p.GRPC != nil {
		orPtr(&p.GRPC.Service, "")
	}
}

func defaultHTTPGet(h *corev1.HTTPGetAction) {
	if h == nil {
		return
	}
	orElse(&h.Path, "/")
	orElse(&h.Scheme, corev1.URISchemeHTTP)
}

func defaultVolume(v *corev1.VolumeSource) {
	if *v == (corev1.VolumeSource{}) {
		v.EmptyDir = &corev1.EmptyDirVolumeSource{}
	}
	if v.HostPath != nil {
		orPtr(&v.HostPath.Type, corev1.HostPathUnset)
	}
	if v.ConfigMap != nil {
		orPtr(&v.ConfigMap.DefaultMode, corev1.ConfigMapVolumeSourceDefaultMode)
	}
	if v.Secret != nil {
		orPtr(&v.Secret.DefaultMode, corev1.SecretVolumeSourceDefaultMode)
	}
	if v.DownwardAPI != nil {
		orPtr(&v.DownwardAPI.DefaultMode, corev1.DownwardAPIVolumeSourceDefaultMode)
	}
	if v.Projected != nil {
		orPtr(&v.Projected.DefaultMode, corev1.ProjectedVolumeSourceDefaultMode)
		for i := range v.Projected.Sources {
			if t := v.Projected.Sources[i].ServiceAccountToken; t != nil {
				orPtr(&t.ExpirationSeconds, int64(60*60))
			}
		}
	}
}

// pullPolicy is Always for the tag "latest" and for no tag at all, because what
// those mean may change; anything else names one image.
func pullPolicy(image string) corev1.PullPolicy {
	name, digest, _ := strings.Cut(image, "@")
	tag := ""
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		tag = name[i+1:]
	}
	if tag == "latest" || tag == "" && digest == "" {
		return corev1.PullAlways
	}
	return corev1.PullIfNotPresent
}
