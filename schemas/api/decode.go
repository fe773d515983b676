package api

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/yaml"
)

// UnknownKindError is returned for an apiVersion and kind outside the registry.
type UnknownKindError struct{ schema.GroupVersionKind }

// Error implements error.
func (e *UnknownKindError) Error() string {
	return fmt.Sprintf("apiVersion %q, kind %q is not served", e.GroupVersion(), e.Kind)
}

// DecodeJSON reads one object that names its apiVersion and kind. Fields that its
// type does not have are ignored, so that old servers and agents can talk to newer
// ones; what users write is checked by the CUE definitions.
func DecodeJSON(data []byte) (Object, error) {
	var t metav1.TypeMeta
	if err := json.Unmarshal(data, &t); err != nil {
		return nil, fmt.Errorf("decode object: %w", err)
	}
	k, ok := KindForGVK(t.GroupVersionKind())
	if !ok {
		return nil, fmt.Errorf("decode object: %w", &UnknownKindError{t.GroupVersionKind()})
	}
	return k.DecodeJSON(data)
}

// DecodeJSON reads one object of kind k; data may leave out apiVersion and kind.
func (k *Kind) DecodeJSON(data []byte) (Object, error) {
	o := k.New()
	if err := json.Unmarshal(data, o); err != nil {
		return nil, fmt.Errorf("decode %s: %w", k.Kind, err)
	}
	if gvk := o.GetObjectKind().GroupVersionKind(); gvk != k.GroupVersionKind {
		return nil, fmt.Errorf("decode %s: found apiVersion %q, kind %q", k.Kind, gvk.GroupVersion(), gvk.Kind)
	}
	return o, nil
}

// DecodeYAML is DecodeJSON for one YAML document.
func DecodeYAML(data []byte) (Object, error) {
	j, err := yaml.YAMLToJSON(data)
	if err != nil {
		return nil, fmt.Errorf("decode object: %w", err)
	}
	return DecodeJSON(j)
}
