package render

import (
	"cmp"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Changes are the objects that only one of two lists has. It is quick on lists in the same
// order by namespace and name, and right for all.
func Changes[T any, P interface {
	*T
	metav1.Object
}](before, after []P) (gone, come []P) {
	i, j := 0, 0
	for i < len(before) && j < len(after) {
		a, b := before[i], after[j]
		if a == b {
			i, j = i+1, j+1
			continue
		}
		order := cmp.Or(cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
		if order <= 0 {
			gone = append(gone, a)
			i++
		}
		if order >= 0 {
			come = append(come, b)
			j++
		}
	}
	return append(gone, before[i:]...), append(come, after[j:]...)
}
