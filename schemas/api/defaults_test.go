package api_test

import (
	"encoding/json"
	"maps"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"decree.dev/decree/schemas/api"
)

func TestDefaultDeployment(t *testing.T) {
	d := &appsv1.Deployment{}
	d.Spec.Template.Spec.Containers = []corev1.Container{{
		Name: "a", Image: "registry:5000/shop/web", Ports: []corev1.ContainerPort{{ContainerPort: 80}},
		ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{}}},
		Resources: corev1.ResourceRequirements{
			Limits:   corev1.ResourceList{"cpu": resource.MustParse("2"), "memory": resource.MustParse("1Gi")},
			Requests: corev1.ResourceList{"cpu": resource.MustParse("1")},
		},
	}}
	d.Spec.Template.Spec.Volumes = []corev1.Volume{{Name: "tmp"}}
	api.Default(d)
	s, pod := d.Spec, d.Spec.Template.Spec
	c := pod.Containers[0]
	for what, ok := range map[string]bool{
		"replicas":      *s.Replicas == 1,
		"strategy":      s.Strategy.Type == "RollingUpdate" && s.Strategy.RollingUpdate.MaxSurge.String() == "25%" && s.Strategy.RollingUpdate.MaxUnavailable.String() == "25%",
		"history":       *s.RevisionHistoryLimit == 10,
		"deadline":      *s.ProgressDeadlineSeconds == 600,
		"restart":       pod.RestartPolicy == "Always",
		"grace":         *pod.TerminationGracePeriodSeconds == 30,
		"dns":           pod.DNSPolicy == "ClusterFirst",
		"pull policy":   c.ImagePullPolicy == "Always",
		"port protocol": c.Ports[0].Protocol == "TCP",
		"probe":         c.ReadinessProbe.PeriodSeconds == 10 && c.ReadinessProbe.TimeoutSeconds == 1 && c.ReadinessProbe.SuccessThreshold == 1 && c.ReadinessProbe.FailureThreshold == 3,
		"http get":      c.ReadinessProbe.HTTPGet.Path == "/" && c.ReadinessProbe.HTTPGet.Scheme == "HTTP",
		"requests":      c.Resources.Requests.Cpu().String() == "1" && c.Resources.Requests.Memory().String() == "1Gi",
		"volume":        pod.Volumes[0].EmptyDir != nil,
	} {
		if !ok {
			t.Errorf("%s is not as Kubernetes defaults it", what)
		}
	}
}

func TestDefaultPullPolicy(t *testing.T) {
	for image, want := range map[string]corev1.PullPolicy{
		"busybox": corev1.PullAlways, "busybox:latest": corev1.PullAlways, "host:5000/a/b": corev1.PullAlways,
		"busybox:1": corev1.PullIfNotPresent, "host:5000/a/b:v2": corev1.PullIfNotPresent,
		"busybox@sha256:abc": corev1.PullIfNotPresent, "host:5000/b@sha256:abc": corev1.PullIfNotPresent, "b:latest@sha256:abc": corev1.PullAlways,
	} {
		p := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Image: image}}}}
		if api.Default(p); p.Spec.Containers[0].ImagePullPolicy != want {
			t.Errorf("%s: %s, want %s", image, p.Spec.Containers[0].ImagePullPolicy, want)
		}
	}
}

func TestDefaultServiceSecretNamespace(t *testing.T) {
	svc := &corev1.Service{Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}, {Port: 81, TargetPort: intstr.FromString("web")}}}}
	api.Default(svc)
	if p := svc.Spec.Ports; svc.Spec.Type != "ClusterIP" || svc.Spec.SessionAffinity != "None" || *svc.Spec.InternalTrafficPolicy != "Cluster" ||
		p[0].Protocol != "TCP" || p[0].TargetPort.IntVal != 80 || p[1].TargetPort.StrVal != "web" || len(svc.Spec.IPFamilies) != 0 {
		t.Errorf("service %+v", svc.Spec)
	}
	secret := &corev1.Secret{Data: map[string][]byte{"a": []byte("old"), "b": []byte("keep")}, StringData: map[string]string{"a": "new"}}
	api.Default(secret)
	if string(secret.Data["a"]) != "new" || string(secret.Data["b"]) != "keep" || secret.StringData != nil || secret.Type != corev1.SecretTypeOpaque {
		t.Errorf("secret %+v", secret)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}
	api.Default(ns)
	if !maps.Equal(ns.Labels, map[string]string{"kubernetes.io/metadata.name": "shop"}) {
		t.Errorf("namespace labels %v", ns.Labels)
	}
}

// TestDefaultIsIdempotent draws objects of every kind from random JSON-shaped
// choices and checks that a second defaulting changes nothing, nor one after the
// object was stored.
func TestDefaultIsIdempotent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		for _, o := range drawObjects(t) {
			o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
			api.Default(o)
			once, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			api.Default(o)
			twice, _ := json.Marshal(o)
			if d := cmp.Diff(string(once), string(twice)); d != "" {
				t.Fatalf("%T: second defaulting changes it: %s", o, d)
			}
			again := api.KindOf(o).New()
			if err := json.Unmarshal(once, again); err != nil {
				t.Fatal(err)
			}
			if api.Default(again); !jsonEqual(again, once) {
				t.Fatalf("%T: defaulting after storing changes it", o)
			}
		}
	})
}

func jsonEqual(o any, raw []byte) bool {
	out, err := json.Marshal(o)
	return err == nil && string(out) == string(raw)
}

func drawObjects(t *rapid.T) []api.Object {
	maybe := func(name string) bool { return rapid.Bool().Draw(t, name) }
	image := rapid.SampledFrom([]string{"a", "a:1", "r:5000/a", "a@sha256:1", ""}).Draw(t, "image")
	c := corev1.Container{Name: "c", Image: image}
	if maybe("limits") {
		c.Resources.Limits = corev1.ResourceList{"cpu": resource.MustParse("1"), "memory": resource.MustParse("1Gi")}
	}
	if maybe("requests") {
		c.Resources.Requests = corev1.ResourceList{"cpu": resource.MustParse("100m")}
	}
	if maybe("probe") {
		c.LivenessProbe = &corev1.Probe{PeriodSeconds: rapid.Int32Range(0, 5).Draw(t, "period")}
		c.LivenessProbe.GRPC = &corev1.GRPCAction{Port: 1}
	}
	if maybe("port") {
		c.Ports = []corev1.ContainerPort{{ContainerPort: 80, Protocol: rapid.SampledFrom([]corev1.Protocol{"", "UDP"}).Draw(t, "protocol")}}
	}
	spec := corev1.PodSpec{Containers: []corev1.Container{c}, HostNetwork: maybe("host")}
	if maybe("volume") {
		spec.Volumes = []corev1.Volume{{Name: "a"}, {Name: "b", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{}}}}
	}
	d := &appsv1.Deployment{Spec: appsv1.DeploymentSpec{Template: corev1.PodTemplateSpec{Spec: spec}}}
	d.Spec.Strategy.Type = rapid.SampledFrom([]appsv1.DeploymentStrategyType{"", "Recreate", "RollingUpdate"}).Draw(t, "strategy")
	svc := &corev1.Service{Spec: corev1.ServiceSpec{
		Type:            rapid.SampledFrom([]corev1.ServiceType{"", "NodePort", "LoadBalancer", "ExternalName"}).Draw(t, "type"),
		SessionAffinity: rapid.SampledFrom([]corev1.ServiceAffinity{"", "ClientIP"}).Draw(t, "affinity"),
		Ports:           []corev1.ServicePort{{Port: 80}},
	}}
	secret := &corev1.Secret{StringData: map[string]string{"a": "b"}}
	return []api.Object{d, svc, secret, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n"}},
		&corev1.Pod{Spec: *spec.DeepCopy()}, &appsv1.ReplicaSet{Spec: appsv1.ReplicaSetSpec{Template: corev1.PodTemplateSpec{Spec: *spec.DeepCopy()}}}}
}

func TestNoteIsOneEventHoweverOften(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "u1"}}
	n := api.Note{About: pod, Type: corev1.EventTypeWarning, Reason: "FailedScheduling", Message: "no room", Component: "scheduler", Every: time.Minute}
	m, ok := n.Event(now, api.NewSnapshot(1))
	e, _ := m.Object.(*corev1.Event)
	if !ok || m.Verb != api.Create || e.Count != 1 || e.InvolvedObject.Kind != "Pod" || e.InvolvedObject.UID != "u1" || e.Namespace != "default" {
		t.Fatalf("first: %v %+v", ok, m)
	}
	r := api.NewSnapshot(2, e)
	if _, ok := n.Event(now.Add(59*time.Second), r); ok {
		t.Error("written again before Every has passed")
	}
	m, ok = n.Event(now.Add(time.Minute), r)
	if !ok || m.Verb != api.Update || m.Key != api.KeyOf(e) || m.Object.(*corev1.Event).Count != 2 || e.Count != 1 {
		t.Errorf("after Every: %v %+v", ok, m)
	}
	n.Message = "other"
	if m, _ := n.Event(now, r); m.Verb != api.Create || m.Key == api.KeyOf(e) {
		t.Error("another message must be another event")
	}
}

func TestTolerates(t *testing.T) {
	taint := &corev1.Taint{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoSchedule}
	for name, c := range map[string]struct {
		toleration corev1.Toleration
		want       bool
	}{
		"equal":          {corev1.Toleration{Key: "dedicated", Value: "db"}, true},
		"other value":    {corev1.Toleration{Key: "dedicated", Value: "web"}, false},
		"exists":         {corev1.Toleration{Key: "dedicated", Operator: corev1.TolerationOpExists}, true},
		"all":            {corev1.Toleration{Operator: corev1.TolerationOpExists}, true},
		"other effect":   {corev1.Toleration{Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}, false},
		"empty":          {corev1.Toleration{}, false},
		"other key":      {corev1.Toleration{Key: "gpu", Operator: corev1.TolerationOpExists}, false},
		"right effect":   {corev1.Toleration{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoSchedule}, true},
		"wrong operator": {corev1.Toleration{Key: "dedicated", Value: "db", Operator: "Like"}, false},
	} {
		if got := api.Tolerates(&c.toleration, taint); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
