package podenv

import (
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

func meta(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "shop", Name: name} }

func field(path string) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
}

func input() Input {
	off := false
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-1", UID: "u1", Labels: map[string]string{"app": "web"}}}
	pod.Spec.NodeName, pod.Spec.ServiceAccountName, pod.Spec.EnableServiceLinks = "n1", "robot", &off
	c := &corev1.Container{Name: "main"}
	c.Resources.Limits = corev1.ResourceList{"memory": resource.MustParse("64Mi"), "cpu": resource.MustParse("1500m")}
	pod.Spec.Containers = []corev1.Container{*c}
	return Input{Pod: pod, Container: c, PodIPs: []string{"10.98.0.5", "fd00::5"}, HostIPs: []string{"192.0.2.1"},
		Allocatable: corev1.ResourceList{"memory": resource.MustParse("8Gi")},
		Objects: api.NewSnapshot(1,
			&corev1.ConfigMap{ObjectMeta: meta("settings"), Data: map[string]string{"b": "2", "a": "1", "bad=key": "x"}},
			&corev1.Secret{ObjectMeta: meta("keys"), Data: map[string][]byte{"token": []byte("t")}},
			&corev1.Service{ObjectMeta: meta("cart-db"), Spec: corev1.ServiceSpec{ClusterIP: "10.97.0.7", Ports: []corev1.ServicePort{{Name: "sql", Port: 5432}}}},
			&corev1.Service{ObjectMeta: meta("headless"), Spec: corev1.ServiceSpec{ClusterIP: "None", Ports: []corev1.ServicePort{{Port: 1}}}},
		)}
}

func TestEnv(t *testing.T) {
	yes := true
	for _, test := range []struct {
		name string
		edit func(*Input)
		want []string
		err  string
	}{
		{"nothing", func(*Input) {}, nil, ""},
		{"values expand from earlier ones", func(in *Input) {
			in.Container.Env = []corev1.EnvVar{{Name: "A", Value: "x"}, {Name: "B", Value: "$(A)-$(C)-$$(A)"}, {Name: "C", Value: "y"}}
		}, []string{"A=x", "B=x-$(C)-$(A)", "C=y"}, ""},
		{"a later value wins in place", func(in *Input) {
			in.Container.Env = []corev1.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "2"}, {Name: "A", Value: "3$(A)"}}
		}, []string{"A=31", "B=2"}, ""},
		{"fields", func(in *Input) {
			for _, p := range []string{"metadata.name", "metadata.namespace", "metadata.uid", "metadata.labels['app']", "spec.nodeName",
				"spec.serviceAccountName", "status.podIP", "status.podIPs", "status.hostIP"} {
				in.Container.Env = append(in.Container.Env, corev1.EnvVar{Name: p, ValueFrom: field(p)})
			}
		}, []string{"metadata.name=web-1", "metadata.namespace=shop", "metadata.uid=u1", "metadata.labels['app']=web", "spec.nodeName=n1",
			"spec.serviceAccountName=robot", "status.podIP=10.98.0.5", "status.podIPs=10.98.0.5,fd00::5", "status.hostIP=192.0.2.1"}, ""},
		{"unknown field", func(in *Input) {
			in.Container.Env = []corev1.EnvVar{{Name: "A", ValueFrom: field("spec.colour")}}
		}, nil, `field "spec.colour"`},
		{"resources", func(in *Input) {
			ref := func(name, div string) *corev1.EnvVarSource {
				return &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: name, Divisor: resource.MustParse(div)}}
			}
			in.Container.Env = []corev1.EnvVar{{Name: "MIB", ValueFrom: ref("limits.memory", "1Mi")}, {Name: "CPUS", ValueFrom: ref("limits.cpu", "1")},
				{Name: "MILLI", ValueFrom: ref("limits.cpu", "1m")}, {Name: "NONE", ValueFrom: ref("requests.cpu", "1")}}
		}, []string{"MIB=64", "CPUS=2", "MILLI=1500", "NONE=0"}, ""},
		{"limit of the node when unset", func(in *Input) {
			in.Container.Resources.Limits = nil
			in.Container.Env = []corev1.EnvVar{{Name: "M", ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.memory", Divisor: resource.MustParse("1Gi")}}}}
		}, []string{"M=8"}, ""},
		{"config map as a whole, sorted, with prefix", func(in *Input) {
			in.Container.EnvFrom = []corev1.EnvFromSource{{Prefix: "P_", ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}
		}, []string{"P_a=1", "P_b=2"}, ""},
		{"keys", func(in *Input) {
			in.Container.Env = []corev1.EnvVar{
				{Name: "A", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}, Key: "a"}}},
				{Name: "T", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "keys"}, Key: "token"}}},
				{Name: "O", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}, Key: "x", Optional: &yes}}},
			}
		}, []string{"A=1", "T=t"}, ""},
		{"missing key", func(in *Input) {
			in.Container.Env = []corev1.EnvVar{{Name: "T", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "keys"}, Key: "nope"}}}}
		}, nil, `env T: secret "keys" in namespace "shop" has no key "nope"`},
		{"missing secret", func(in *Input) {
			in.Container.EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}}}}
		}, nil, `secret "none" not found in namespace "shop"`},
		{"service links", func(in *Input) { in.Pod.Spec.EnableServiceLinks = nil }, []string{"CART_DB_SERVICE_HOST=10.97.0.7", "CART_DB_SERVICE_PORT=5432",
			"CART_DB_SERVICE_PORT_SQL=5432", "CART_DB_PORT=tcp://10.97.0.7:5432", "CART_DB_PORT_5432_TCP=tcp://10.97.0.7:5432",
			"CART_DB_PORT_5432_TCP_PROTO=tcp", "CART_DB_PORT_5432_TCP_PORT=5432", "CART_DB_PORT_5432_TCP_ADDR=10.97.0.7"}, ""},
	} {
		in := input()
		test.edit(&in)
		got, err := Env(in)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: error %v, want %q", test.name, err, test.err)
			}
			continue
		}
		if err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%s:\n got %q\nwant %q (%v)", test.name, got, test.want, err)
		}
	}
}

func TestMissingIsTyped(t *testing.T) {
	in := input()
	in.Container.EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}}}}
	_, err := Env(in)
	if m, ok := errors.AsType[*MissingError](err); !ok || !strings.Contains(m.What, `configmap "none"`) {
		t.Errorf("error %v", err)
	}
}

func TestExpand(t *testing.T) {
	get := func(name string) (string, bool) {
		v, ok := map[string]string{"A": "1", "EMPTY": ""}[name]
		return v, ok
	}
	for in, want := range map[string]string{
		"": "", "plain": "plain", "$(A)": "1", "x$(A)y": "x1y", "$(NO)": "$(NO)", "$$(A)": "$(A)", "$$$(A)": "$1",
		"$A": "$A", "$(A": "$(A", "$": "$", "a$": "a$", "$(EMPTY)": "", "$(A)$(A)": "11", "$()": "$()", "$$": "$",
	} {
		if got := Expand(in, get); got != want {
			t.Errorf("Expand(%q) = %q, want %q", in, got, want)
		}
	}
}
