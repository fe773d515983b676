package state

import (
	"bytes"
	"maps"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// kindInfo is what the state machine knows about a kind.
type kindInfo struct {
	*api.Kind
	index        int  // in State.tables
	spec, status int  // field numbers in the Go type, -1 for none
	placed       bool // the state machine assigns something to it
	controlPlane bool // what the cluster itself is made of
}

var kinds = func() map[api.Resource]*kindInfo {
	m := make(map[api.Resource]*kindInfo)
	for i, k := range api.Kinds() {
		t := reflect.TypeOf(k.New()).Elem()
		m[k.Resource] = &kindInfo{Kind: k, index: i, spec: fieldNumber(t, "Spec"), status: fieldNumber(t, "Status")}
	}
	for _, r := range []api.Resource{api.Services, api.Nodes} {
		m[r].placed = true
	}
	for _, r := range []api.Resource{api.Servers, api.Authorities, api.JoinTokens, api.Machines} {
		m[r].controlPlane = true
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

// copyStatus replaces the status of o by that of from; without one it does nothing.
func (k *kindInfo) copyStatus(o, from api.Object) {
	if k.status >= 0 {
		reflect.ValueOf(o).Elem().Field(k.status).Set(reflect.ValueOf(from).Elem().Field(k.status))
	}
}

// sameSpec reports whether a and b differ in metadata and status at most.
func (d *draft) sameSpec(k *kindInfo, a, b api.Object) bool {
	x, y := reflect.ValueOf(a).Elem().Field(k.spec), reflect.ValueOf(b).Elem().Field(k.spec)
	if x, ok := x.Addr().Interface().(protobuf); ok {
		return d.sameBytes(x, y.Addr().Interface().(protobuf))
	}
	c := shallow(b)
	reflect.ValueOf(c).Elem().Field(k.spec).Set(x)
	return d.equal(c, b)
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

// protobuf is what the generated code of the Kubernetes types offers. Equal values
// give equal bytes.
type protobuf interface {
	Size() int
	MarshalToSizedBuffer([]byte) (int, error)
}

// equal compares what would be stored: nil and empty are one, times have seconds.
func (d *draft) equal(a, b api.Object) bool {
	if x, ok := a.(protobuf); ok {
		return !differs(a, b) && d.sameBytes(x, b.(protobuf))
	}
	x, errX := command.AppendObject(d.scratch[0][:0], a)
	y, errY := command.AppendObject(d.scratch[1][:0], b)
	if errX != nil || errY != nil {
		return false
	}
	d.scratch = [2][]byte{x, y}
	return bytes.Equal(x, y)
}

// differs finds out at once about two objects of one kind what is most likely: that
// the data of a ConfigMap has changed. False says nothing.
func differs(a, b api.Object) bool {
	x, ok := a.(*corev1.ConfigMap)
	return ok && !maps.Equal(x.Data, b.(*corev1.ConfigMap).Data)
}

// sameBytes compares the encodings of a and b.
func (d *draft) sameBytes(a, b protobuf) bool {
	n := a.Size()
	if n != b.Size() {
		return false
	}
	for i := range d.scratch {
		d.scratch[i] = slices.Grow(d.scratch[i][:0], n)[:n]
	}
	_, errA := a.MarshalToSizedBuffer(d.scratch[0])
	_, errB := b.MarshalToSizedBuffer(d.scratch[1])
	return errA == nil && errB == nil && bytes.Equal(d.scratch[0], d.scratch[1])
}
