package rules

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/schemas/api"
)

// maxData is how many bytes a ConfigMap or a Secret may hold.
const maxData = 1 << 20

func (j *judge) deployment(d *appsv1.Deployment) {
	j.template(&d.Spec.Template, d.Spec.Selector)
	s := d.Spec.Strategy
	if s.Type == appsv1.RecreateDeploymentStrategyType && s.RollingUpdate != nil {
		j.add(Problem{Field: "spec.strategy.rollingUpdate", Message: "the strategy Recreate does not roll", Hint: "remove the field"})
	}
	if r := s.RollingUpdate; r != nil && isZero(r.MaxSurge) && isZero(r.MaxUnavailable) {
		j.add(Problem{Field: "spec.strategy.rollingUpdate", Message: "maxSurge and maxUnavailable are both zero: no pod could ever be replaced", Expected: "one of them above zero"})
	}
	if p := d.Spec.ProgressDeadlineSeconds; p != nil && *p <= d.Spec.MinReadySeconds {
		j.add(Problem{
			Field: "spec.progressDeadlineSeconds", Message: "the deadline is not after minReadySeconds",
			Expected: fmt.Sprintf("more than %d", d.Spec.MinReadySeconds), Found: fmt.Sprint(*p),
		})
	}
}

func isZero(v *intstr.IntOrString) bool {
	return v != nil && (v.Type == intstr.Int && v.IntVal == 0 || v.Type == intstr.String && strings.Trim(v.StrVal, "0") == "%")
}

// template judges the pods that a Deployment or ReplicaSet makes, and whether it
// would find them again.
func (j *judge) template(t *corev1.PodTemplateSpec, s *metav1.LabelSelector) {
	const labels = "spec.template.metadata.labels"
	if s == nil || len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
		j.add(Problem{Field: "spec.selector", Message: "the selector selects nothing in particular", Expected: "matchLabels with at least one label of the template"})
	}
	if s != nil {
		for _, k := range slices.Sorted(maps.Keys(s.MatchLabels)) {
			if got, ok := t.Labels[k]; !ok || got != s.MatchLabels[k] {
				found := "no such label"
				if ok {
					found = fmt.Sprintf("%s: %q", k, got)
				}
				j.add(Problem{
					Field: labels, Message: "the selector does not match the labels of the template",
					Expected: fmt.Sprintf("%s: %q", k, s.MatchLabels[k]), Found: found,
				})
			}
		}
		for i, e := range s.MatchExpressions {
			j.expression(item("spec.selector.matchExpressions", i, ""), e, t.Labels)
		}
	}
	if p := t.Spec.RestartPolicy; p != "" && p != corev1.RestartPolicyAlways {
		j.add(Problem{Field: "spec.template.spec.restartPolicy", Message: "the pods of this kind always restart", Expected: `"Always"`, Found: fmt.Sprintf("%q", p)})
	}
	if t.Name != "" || t.Namespace != "" {
		field := "spec.template.metadata.name"
		if t.Name == "" {
			field = "spec.template.metadata.namespace"
		}
		j.add(Problem{Field: field, Message: "pods get their name and namespace from the object that makes them", Hint: "remove the field"})
	}
	j.pod("spec.template.spec", &t.Spec)
	j.bandwidth("spec.template.metadata.annotations", t.Annotations)
}

// expression judges one matchExpression, and whether the labels of the template fit it.
func (j *judge) expression(at string, e metav1.LabelSelectorRequirement, labels map[string]string) {
	value, has := labels[e.Key]
	fits := false
	switch e.Operator {
	case metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn:
		if len(e.Values) == 0 {
			j.add(Problem{Field: at, Message: fmt.Sprintf("the operator %s needs values", e.Operator), Expected: "values with at least one text"})
			return
		}
		in := has && slices.Contains(e.Values, value)
		fits = in == (e.Operator == metav1.LabelSelectorOpIn)
	case metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist:
		if len(e.Values) > 0 {
			j.add(Problem{Field: at + ".values", Message: fmt.Sprintf("the operator %s takes no values", e.Operator), Hint: "remove the field"})
			return
		}
		fits = has == (e.Operator == metav1.LabelSelectorOpExists)
	}
	if !fits {
		j.add(Problem{Field: at, Message: "the selector does not match the labels of the template", Found: fmt.Sprintf("%s: %q", e.Key, value)})
	}
}

func (j *judge) scheduler(annotations map[string]string) {
	if name, ok := annotations[api.AnnotationScheduler]; ok && !slices.Contains(api.Schedulers, name) {
		j.add(Problem{
			Field: "metadata.annotations", Message: "the value of " + api.AnnotationScheduler + " is not allowed",
			Expected: "one of " + strings.Join(api.Schedulers, ", "), Found: fmt.Sprintf("%q", name),
		})
	}
}

func (j *judge) configMap(c *corev1.ConfigMap) {
	size := 0
	for _, k := range slices.Sorted(maps.Keys(c.Data)) {
		size += len(k) + len(c.Data[k])
		if _, ok := c.BinaryData[k]; ok {
			j.add(Problem{Field: "binaryData", Message: "the key is in data and in binaryData", Found: fmt.Sprintf("%q", k)})
		}
	}
	for k, v := range c.BinaryData {
		size += len(k) + len(v)
	}
	j.size("data", size)
}

func (j *judge) size(field string, n int) {
	if n > maxData {
		j.add(Problem{Field: field, Message: "the data is too large", Expected: fmt.Sprintf("at most %d bytes", maxData), Found: fmt.Sprint(n)})
	}
}

// secretKeys are the keys that a secret of a type must have.
var secretKeys = map[corev1.SecretType][]string{
	corev1.SecretTypeTLS:              {corev1.TLSCertKey, corev1.TLSPrivateKeyKey},
	corev1.SecretTypeDockerConfigJson: {corev1.DockerConfigJsonKey},
	corev1.SecretTypeSSHAuth:          {corev1.SSHAuthPrivateKey},
}

// secret judges a Secret. No message quotes a value.
func (j *judge) secret(s *corev1.Secret) {
	size := 0
	for k, v := range s.Data {
		size += len(k) + len(v)
	}
	for k, v := range s.StringData {
		size += len(k) + len(v)
	}
	j.size("data", size)
	for _, k := range secretKeys[s.Type] {
		_, inData := s.Data[k]
		_, inText := s.StringData[k]
		if !inData && !inText {
			j.add(Problem{Field: "data", Message: fmt.Sprintf("a secret of type %s needs the key %s", s.Type, k)})
		}
	}
	if text := s.StringData[corev1.DockerConfigJsonKey]; s.Type == corev1.SecretTypeDockerConfigJson && text != "" && !json.Valid([]byte(text)) {
		j.add(Problem{Field: "stringData", Message: fmt.Sprintf("the key %s is not JSON", corev1.DockerConfigJsonKey)})
	}
}

func (j *judge) source(s *api.SourceSpec) {
	var set []string
	for _, c := range []choice{{"branch", s.Branch != ""}, {"tag", s.Tag != ""}, {"commit", s.Commit != ""}} {
		if c.set {
			set = append(set, c.name)
		}
	}
	if len(set) > 1 {
		j.add(Problem{Field: "spec." + set[1], Message: "a source follows a branch, a tag or a commit", Expected: "at most one of them", Found: strings.Join(set, " and ")})
	}
	if s.Interval.Duration < 0 {
		j.add(Problem{Field: "spec.interval", Message: "the interval is negative", Found: s.Interval.Duration.String()})
	}
}
