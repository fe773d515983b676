package main

import "strings"

// The packages to generate, as Go import path and the path under which users
// import them.
var packages = []struct{ goPath, cuePath string }{
	{"k8s.io/apimachinery/pkg/api/resource", "k8s.io/apimachinery/pkg/api/resource"},
	{"k8s.io/apimachinery/pkg/util/intstr", "k8s.io/apimachinery/pkg/util/intstr"},
	{"k8s.io/apimachinery/pkg/apis/meta/v1", "k8s.io/apimachinery/pkg/apis/meta/v1"},
	{"k8s.io/api/core/v1", "k8s.io/api/core/v1"},
	{"k8s.io/api/apps/v1", "k8s.io/api/apps/v1"},
	{"k8s.io/api/networking/v1", "k8s.io/api/networking/v1"},
	{"decree.dev/decree/schemas/api", "decree.dev/v1"},
}

// The short names of those packages, used in generated files and in the tables.
var shortNames = map[string]string{
	"resource": "k8s.io/apimachinery/pkg/api/resource",
	"intstr":   "k8s.io/apimachinery/pkg/util/intstr",
	"metav1":   "k8s.io/apimachinery/pkg/apis/meta/v1",
	"corev1":   "k8s.io/api/core/v1",
	"appsv1":   "k8s.io/api/apps/v1",
	"netv1":    "k8s.io/api/networking/v1",
	"decreev1": "decree.dev/v1",
}

// roots are the types that a user writes as objects, with their apiVersion. All
// that they use is generated as well.
var roots = []root{
	{"corev1.Namespace", "v1"},
	{"corev1.Pod", "v1"},
	{"corev1.Service", "v1"},
	{"corev1.ConfigMap", "v1"},
	{"corev1.Secret", "v1"},
	{"appsv1.Deployment", "apps/v1"},
	{"appsv1.ReplicaSet", "apps/v1"},
	{"netv1.NetworkPolicy", "networking.k8s.io/v1"},
	{"netv1.Ingress", "networking.k8s.io/v1"},
	{"netv1.IngressClass", "networking.k8s.io/v1"},
	{"decreev1.Source", "decree.dev/v1"},
	{"decreev1.AddressPool", "decree.dev/v1"},
}

type root struct{ name, apiVersion string }

// implemented are the fields that Decree acts on, for types of which it does not
// implement all. A field that is not named here is refused as "not implemented by
// Decree", also when a later API version adds it.
var implemented = fieldTable(`
corev1.Namespace                  metadata
corev1.Pod                        metadata spec
corev1.PodTemplateSpec            metadata spec
corev1.PodSpec                    volumes initContainers containers restartPolicy terminationGracePeriodSeconds dnsPolicy dnsConfig
                                  nodeSelector nodeName hostNetwork securityContext imagePullSecrets hostname subdomain
                                  tolerations enableServiceLinks
corev1.Container                  name image command args workingDir ports envFrom env resources volumeMounts livenessProbe
                                  readinessProbe startupProbe lifecycle imagePullPolicy securityContext stdin tty
corev1.ContainerPort              name containerPort protocol hostPort hostIP
corev1.EnvVarSource               fieldRef resourceFieldRef configMapKeyRef secretKeyRef
corev1.VolumeMount                name readOnly mountPath subPath
corev1.ResourceRequirements       limits requests
corev1.ProbeHandler               exec httpGet tcpSocket
corev1.HTTPGetAction              path port host scheme httpHeaders
corev1.LifecycleHandler           exec httpGet
corev1.Lifecycle                  postStart preStop
corev1.Probe                      initialDelaySeconds timeoutSeconds periodSeconds successThreshold failureThreshold
                                  terminationGracePeriodSeconds
corev1.SecurityContext            capabilities privileged runAsUser runAsGroup runAsNonRoot readOnlyRootFilesystem
                                  allowPrivilegeEscalation seccompProfile
corev1.PodSecurityContext         runAsUser runAsGroup runAsNonRoot supplementalGroups fsGroup seccompProfile
corev1.VolumeSource               emptyDir configMap secret
corev1.EmptyDirVolumeSource       medium sizeLimit
corev1.ConfigMapVolumeSource      name items defaultMode optional
corev1.SecretVolumeSource         secretName items defaultMode optional
corev1.KeyToPath                  key path mode
corev1.SeccompProfile             type
corev1.Toleration                 key operator value effect
corev1.ServiceSpec                ports selector clusterIP clusterIPs type sessionAffinity sessionAffinityConfig publishNotReadyAddresses
                                  externalName externalIPs externalTrafficPolicy internalTrafficPolicy healthCheckNodePort
                                  loadBalancerIP loadBalancerSourceRanges allocateLoadBalancerNodePorts trafficDistribution
                                  ipFamilies ipFamilyPolicy
appsv1.Deployment                 metadata spec
appsv1.ReplicaSet                 metadata spec
netv1.NetworkPolicy               metadata spec
netv1.Ingress                     metadata spec
netv1.IngressBackend              service
netv1.IngressClass                metadata spec
netv1.IngressClassSpec            controller
decreev1.Source                   metadata spec
decreev1.AddressPool              metadata spec
metav1.ObjectMeta                 name namespace labels annotations
`)

// clusterOwned are fields that the cluster sets and a user may not.
var clusterOwned = fieldTable(`
corev1.Pod                        status
corev1.Namespace                  status
corev1.Service                    status
netv1.Ingress                     status
appsv1.Deployment                 status
appsv1.ReplicaSet                 status
decreev1.Source                   status
decreev1.AddressPool              status
metav1.ObjectMeta                 generateName selfLink uid resourceVersion generation creationTimestamp deletionTimestamp
                                  deletionGracePeriodSeconds ownerReferences finalizers managedFields
`)

// implementedEnums are the values that Decree acts on, for enumerations of which
// it does not implement all.
var implementedEnums = fieldTable(`
corev1.Protocol                   TCP UDP SCTP
corev1.DNSPolicy                  ClusterFirst Default None
corev1.SeccompProfileType         RuntimeDefault Unconfined
corev1.StorageMedium              Memory
corev1.TolerationOperator         Exists Equal
`)

// byHand are types whose generated form says nothing (_); *_decree.cue defines them.
var byHand = fieldTable(`
resource.Quantity
intstr.IntOrString
metav1.Time
metav1.Duration
corev1.Signal
corev1.SecretType
`)

// mapTypes are the definitions in *_decree.cue that take the place of a map, so that its
// keys are checked: a pattern cannot be narrowed by unification.
var mapTypes = map[string]string{
	"metav1.ObjectMeta.labels":             "metav1.#Labels",
	"metav1.ObjectMeta.annotations":        "metav1.#Annotations",
	"metav1.LabelSelector.matchLabels":     "metav1.#Labels",
	"corev1.PodSpec.nodeSelector":          "metav1.#Labels",
	"corev1.ServiceSpec.selector":          "metav1.#Labels",
	"corev1.ConfigMap.data":                "corev1.#TextData",
	"corev1.ConfigMap.binaryData":          "corev1.#BinaryData",
	"corev1.Secret.data":                   "corev1.#BinaryData",
	"corev1.Secret.stringData":             "corev1.#TextData",
	"corev1.ResourceRequirements.limits":   "corev1.#Resources",
	"corev1.ResourceRequirements.requests": "corev1.#Resources",
}

// fieldTable reads lines of a name and words; a line that begins with a space goes
// on with the words of the line before.
func fieldTable(text string) map[string]map[string]bool {
	table := map[string]map[string]bool{}
	var name string
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if line[0] != ' ' {
			name, words = words[0], words[1:]
			table[name] = map[string]bool{}
		}
		for _, w := range words {
			table[name][w] = true
		}
	}
	return table
}
