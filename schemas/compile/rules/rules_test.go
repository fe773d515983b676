package rules_test

import (
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile/rules"
)

const (
	podHead        = "spec:\n  containers:\n  - name: a\n    image: x\n    ports: [{name: http, containerPort: 80}]\n"
	deploymentHead = "spec:\n  selector: {matchLabels: {app: a}}\n  template:\n    metadata: {labels: {app: a}}\n    spec: {containers: [{name: a, image: x}]}\n"
	serviceHead    = "spec:\n  selector: {app: a}\n  ports: [{port: 80}]\n"
)

func hostPorts(list string) string {
	return "spec:\n  containers:\n  - name: a\n    image: x\n    ports: [" + list + "]\n"
}

// TestCheck gives each rule one object that breaks it, and each kind one that breaks none.
func TestCheck(t *testing.T) {
	tests := []struct {
		name     string
		resource api.Resource
		yaml     string
		want     string // "field: message" of the only problem, "" for none
	}{
		{"good pod", api.Pods, podHead + "    readinessProbe: {httpGet: {port: http}}\n", ""},
		{"good deployment", api.Deployments, deploymentHead, ""},
		{"good service", api.Services, serviceHead, ""},
		{"good headless", api.Services, "spec: {clusterIP: None, selector: {app: a}}", ""},
		{"good source", api.Sources, "spec: {branch: main}", ""},
		{"good secret", api.Secrets, "type: kubernetes.io/tls\nstringData: {tls.crt: a, tls.key: b}", ""},

		{"probe without action", api.Pods, podHead + "    livenessProbe: {periodSeconds: 5}\n", "spec.containers[0].livenessProbe: a probe does exactly one thing"},
		{"probe success", api.Pods, podHead + "    livenessProbe: {successThreshold: 2, exec: {command: [a]}}\n", "spec.containers[0].livenessProbe.successThreshold: one success"},
		{"readiness may need more", api.Pods, podHead + "    readinessProbe: {successThreshold: 2, exec: {command: [a]}}\n", ""},
		{"hook port", api.Pods, podHead + "    lifecycle: {preStop: {httpGet: {port: nope}}}\n", "spec.containers[0].lifecycle.preStop.httpGet.port: the container has no port"},
		{"resource of another container", api.Pods, podHead + "    env: [{name: A, valueFrom: {resourceFieldRef: {containerName: b, resource: limits.cpu}}}]\n", "spec.containers[0].env[0].valueFrom.resourceFieldRef.containerName: the pod has no such container"},
		{"request over limit", api.Pods, podHead + "    resources: {requests: {cpu: 1500m}, limits: {cpu: 1}}\n", "spec.containers[0].resources.requests.cpu: the request is over the limit"},
		{"request at limit", api.Pods, podHead + "    resources: {requests: {cpu: 1000m}, limits: {cpu: 1}}\n", ""},
		{"privileged", api.Pods, podHead + "    securityContext: {privileged: true, allowPrivilegeEscalation: false}\n", "spec.containers[0].securityContext.allowPrivilegeEscalation: a privileged"},
		{"pod as root", api.Pods, podHead + "  securityContext: {runAsNonRoot: true, runAsUser: 0}\n", "spec.securityContext.runAsUser: runAsNonRoot"},
		{"toleration value", api.Pods, podHead + "  tolerations: [{key: a, operator: Exists, value: b}]\n", "spec.tolerations[0].value: the operator Exists"},
		{"toleration of all", api.Pods, podHead + "  tolerations: [{operator: Exists}]\n", ""},
		{"toleration without key", api.Pods, podHead + "  tolerations: [{value: b}]\n", "spec.tolerations[0]: a toleration without key"},
		{"name server", api.Pods, podHead + "  dnsConfig: {nameservers: [1.2.3.999]}\n", "spec.dnsConfig.nameservers[0]: the value is not allowed"},
		{"host port", api.Pods, hostPorts("{containerPort: 80, hostPort: 8080, hostIP: 10.0.0.1}, {containerPort: 80, hostPort: 8080, protocol: UDP}"), ""},
		{"host port twice", api.Pods, hostPorts("{containerPort: 80, hostPort: 8080}, {containerPort: 81, hostPort: 8080}"), "spec.containers[0].ports[1].hostPort: the pod takes this port of the node twice"},
		{"host port on loopback", api.Pods, hostPorts("{containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1}"), "spec.containers[0].ports[0].hostIP: the value is not allowed"},
		{"other port in the node's network", api.Pods, hostPorts("{containerPort: 80, hostPort: 8080}") + "  hostNetwork: true\n", "spec.containers[0].ports[0].hostPort: in the node's network"},
		{"bandwidth", api.Pods, "metadata: {annotations: {kubernetes.io/ingress-bandwidth: 10M, kubernetes.io/egress-bandwidth: 1G}}\n" + podHead, ""},
		{"no bandwidth", api.Pods, "metadata: {annotations: {kubernetes.io/egress-bandwidth: fast}}\n" + podHead, `metadata.annotations["kubernetes.io/egress-bandwidth"]: the value is not allowed`},

		{"empty selector", api.Deployments, strings.Replace(deploymentHead, "{matchLabels: {app: a}}", "{}", 1), "spec.selector: the selector selects nothing"},
		{"expression in", api.Deployments, strings.Replace(deploymentHead, "{matchLabels: {app: a}}", "{matchExpressions: [{key: app, operator: In, values: [b]}]}", 1), "spec.selector.matchExpressions[0]: the selector does not match"},
		{"expression fits", api.Deployments, strings.Replace(deploymentHead, "{matchLabels: {app: a}}", "{matchExpressions: [{key: app, operator: In, values: [a, b]}, {key: b, operator: DoesNotExist}, {key: b, operator: NotIn, values: [c]}]}", 1), ""},
		{"expression without values", api.Deployments, strings.Replace(deploymentHead, "{matchLabels: {app: a}}", "{matchExpressions: [{key: app, operator: In}]}", 1), "spec.selector.matchExpressions[0]: the operator In needs values"},
		{"expression with values", api.Deployments, strings.Replace(deploymentHead, "{matchLabels: {app: a}}", "{matchExpressions: [{key: app, operator: Exists, values: [a]}]}", 1), "spec.selector.matchExpressions[0].values: the operator Exists"},
		{"recreate", api.Deployments, deploymentHead + "  strategy: {type: Recreate, rollingUpdate: {}}\n", "spec.strategy.rollingUpdate: the strategy Recreate"},
		{"deadline", api.Deployments, deploymentHead + "  minReadySeconds: 10\n  progressDeadlineSeconds: 10\n", "spec.progressDeadlineSeconds: the deadline"},
		{"template name", api.ReplicaSets, strings.Replace(deploymentHead, "metadata: {", "metadata: {name: x, ", 1), "spec.template.metadata.name: pods get their name"},

		{"service address", api.Services, serviceHead + "  clusterIP: 1.2.3.999\n", "spec.clusterIP: the value is not allowed"},
		{"service without port", api.Services, "spec: {selector: {app: a}}", "spec.ports: a service with an address needs a port"},
		{"service scheduler", api.Services, "metadata: {annotations: {net.decree.dev/scheduler: lc}}\n" + serviceHead, ""},
		{"no such scheduler", api.Services, "metadata: {annotations: {net.decree.dev/scheduler: dice}}\n" + serviceHead, "metadata.annotations: the value of net.decree.dev/scheduler is not allowed"},
		{"headless affinity", api.Services, serviceHead + "  clusterIP: None\n  sessionAffinity: ClientIP\n", "spec.sessionAffinity: a headless service"},
		{"same port of two protocols", api.Services, "spec: {selector: {app: a}, ports: [{name: a, port: 53}, {name: b, port: 53, protocol: UDP}]}", ""},
		{"two keys", api.ConfigMaps, "data: {a: b}\nbinaryData: {a: aGk=}", "binaryData: the key is in data"},
		{"large", api.ConfigMaps, "data: {a: " + strings.Repeat("x", 1<<20) + "}", "data: the data is too large"},
		{"registry secret", api.Secrets, "type: kubernetes.io/dockerconfigjson\nstringData: {.dockerconfigjson: hunter2}", "stringData: the key .dockerconfigjson is not JSON"},
		{"source", api.Sources, "spec: {tag: a, commit: b}", "spec.commit: a source follows"},
		{"namespaced namespace", api.Namespaces, "metadata: {name: a, namespace: b}", "metadata.namespace: a Namespace has no namespace"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			kind, _ := api.KindFor(tt.resource)
			o := kind.New()
			if err := yaml.UnmarshalStrict([]byte(tt.yaml), o); err != nil {
				t.Fatal(err)
			}
			problems := rules.Check(o)
			switch {
			case tt.want == "" && len(problems) > 0:
				t.Errorf("problems %+v, want none", problems)
			case tt.want != "" && (len(problems) != 1 || !strings.HasPrefix(problems[0].Field+": "+problems[0].Message, tt.want)):
				t.Errorf("problems %+v, want one: %s", problems, tt.want)
			}
			for _, p := range problems {
				if strings.Contains(p.Found, "hunter2") {
					t.Errorf("%+v quotes a secret", p)
				}
			}
		})
	}
}
