package apiserver

import (
	"fmt"
	"net/url"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"

	"decree.dev/decree/schemas/api"
)

// selector picks the objects of a list or watch.
type selector struct {
	t      target
	labels labels.Selector
	fields []requirement
	// exact is a name that the fields ask for: one lookup instead of a scan.
	exact string
}

type requirement struct {
	value func(api.Object) string
	want  string
	equal bool
}

// newSelector reads labelSelector and fieldSelector of a query.
func newSelector(t target, q url.Values) (*selector, error) {
	s := &selector{t: t}
	var err error
	if s.labels, err = labels.Parse(q.Get("labelSelector")); err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("labelSelector: %v", err))
	}
	fs, err := fields.ParseSelector(q.Get("fieldSelector"))
	if err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("fieldSelector: %v", err))
	}
	for _, f := range fs.Requirements() {
		r := requirement{want: f.Value, equal: f.Operator == "=" || f.Operator == "=="}
		switch f.Field {
		case "metadata.name":
			r.value = api.Object.GetName
			if r.equal {
				s.exact = f.Value
			}
		case "metadata.namespace":
			r.value = api.Object.GetNamespace
		default:
			if r.value = t.kind.Fields[f.Field]; r.value == nil {
				return nil, apierrors.NewBadRequest(fmt.Sprintf("fieldSelector: %s has no selectable field %q", t.kind.Resource, f.Field))
			}
		}
		s.fields = append(s.fields, r)
	}
	if t.name != "" { // a watch of one object by its path
		s.exact = t.name
		s.fields = append(s.fields, requirement{value: api.Object.GetName, want: t.name, equal: true})
	}
	return s, nil
}

// matches reports whether o is selected; nil is not.
func (s *selector) matches(o api.Object) bool {
	if o == nil || s.t.namespace != "" && o.GetNamespace() != s.t.namespace {
		return false
	}
	for _, r := range s.fields {
		if (r.value(o) == r.want) != r.equal {
			return false
		}
	}
	return s.labels.Empty() || s.labels.Matches(labels.Set(o.GetLabels()))
}

// each yields the selected objects of view, ordered by namespace and name.
func (s *selector) each(view api.Reader, yield func(api.Object) bool) {
	if s.exact != "" && (s.t.namespace != "" || !s.t.kind.Namespaced) {
		key := s.t.key()
		key.Name = s.exact
		if o, ok := view.Get(key); ok && s.matches(o) {
			yield(o)
		}
		return
	}
	for o := range view.List(s.t.kind.Resource, s.t.namespace) {
		if s.matches(o) && !yield(o) {
			return
		}
	}
}
