package compile

import (
	"errors"
	"fmt"

	"cuelang.org/go/cue"
	strict "sigs.k8s.io/json"

	"decree.dev/decree/schemas/api"
)

// defaultNamespace is where objects without a namespace go.
const defaultNamespace = "default"

// maxObject is the most bytes one object may have as JSON; the log and etcd-minded
// clients expect no more.
const maxObject = 1 << 20

// decode makes the Go object of a validated value. A field that the Go type does not
// have is an error: definition and type would disagree.
func decode(kind *api.Kind, v cue.Value) (api.Object, []byte, error) {
	data, err := v.MarshalJSON()
	if err != nil {
		return nil, nil, fmt.Errorf("the object cannot be written as JSON: %w", err)
	}
	o, err := decodeJSON(kind, data)
	return o, data, err
}

func decodeJSON(kind *api.Kind, data []byte) (api.Object, error) {
	if len(data) > maxObject {
		return nil, fmt.Errorf("the object is too large: %d bytes, at most %d", len(data), maxObject)
	}
	o := kind.New()
	problems, err := strict.UnmarshalStrict(data, o)
	if err := errors.Join(append(problems, err)...); err != nil {
		return nil, fmt.Errorf("the object does not fit its Go type: %w", err)
	}
	if kind.Namespaced && o.GetNamespace() == "" {
		o.SetNamespace(defaultNamespace)
	}
	return o, nil
}
