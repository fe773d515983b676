// Package api is the registry of the kinds that Decree serves, and the small
// vocabulary that every other package shares: objects, keys, positions in Git,
// mutations and a read-only view of a set of objects.
//
// It is pure: no clock, no I/O, no goroutines. Its objects are the Go types of
// k8s.io/api and Decree's own group decree.dev/v1. Adding a kind is one entry in
// kinds.go and its CUE definition in the schemas module; nothing else in the tree
// switches on kinds.
package api

import (
	"fmt"
	"iter"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// Object is a pointer to a Kubernetes-shaped struct such as *corev1.Pod.
//
// An Object that was read from a [Reader] is shared and must not be modified:
// call [Clone] first.
type Object interface {
	runtime.Object
	metav1.Object
}

// Resource names a kind the way kubectl prints it: the plural, then the group
// after a dot when there is one ("pods", "deployments.apps").
type Resource string

// Key identifies one object among all objects. Namespace is empty for
// cluster-scoped kinds. Keys are comparable.
type Key struct {
	Resource  Resource `json:"resource"`
	Namespace string   `json:"namespace,omitempty"`
	Name      string   `json:"name"`
}

// String is what people read: `deployments.apps "shop/web"`.
func (k Key) String() string {
	if k.Namespace == "" {
		return fmt.Sprintf("%s %q", k.Resource, k.Name)
	}
	return fmt.Sprintf("%s %q", k.Resource, k.Namespace+"/"+k.Name)
}

// KeyOf returns the key of o. It panics if the Go type of o is not registered,
// which is a programming error: objects from outside are decoded by the registry.
func KeyOf(o Object) Key {
	return Key{Resource: KindOf(o).Resource, Namespace: o.GetNamespace(), Name: o.GetName()}
}

// Clone returns a deep copy of o that the caller may modify.
func Clone[T Object](o T) T { return o.DeepCopyObject().(T) }

// Reader is a consistent, immutable view of objects at one revision. All methods
// are safe for concurrent use.
type Reader interface {
	// Revision is the revision of the newest change the view contains.
	Revision() uint64
	// Get returns the object with this key.
	Get(Key) (Object, bool)
	// List yields the objects of a resource ordered by namespace, then name. An
	// empty namespace means all of them.
	List(r Resource, namespace string) iter.Seq[Object]
	// Owned yields the objects whose controller reference has this UID, in an
	// order that depends on the view's content only.
	Owned(uid types.UID) iter.Seq[Object]
}

// Get returns the object of type T with this namespace and name.
func Get[T Object](r Reader, namespace, name string) (T, bool) {
	var zero T
	o, ok := r.Get(Key{Resource: KindOf(zero).Resource, Namespace: namespace, Name: name})
	if !ok {
		return zero, false
	}
	return o.(T), true
}

// List yields the objects of type T in a namespace, or in all with "".
func List[T Object](r Reader, namespace string) iter.Seq[T] {
	var zero T
	return func(yield func(T) bool) {
		for o := range r.List(KindOf(zero).Resource, namespace) {
			if !yield(o.(T)) {
				return
			}
		}
	}
}

// Owned yields the objects of type T whose controller reference has this UID.
func Owned[T Object](r Reader, uid types.UID) iter.Seq[T] {
	return func(yield func(T) bool) {
		for o := range r.Owned(uid) {
			if t, ok := o.(T); ok && !yield(t) {
				return
			}
		}
	}
}
