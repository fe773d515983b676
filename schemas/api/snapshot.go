package api

import (
	"cmp"
	"iter"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Snapshot is the simplest [Reader]: a set of objects in memory. Agents keep their
// local copy in one, and tests of planners feed them with it.
type Snapshot struct {
	revision uint64
	byKey    map[Key]Object
	sorted   map[Resource][]Object
	owned    map[types.UID][]Object
}

// NewSnapshot returns a view of objects at a revision. The objects must not be
// modified afterwards; of two with the same key the later one counts.
func NewSnapshot(revision uint64, objects ...Object) *Snapshot {
	s := &Snapshot{
		revision: revision,
		byKey:    make(map[Key]Object, len(objects)),
		sorted:   make(map[Resource][]Object),
		owned:    make(map[types.UID][]Object),
	}
	for _, o := range objects {
		s.byKey[KeyOf(o)] = o
	}
	for k, o := range s.byKey {
		s.sorted[k.Resource] = append(s.sorted[k.Resource], o)
		if ref := metav1.GetControllerOf(o); ref != nil {
			s.owned[ref.UID] = append(s.owned[ref.UID], o)
		}
	}
	for _, list := range s.sorted {
		slices.SortFunc(list, compareObjects)
	}
	for _, list := range s.owned {
		slices.SortFunc(list, compareObjects)
	}
	return s
}

func compareObjects(a, b Object) int {
	return cmp.Or(cmp.Compare(KindOf(a).Resource, KindOf(b).Resource),
		cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
}

// Revision implements [Reader].
func (s *Snapshot) Revision() uint64 { return s.revision }

// Get implements [Reader].
func (s *Snapshot) Get(k Key) (Object, bool) { o, ok := s.byKey[k]; return o, ok }

// List implements [Reader].
func (s *Snapshot) List(r Resource, namespace string) iter.Seq[Object] {
	return func(yield func(Object) bool) {
		for _, o := range s.sorted[r] {
			if (namespace == "" || o.GetNamespace() == namespace) && !yield(o) {
				return
			}
		}
	}
}

// Owned implements [Reader].
func (s *Snapshot) Owned(uid types.UID) iter.Seq[Object] { return slices.Values(s.owned[uid]) }
