package command

import (
	"errors"
	"fmt"
	"reflect"
	"slices"

	"k8s.io/apimachinery/pkg/runtime/serializer/cbor/direct"

	"decree.dev/decree/schemas/api"
)

// The codecs of an object. Their numbers are part of the format.
const (
	codecProtobuf = 1 // the generated encoding of the Kubernetes types
	codecCBOR     = 2 // everything that has none: Decree's own kinds
)

// MaxObject bounds the encoding of one object in bytes.
const MaxObject = 8 << 20

// protobuf is what the generated code of k8s.io/api offers. Its encoding sorts map
// keys, so equal objects give equal bytes.
type protobuf interface {
	Size() int
	MarshalToSizedBuffer([]byte) (int, error) // writes at the end
	Unmarshal([]byte) error
}

// ErrTooLarge is matched by errors about something that exceeds a bound of the
// format.
var ErrTooLarge = errors.New("too large")

// ErrMalformed is matched by errors about bytes that no encoder produced.
var ErrMalformed = errors.New("malformed")

// AppendObject appends the encoding of o to b: equal objects give equal bytes.
// Times keep whole seconds only, as in JSON, and empty maps and lists become nil.
// It panics if the Go type of o is not registered.
func AppendObject(b []byte, o api.Object) ([]byte, error) {
	kind, err := kindOf(o)
	if err != nil {
		return nil, err
	}
	if p, ok := o.(protobuf); ok {
		return appendProtobuf(b, kind, o, p, p.Size())
	}
	b = append(appendString(b, string(kind.Resource)), codecCBOR)
	data, err := direct.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", api.KeyOf(o), err)
	}
	if len(data) > MaxObject {
		return nil, tooLarge(o, len(data))
	}
	return append(b, data...), nil
}

func kindOf(o api.Object) (*api.Kind, error) {
	kind := api.KindOf(o)
	if isNil(o) {
		return nil, fmt.Errorf("encode an object of %s: it is nil", kind.Resource)
	}
	return kind, nil
}

func isNil(o api.Object) bool { return reflect.ValueOf(o).IsNil() }

// appendProtobuf appends o, whose payload has n bytes.
func appendProtobuf(b []byte, kind *api.Kind, o api.Object, p protobuf, n int) ([]byte, error) {
	if n > MaxObject {
		return nil, tooLarge(o, n)
	}
	b = append(appendString(b, string(kind.Resource)), codecProtobuf)
	start := len(b)
	b = slices.Grow(b, n)[:start+n]
	got, err := p.MarshalToSizedBuffer(b[start:])
	if err == nil && got != n {
		err = fmt.Errorf("%d bytes of %d were written", got, n)
	}
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", api.KeyOf(o), err)
	}
	return b, nil
}

func tooLarge(o api.Object, n int) error {
	return fmt.Errorf("encode %s: %d bytes, at most %d are possible: %w", api.KeyOf(o), n, MaxObject, ErrTooLarge)
}

// DecodeObject decodes what [AppendObject] wrote. The result shares no memory with
// b and has apiVersion and kind set.
func DecodeObject(b []byte) (api.Object, error) {
	if len(b) > MaxObject+maxName+16 {
		return nil, fmt.Errorf("decode object of %d bytes: %w", len(b), ErrTooLarge)
	}
	r := reader{b: b}
	resource := r.resource()
	codec := r.byte()
	if r.err != nil {
		return nil, fmt.Errorf("decode object: %w", r.err)
	}
	kind, ok := api.KindFor(resource)
	if !ok {
		return nil, fmt.Errorf("decode object: unknown resource %q: %w", resource, ErrMalformed)
	}
	o := kind.New()
	if err := decodePayload(o, kind, codec, r.b); err != nil {
		return nil, fmt.Errorf("decode object of %s: %w: %w", resource, err, ErrMalformed)
	}
	return o, nil
}

func decodePayload(o api.Object, kind *api.Kind, codec byte, payload []byte) error {
	p, isProtobuf := o.(protobuf)
	switch {
	case codec == codecProtobuf && isProtobuf:
		return p.Unmarshal(payload) // which does not know apiVersion and kind
	case codec == codecCBOR && !isProtobuf:
		if err := direct.Unmarshal(payload, o); err != nil {
			return err
		}
		o.GetObjectKind().SetGroupVersionKind(kind.GroupVersionKind)
		return nil
	}
	return fmt.Errorf("codec %d does not fit", codec)
}

// SizeOf estimates the encoded size of o in bytes; it is exact for the Kubernetes
// kinds.
func SizeOf(o api.Object) int {
	if p, ok := o.(protobuf); ok {
		return p.Size()
	}
	if r, ok := o.(*api.Revision); ok {
		return 512 + 160*len(r.Spec.Changes)
	}
	return 1024
}
