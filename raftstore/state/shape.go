package state

import (
	"bytes"
	"reflect"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// shape says where the Go type of a kind has its spec and its status.
type shape struct{ spec, status int } // field numbers, -1 for none

var shapes = func() map[api.Resource]shape {
	m := make(map[api.Resource]shape)
	for _, k := range api.Kinds() {
		t := reflect.TypeOf(k.New()).Elem()
		m[k.Resource] = shape{spec: fieldNumber(t, "Spec"), status: fieldNumber(t, "Status")}
	}
	return m
}()

func fieldNumber(t reflect.Type, name string) int {
	f, ok := t.FieldByName(name)
	if !ok || len(f.Index) != 1 {
		return -1
	}
	return f.Index[0]
}

func shapeOf(k *api.Kind) shape { return shapes[k.Resource] }

// copyStatus replaces the status of o by that of from; without one it does nothing.
func (s shape) copyStatus(o, from api.Object) {
	if s.status >= 0 {
		reflect.ValueOf(o).Elem().Field(s.status).Set(reflect.ValueOf(from).Elem().Field(s.status))
	}
}

// sameSpec reports whether a and b differ in metadata and status at most.
func (s shape) sameSpec(a, b api.Object) bool {
	c := shallow(b)
	reflect.ValueOf(c).Elem().Field(s.spec).Set(reflect.ValueOf(a).Elem().Field(s.spec))
	return equal(c, b)
}

// shallow returns a copy of the struct that o points to. What the struct points to
// is shared: callers replace top-level fields and change nothing below.
func shallow(o api.Object) api.Object {
	v := reflect.ValueOf(o).Elem()
	c := reflect.New(v.Type())
	c.Elem().Set(v)
	return c.Interface().(api.Object)
}

// keepIdentity gives o what never changes by Update.
func keepIdentity(o, old api.Object) {
	o.SetUID(old.GetUID())
	o.SetCreationTimestamp(old.GetCreationTimestamp())
	o.SetDeletionTimestamp(old.GetDeletionTimestamp())
	o.SetDeletionGracePeriodSeconds(old.GetDeletionGracePeriodSeconds())
	o.SetGeneration(old.GetGeneration())
	o.SetResourceVersion(old.GetResourceVersion())
}

// equal compares what would be stored: nil and empty are one, times have seconds.
func equal(a, b api.Object) bool {
	x, errX := command.AppendObject(nil, a)
	y, errY := command.AppendObject(nil, b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}
