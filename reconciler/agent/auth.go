package agent

import (
	"encoding/base64"
	"encoding/json"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent/podenv"
	"decree.dev/decree/schemas/api"
)

type dockerAuth struct{ Username, Password, Auth string }

// registryAuth collects the credentials of a pod's imagePullSecrets. Secrets that
// are missing or cannot be read give none: the registry's answer will tell.
func registryAuth(pod *corev1.Pod, view api.Reader) (auths []RegistryAuth) {
	for _, ref := range pod.Spec.ImagePullSecrets {
		s, ok := api.Get[*corev1.Secret](view, pod.Namespace, ref.Name)
		if !ok {
			continue
		}
		entries := map[string]dockerAuth{}
		data := podenv.SecretData(s)
		var file struct{ Auths map[string]dockerAuth }
		if err := json.Unmarshal(data[corev1.DockerConfigJsonKey], &file); err == nil {
			entries = file.Auths
		} else if err := json.Unmarshal(data[corev1.DockerConfigKey], &entries); err != nil {
			continue
		}
		for _, host := range slices.Sorted(maps.Keys(entries)) {
			e := entries[host]
			if raw, err := base64.StdEncoding.DecodeString(e.Auth); err == nil && e.Auth != "" {
				e.Username, e.Password, _ = strings.Cut(string(raw), ":")
			}
			auths = append(auths, RegistryAuth{Host: registryHost(host), Username: e.Username, Password: e.Password})
		}
	}
	return auths
}

// registryHost is the host of an entry such as "https://index.docker.io/v1/".
func registryHost(entry string) string {
	_, rest, ok := strings.Cut(entry, "://")
	if !ok {
		rest = entry
	}
	host, _, _ := strings.Cut(rest, "/")
	return host
}
