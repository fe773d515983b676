package apiserver_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

func TestAuthorize(t *testing.T) {
	mine, other := newPod("mine", "n1"), newPod("other", "n2")
	mine.Spec.Volumes = []corev1.Volume{
		{VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "volume"}}}},
		{VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "projected"}}}}}}},
	}
	mine.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "pull"}}
	mine.Spec.InitContainers = []corev1.Container{{EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "from"}}}}}}
	mine.Spec.Containers[0].Env = []corev1.EnvVar{{ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "env"}}}}}
	other.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "theirs"}}
	ing := newIngress("web", "cert", "opaque", "absent")
	view := api.NewSnapshot(1, mine, other, ing, newCertificate("cert"), newCertificate("stray"), newSecret("opaque", "1"))

	admin := apiserver.Identity{Name: "admin", Groups: []string{pki.GroupAdmins}}
	node := apiserver.Identity{Name: "system:node:n1", Groups: []string{pki.GroupNodes}}
	nobody := apiserver.Identity{Name: "ann"}
	impostor := apiserver.Identity{Name: "system:node:n1"} // the name without the group
	nameless := apiserver.Identity{Name: "n1", Groups: []string{pki.GroupNodes}}

	for _, c := range []struct {
		who       apiserver.Identity
		verb      string
		resource  api.Resource
		namespace string
		name      string
		want      bool
	}{
		{admin, "delete", api.Pods, "default", "mine", true},
		{admin, "get", api.Secrets, "default", "theirs", true},
		{admin, "create", "pods/exec", "default", "mine", true},
		{node, "get", api.Pods, "default", "mine", true},
		{node, "get", api.Pods, "default", "other", false},
		{node, "get", api.Pods, "default", "absent", false},
		{node, "watch", api.Pods, "", "", true},
		{node, "delete", api.Pods, "default", "mine", false},
		{node, "create", "pods/exec", "default", "mine", false},
		{node, "get", "pods/log", "default", "mine", false},
		{node, "get", api.ConfigMaps, "default", "volume", true},
		{node, "get", api.ConfigMaps, "default", "env", true},
		{node, "get", api.ConfigMaps, "other", "env", false},
		{node, "get", api.Secrets, "default", "projected", true},
		{node, "get", api.Secrets, "default", "pull", true},
		{node, "get", api.Secrets, "default", "from", true},
		{node, "get", api.Secrets, "default", "theirs", false},
		{node, "get", api.Secrets, "default", "env", false},
		{node, "list", api.Secrets, "", "", true},
		{node, "get", api.Secrets, "default", "cert", true},
		{node, "get", api.Secrets, "default", "stray", false},
		{node, "get", api.Secrets, "default", "opaque", false},
		{node, "get", api.Secrets, "default", "absent", true},
		{node, "get", api.Secrets, "other", "cert", false},
		{node, "list", api.Ingresses, "", "", true},
		{node, "watch", api.IngressClasses, "", "", true},
		{node, "update", api.Ingresses, "default", "web", false},
		{node, "list", api.Services, "", "", true},
		{node, "list", api.EndpointSlices, "", "", true},
		{node, "list", api.Nodes, "", "", true},
		{node, "get", api.Namespaces, "", "default", true},
		{node, "list", api.Deployments, "", "", false},
		{node, "list", api.Sources, "", "", false},
		{node, "list", api.Events, "", "", false},
		{node, "create", api.Sources + "/sync", "", "shop", false},
		{node, "report", api.Nodes, "", "n1", true},
		{node, "report", api.Nodes, "", "n2", false},
		{node, "update", api.Nodes, "", "n1", false},
		{node, "get", api.Nodes + "/proxy", "", "n1", false},
		{admin, "get", api.Nodes + "/proxy", "", "n1", true},
		{nobody, "get", api.Services, "default", "web", false},
		{nobody, "list", api.Pods, "", "", false},
		{impostor, "get", api.Services, "default", "web", false},
		{nameless, "report", api.Nodes, "", "n1", false},
		{apiserver.Identity{}, "get", api.Services, "default", "web", false},
	} {
		if got := apiserver.Authorize(c.who, c.verb, c.resource, c.namespace, c.name, view); got != c.want {
			t.Errorf("%s may %s %s %s/%s: %v, want %v", c.who.Name, c.verb, c.resource, c.namespace, c.name, got, c.want)
		}
	}
}
