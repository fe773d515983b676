// Package podenv computes the environment, command and arguments of a container as
// Kubernetes does: service variables, envFrom, env with valueFrom, and $(VAR)
// expansion. It is pure; the objects it needs come from an [api.Reader].
package podenv

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// Input is everything a container's environment depends on.
type Input struct {
	Pod       *corev1.Pod
	Container *corev1.Container
	// PodIPs and HostIPs, the primary one first; they replace those of Pod.Status.
	PodIPs, HostIPs []string
	// Allocatable is what resourceFieldRef says for limits that are not set.
	Allocatable corev1.ResourceList
	// Objects has the config maps, secrets and services.
	Objects api.Reader
}

// MissingError says that the environment needs an object or key that is not there.
type MissingError struct{ What string }

// Error implements error.
func (e *MissingError) Error() string { return e.What }

// Env returns the variables as NAME=value, each name once. The order depends on
// the input only: service variables by name, then envFrom, then env as written; a
// later value replaces an earlier one in its place. It returns a *MissingError for
// a config map, secret or key that is not there and not optional.
func Env(in Input) ([]string, error) {
	v := newVars()
	if in.Pod.Spec.EnableServiceLinks == nil || *in.Pod.Spec.EnableServiceLinks {
		serviceVars(v, in.Objects, in.Pod.Namespace)
	} else {
		masterVars(v, in.Objects)
	}
	if err := envFrom(v, in); err != nil {
		return nil, err
	}
	for i := range in.Container.Env {
		e := &in.Container.Env[i]
		value := Expand(e.Value, v.get)
		if e.ValueFrom != nil {
			var ok bool
			var err error
			if value, ok, err = valueFrom(in, e.ValueFrom); err != nil {
				return nil, fmt.Errorf("env %s: %w", e.Name, err)
			} else if !ok {
				continue
			}
		}
		v.set(e.Name, value)
	}
	return v.list(), nil
}

// Args returns command and args after expansion with the variables of env.
func Args(c *corev1.Container, env []string) (command, args []string) {
	vars := newVars()
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		vars.set(name, value)
	}
	for _, s := range c.Command {
		command = append(command, Expand(s, vars.get))
	}
	for _, s := range c.Args {
		args = append(args, Expand(s, vars.get))
	}
	return command, args
}

// Expand replaces $(NAME) by its value where get knows it; $$ is a dollar sign.
// What it does not know stays as written.
func Expand(s string, get func(string) (string, bool)) string {
	if !strings.Contains(s, "$") {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '$' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		switch s[i+1] {
		case '$':
			b.WriteByte('$')
			i++
		case '(':
			end := strings.IndexByte(s[i+2:], ')')
			if end < 0 {
				b.WriteString(s[i : i+2])
				i++
				continue
			}
			name := s[i+2 : i+2+end]
			if value, ok := get(name); ok {
				b.WriteString(value)
			} else {
				b.WriteString(s[i : i+3+end])
			}
			i += 2 + end
		default:
			b.WriteByte('$')
		}
	}
	return b.String()
}

// vars is an ordered set of variables.
type vars struct {
	index map[string]int
	names []string
	vals  []string
}

func newVars() *vars { return &vars{index: map[string]int{}} }

func (v *vars) set(name, value string) {
	if i, ok := v.index[name]; ok {
		v.vals[i] = value
		return
	}
	v.index[name] = len(v.names)
	v.names, v.vals = append(v.names, name), append(v.vals, value)
}

func (v *vars) get(name string) (string, bool) {
	i, ok := v.index[name]
	if !ok {
		return "", false
	}
	return v.vals[i], true
}

func (v *vars) list() []string {
	out := make([]string, len(v.names))
	for i := range v.names {
		out[i] = v.names[i] + "=" + v.vals[i]
	}
	return out
}

func envFrom(v *vars, in Input) error {
	for _, from := range in.Container.EnvFrom {
		data := map[string]string{}
		switch {
		case from.ConfigMapRef != nil:
			ref := from.ConfigMapRef
			cm, ok := api.Get[*corev1.ConfigMap](in.Objects, in.Pod.Namespace, ref.Name)
			if !ok {
				if optional(ref.Optional) {
					continue
				}
				return missing("configmap", in.Pod.Namespace, ref.Name)
			}
			data = cm.Data
		case from.SecretRef != nil:
			ref := from.SecretRef
			s, ok := api.Get[*corev1.Secret](in.Objects, in.Pod.Namespace, ref.Name)
			if !ok {
				if optional(ref.Optional) {
					continue
				}
				return missing("secret", in.Pod.Namespace, ref.Name)
			}
			for k, value := range SecretData(s) {
				data[k] = string(value)
			}
		}
		for _, k := range sortedKeys(data) {
			if k != "" && !strings.ContainsAny(k, "=\x00") {
				v.set(from.Prefix+k, data[k])
			}
		}
	}
	return nil
}

// SecretData is a secret's content; stringData, which only an API server merges,
// wins over data.
func SecretData(s *corev1.Secret) map[string][]byte {
	if len(s.StringData) == 0 {
		return s.Data
	}
	out := make(map[string][]byte, len(s.Data)+len(s.StringData))
	for k, v := range s.Data {
		out[k] = v
	}
	for k, v := range s.StringData {
		out[k] = []byte(v)
	}
	return out
}

// valueFrom resolves one reference; ok is false for an optional one that is not
// there.
func valueFrom(in Input, from *corev1.EnvVarSource) (value string, ok bool, err error) {
	switch {
	case from.FieldRef != nil:
		value, err = Field(in, from.FieldRef.FieldPath)
		return value, err == nil, err
	case from.ResourceFieldRef != nil:
		value, err = Resource(in, from.ResourceFieldRef)
		return value, err == nil, err
	case from.ConfigMapKeyRef != nil:
		ref := from.ConfigMapKeyRef
		cm, found := api.Get[*corev1.ConfigMap](in.Objects, in.Pod.Namespace, ref.Name)
		if !found {
			return "", false, unless(ref.Optional, missing("configmap", in.Pod.Namespace, ref.Name))
		}
		if value, ok = cm.Data[ref.Key]; !ok {
			return "", false, unless(ref.Optional, missingKey("configmap", in.Pod.Namespace, ref.Name, ref.Key))
		}
		return value, true, nil
	case from.SecretKeyRef != nil:
		ref := from.SecretKeyRef
		s, found := api.Get[*corev1.Secret](in.Objects, in.Pod.Namespace, ref.Name)
		if !found {
			return "", false, unless(ref.Optional, missing("secret", in.Pod.Namespace, ref.Name))
		}
		data, found := SecretData(s)[ref.Key]
		if !found {
			return "", false, unless(ref.Optional, missingKey("secret", in.Pod.Namespace, ref.Name, ref.Key))
		}
		return string(data), true, nil
	}
	return "", false, fmt.Errorf("valueFrom has none of fieldRef, resourceFieldRef, configMapKeyRef and secretKeyRef")
}

func missing(kind, namespace, name string) error {
	return &MissingError{fmt.Sprintf("%s %q not found in namespace %q", kind, name, namespace)}
}

func missingKey(kind, namespace, name, key string) error {
	return &MissingError{fmt.Sprintf("%s %q in namespace %q has no key %q", kind, name, namespace, key)}
}

func optional(o *bool) bool { return o != nil && *o }

func unless(o *bool, err error) error {
	if optional(o) {
		return nil
	}
	return err
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
