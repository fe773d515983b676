package cli

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/netplane/ingress/route"
	"decree.dev/decree/schemas/api"
)

var update = flag.Bool("update", false, "write the golden files anew")

var (
	clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	begun = metav1.NewTime(clock.Add(-90 * time.Second))
)

func about(namespace, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, CreationTimestamp: begun, Labels: map[string]string{"app": "web"}}
}

// TestDescribe describes one object of every kind there is.
func TestDescribe(t *testing.T) {
	var out bytes.Buffer
	described := map[api.Resource]bool{}
	for _, o := range objects() {
		described[api.KindOf(o).Resource] = true
		var one bytes.Buffer
		if err := describe(&one, o, relationsOf(o), clock); err != nil {
			t.Fatal(err)
		}
		var bare bytes.Buffer
		if err := describe(&bare, api.KindOf(o).New(), relations{}, clock); err != nil {
			t.Fatalf("an empty %s: %v", api.KindOf(o).Kind, err)
		}
		for line := range strings.Lines(one.String()) {
			if strings.TrimRight(line, " \n") != strings.TrimSuffix(line, "\n") {
				t.Errorf("%s: blanks at the end of %q", api.KindOf(o).Kind, line)
			}
		}
		out.WriteString(one.String() + "\n")
	}
	for _, k := range api.Served() {
		if !described[k.Resource] {
			t.Errorf("%s: no text describes it: add one to (*sheet).object, and an object here", k.Kind)
		}
	}
	if strings.Contains(out.String(), "hunter2") {
		t.Error("the value of a secret is shown")
	}
	path := filepath.Join("testdata", "describe.golden")
	if *update {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("descriptions differ from %s (go test -update):\n%s", path, &out)
	}
}

// relationsOf are the objects around o.
func relationsOf(o api.Object) (r relations) {
	switch o.(type) {
	case *corev1.Pod:
		r.events = []*corev1.Event{event()}
	case *corev1.Node:
		r.pods = []*corev1.Pod{pod()}
	case *corev1.Service:
		r.slices = []*discoveryv1.EndpointSlice{slice()}
	case *appsv1.Deployment:
		r.sets = []*appsv1.ReplicaSet{{ObjectMeta: about("shop", "web-1"), Status: appsv1.ReplicaSetStatus{Replicas: 1, ReadyReplicas: 1}}}
	case *networkingv1.Ingress:
		r.routes = route.Build(route.Objects{Ingresses: []*networkingv1.Ingress{ingress()}, Classes: []*networkingv1.IngressClass{{ObjectMeta: about("", "decree"), Spec: networkingv1.IngressClassSpec{Controller: "example.com/other"}}}}, nil)
		r.routes.Warnings = []route.Warning{{Namespace: "shop", Name: "web", Message: "there is no service \"web\""}, {Namespace: "shop", Name: "other", Message: "not of this one"}}
	case *api.Source:
		for range recent + 2 {
			r.revisions = append(r.revisions, revision())
		}
	}
	return r
}

func objects() []api.Object {
	three := int32(3)
	percent := intstr.FromString("25%")
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}}, Spec: pod().Spec}
	selector := &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	deployment := &appsv1.Deployment{ObjectMeta: about("shop", "web"), Spec: appsv1.DeploymentSpec{
		Replicas: &three, Selector: selector, Template: template,
		Strategy: appsv1.DeploymentStrategy{Type: "RollingUpdate", RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: &percent, MaxUnavailable: &percent}},
	}, Status: appsv1.DeploymentStatus{Replicas: 3, AvailableReplicas: 2, UnavailableReplicas: 1, UpdatedReplicas: 3, Conditions: []appsv1.DeploymentCondition{
		{Type: "Available", Status: "True", LastTransitionTime: begun, Reason: "MinimumReplicasAvailable", Message: "enough"},
	}}}
	api.Origin{Source: "shop", Commit: "3f2a1c9000", Pos: api.Position{File: "web.cue", Line: 7}}.Set(deployment)
	return []api.Object{
		pod(), deployment, networkPolicy(), ingress(), &networkingv1.IngressClass{ObjectMeta: about("", "decree"), Spec: networkingv1.IngressClassSpec{Controller: api.IngressController}},
		&appsv1.ReplicaSet{ObjectMeta: about("shop", "web-1"), Spec: appsv1.ReplicaSetSpec{Selector: selector, Template: template}},
		&corev1.Service{ObjectMeta: about("shop", "web"), Spec: corev1.ServiceSpec{
			Type: "NodePort", Selector: selector.MatchLabels, ClusterIPs: []string{"10.97.0.7"}, SessionAffinity: "ClientIP",
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: "TCP", TargetPort: intstr.FromString("http"), NodePort: 30080}},
		}},
		balancer(),
		&api.AddressPool{ObjectMeta: about("", "lan"), Spec: api.AddressPoolSpec{Addresses: []string{"203.0.113.8/29", "2001:db8::1-2001:db8::9"}, ServiceSelector: selector, NamespaceSelector: &metav1.LabelSelector{}}, Status: api.AddressPoolStatus{Assigned: 2}},
		slice(), node(),
		&corev1.Namespace{ObjectMeta: about("", "shop")},
		&corev1.ConfigMap{ObjectMeta: about("shop", "settings"), Data: map[string]string{"colour": "blue", "lines": "one\n\ttwo\n"}, BinaryData: map[string][]byte{"logo": {1}}},
		&corev1.Secret{ObjectMeta: about("shop", "login"), Type: "Opaque", Data: map[string][]byte{"password": []byte("hunter2")}},
		event(), source(), revision(), server(),
	}
}

func balancer() *corev1.Service {
	return &corev1.Service{ObjectMeta: about("shop", "front"), Spec: corev1.ServiceSpec{
		Type: "LoadBalancer", Selector: map[string]string{"app": "web"}, ClusterIPs: []string{"10.97.0.8", "fd97::8"}, SessionAffinity: "None",
		IPFamilies: []corev1.IPFamily{"IPv4", "IPv6"}, IPFamilyPolicy: new(corev1.IPFamilyPolicyPreferDualStack),
		ExternalTrafficPolicy: "Local", InternalTrafficPolicy: new(corev1.ServiceInternalTrafficPolicyLocal), TrafficDistribution: new("PreferSameZone"),
		HealthCheckNodePort: 30999, LoadBalancerSourceRanges: []string{"198.51.100.0/24"},
		Ports: []corev1.ServicePort{{Port: 80, Protocol: "TCP", TargetPort: intstr.FromInt32(8080), NodePort: 30081}},
	}, Status: corev1.ServiceStatus{
		LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.8"}}},
		Conditions:   []metav1.Condition{{Type: "AddressAssigned", Status: "False", LastTransitionTime: begun, Reason: "NoAddressPool", Message: "no AddressPool has IPv6 addresses for this service"}},
	}}
}

func pod() *corev1.Pod {
	yes := true
	p := &corev1.Pod{ObjectMeta: about("shop", "web-1-x"), Spec: corev1.PodSpec{
		NodeName: "n1", NodeSelector: map[string]string{"disk": "ssd"},
		InitContainers: []corev1.Container{{Name: "prepare", Image: "example.com/prepare:v1", Command: []string{"prepare", "--all"}}},
		Containers: []corev1.Container{{
			Name: "web", Image: "example.com/web:v1",
			Ports: []corev1.ContainerPort{{ContainerPort: 8080, Protocol: "TCP"}},
			Env: []corev1.EnvVar{
				{Name: "COLOUR", Value: "blue"},
				{Name: "PASSWORD", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "login"}, Key: "password"}}},
				{Name: "POD", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}},
			},
			EnvFrom:        []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}},
			Resources:      corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("50m"), "memory": resource.MustParse("64Mi")}},
			ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Scheme: "HTTP", Port: intstr.FromInt32(8080), Path: "/"}}, PeriodSeconds: 5},
			VolumeMounts:   []corev1.VolumeMount{{Name: "cache", MountPath: "/cache"}},
		}},
		Volumes: []corev1.Volume{{Name: "cache", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
	}, Status: corev1.PodStatus{
		Phase: "Running", PodIPs: []corev1.PodIP{{IP: "10.98.0.2"}},
		Conditions: []corev1.PodCondition{{Type: "Ready", Status: "False", LastTransitionTime: begun, Reason: "ContainersNotReady", Message: "web is not ready"}},
		ContainerStatuses: []corev1.ContainerStatus{{
			Name: "web", RestartCount: 4, ImageID: "example.com/web@sha256:12", ContainerID: "containerd://web-1",
			State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off 40s"}},
			LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Error", ExitCode: 137, FinishedAt: begun}},
		}},
	}}
	p.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-1", Controller: &yes}}
	return p
}

func node() *corev1.Node {
	return &corev1.Node{ObjectMeta: about("", "n1"), Spec: corev1.NodeSpec{PodCIDRs: []string{"10.98.0.0/24"}, Taints: []corev1.Taint{{Key: "disk", Value: "slow", Effect: "NoSchedule"}}}, Status: corev1.NodeStatus{
		Addresses: []corev1.NodeAddress{{Type: "InternalIP", Address: "192.0.2.1"}}, Capacity: corev1.ResourceList{"cpu": resource.MustParse("2")},
		NodeInfo:   corev1.NodeSystemInfo{OSImage: "Debian", KernelVersion: "6.1", Architecture: "amd64", KubeletVersion: "v1", ContainerRuntimeVersion: "containerd://1.6"},
		Conditions: []corev1.NodeCondition{{Type: "Ready", Status: "True", LastTransitionTime: begun, Reason: "AgentReady", Message: "the agent runs"}},
	}}
}

func networkPolicy() *networkingv1.NetworkPolicy {
	port, end, udp := intstr.FromInt32(8000), int32(8100), corev1.ProtocolUDP
	web := &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	return &networkingv1.NetworkPolicy{ObjectMeta: about("shop", "web"), Spec: networkingv1.NetworkPolicySpec{
		PodSelector: *web, PolicyTypes: []networkingv1.PolicyType{"Ingress", "Egress"},
		Ingress: []networkingv1.NetworkPolicyIngressRule{{
			From:  []networkingv1.NetworkPolicyPeer{{PodSelector: web}, {NamespaceSelector: web}, {IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"10.1.0.0/16"}}}},
			Ports: []networkingv1.NetworkPolicyPort{{Port: &port, EndPort: &end}, {Protocol: &udp}},
		}, {}},
	}}
}

func slice() *discoveryv1.EndpointSlice {
	port, name, tcp, node, no := int32(8080), "http", corev1.ProtocolTCP, "n1", false
	return &discoveryv1.EndpointSlice{ObjectMeta: about("shop", "web-abc"), AddressType: "IPv4", Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}}, Endpoints: []discoveryv1.Endpoint{
		{Addresses: []string{"10.98.0.2"}, NodeName: &node, TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "web-1-x"}},
		{Addresses: []string{"10.98.0.3"}, Conditions: discoveryv1.EndpointConditions{Ready: &no}},
	}}
}

func event() *corev1.Event {
	return &corev1.Event{ObjectMeta: about("shop", "web-1-x.1"), InvolvedObject: corev1.ObjectReference{Kind: "Pod", Name: "web-1-x", FieldPath: "spec.containers{web}"},
		Type: "Warning", Reason: "BackOff", Message: "Back-off restarting \x1b[31mcontainer\n", Source: corev1.EventSource{Component: "decree-agent", Host: "n1"},
		FirstTimestamp: begun, LastTimestamp: metav1.NewTime(clock.Add(-5 * time.Second)), Count: 4}
}

func source() *api.Source {
	budget := intstr.FromInt32(5)
	return &api.Source{ObjectMeta: about("", "shop"), Spec: api.SourceSpec{
		URL: "https://ada:secret@git.example/shop.git", Branch: "live", Interval: metav1.Duration{Duration: time.Minute},
		SecretRef: &corev1.LocalObjectReference{Name: "git"}, DeletionBudget: &budget,
	}, Status: api.SourceStatus{
		Applied: "3f2a1c9000", AppliedAt: &begun, Fetched: "77aa001100", FetchedAt: &begun, Objects: 12,
		Suspended:  &api.Suspension{By: "admin", At: begun, Reason: "until noon"},
		Conditions: []metav1.Condition{{Type: "Ready", Status: "False", LastTransitionTime: begun, Reason: "CompileError", Message: "web.cue:3: wrong"}},
	}}
}

func server() *api.Server {
	return &api.Server{
		ObjectMeta: about("", "s1-4f2a1c"),
		Spec:       api.ServerSpec{Node: "s1", Address: "192.0.2.1:7443", Site: "north"},
		Status:     api.ServerStatus{Version: "1.0", Format: 2, KeyEpoch: 3, Issuer: "4f2a1c", Removed: &begun},
	}
}

func revision() *api.Revision {
	return &api.Revision{ObjectMeta: about("", "shop-000007"), Spec: api.RevisionSpec{
		Source: "shop", Commit: "3f2a1c9000", Parent: "11aa22bb33", Author: "Ada <ada@example.com>", Time: begun, Subject: "More", Pusher: "admin", Signer: "key 12",
		Result: api.RevisionApplied, Message: "first line\nsecond line", Changes: []api.Change{
			{Verb: "update", Key: api.KeyOf(&appsv1.Deployment{ObjectMeta: about("shop", "web")}), File: "web.cue:7", Fields: []string{"spec.replicas"}},
			{Verb: "delete", Key: api.KeyOf(&corev1.ConfigMap{ObjectMeta: about("shop", "old")})},
		},
	}}
}

func ingress() *networkingv1.Ingress {
	prefix, class := networkingv1.PathTypePrefix, "decree"
	backend := func(port networkingv1.ServiceBackendPort) networkingv1.IngressBackend {
		return networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "web", Port: port}}
	}
	byNumber := backend(networkingv1.ServiceBackendPort{Number: 80})
	return &networkingv1.Ingress{ObjectMeta: about("shop", "web"), Spec: networkingv1.IngressSpec{
		IngressClassName: &class, DefaultBackend: &byNumber, TLS: []networkingv1.IngressTLS{{Hosts: []string{"shop.example.com"}, SecretName: "cert"}, {}},
		Rules: []networkingv1.IngressRule{
			{Host: "shop.example.com", IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{
				{Path: "/cart", PathType: &prefix, Backend: backend(networkingv1.ServiceBackendPort{Name: "http"})}, {Backend: networkingv1.IngressBackend{}},
			}}}},
			{},
		},
	}, Status: networkingv1.IngressStatus{LoadBalancer: networkingv1.IngressLoadBalancerStatus{Ingress: []networkingv1.IngressLoadBalancerIngress{{IP: "203.0.113.8"}}}}}
}
