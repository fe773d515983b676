package apiserver

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"decree.dev/decree/schemas/api"
)

// newTable renders objects of one kind as the rows that kubectl prints.
func newTable(k *api.Kind, f format, revision uint64, objects []api.Object, now time.Time) (*metav1.Table, error) {
	t := &metav1.Table{
		TypeMeta:          metav1.TypeMeta{APIVersion: metav1.GroupName + "/" + f.version, Kind: "Table"},
		ListMeta:          metav1.ListMeta{ResourceVersion: strconv.FormatUint(revision, 10)},
		ColumnDefinitions: columnDefinitions(k),
		Rows:              make([]metav1.TableRow, 0, len(objects)),
	}
	for _, o := range objects {
		row, err := tableRow(k, f, o, now)
		if err != nil {
			return nil, err
		}
		t.Rows = append(t.Rows, row)
	}
	return t, nil
}

// named reports whether the kind places the column Name itself.
func named(k *api.Kind) bool {
	for _, c := range k.Columns {
		if c.Name == "Name" {
			return true
		}
	}
	return false
}

func columnDefinitions(k *api.Kind) []metav1.TableColumnDefinition {
	var defs []metav1.TableColumnDefinition
	if !named(k) {
		defs = append(defs, metav1.TableColumnDefinition{Name: "Name", Type: "string", Format: "name", Description: "Name of the object"})
	}
	for _, c := range k.Columns {
		d := metav1.TableColumnDefinition{Name: c.Name, Type: c.Type}
		if c.Name == "Name" {
			d.Format = "name"
		}
		if c.Wide {
			d.Priority = 1
		}
		defs = append(defs, d)
	}
	return defs
}

func tableRow(k *api.Kind, f format, o api.Object, now time.Time) (metav1.TableRow, error) {
	var row metav1.TableRow
	if !named(k) {
		row.Cells = append(row.Cells, o.GetName())
	}
	for _, c := range k.Columns {
		row.Cells = append(row.Cells, c.Value(o, now))
	}
	if o.GetDeletionTimestamp() == nil && terminal(o) {
		row.Conditions = append(row.Conditions, metav1.TableRowCondition{Type: metav1.RowCompleted, Status: metav1.ConditionTrue})
	}
	var included any
	switch f.include {
	case metav1.IncludeNone:
		return row, nil
	case metav1.IncludeObject:
		included = withType(k, o)
	default:
		included = partial(f.version, o)
	}
	raw, err := json.Marshal(included)
	if err != nil {
		return row, fmt.Errorf("encode %s: %w", api.KeyOf(o), err)
	}
	row.Object = runtime.RawExtension{Raw: raw}
	return row, nil
}

// partial is the part of o that a row carries, so that clients can sort and filter.
func partial(version string, o api.Object) *metav1.PartialObjectMetadata {
	p := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: metav1.GroupName + "/" + version, Kind: "PartialObjectMetadata"}}
	if m, ok := o.(interface{ GetObjectMeta() metav1.Object }); ok {
		if meta, ok := m.GetObjectMeta().(*metav1.ObjectMeta); ok {
			p.ObjectMeta = *meta
		}
	}
	return p
}

// terminal reports whether o has run to its end.
func terminal(o api.Object) bool {
	phase := api.KindOf(o).Fields["status.phase"]
	if phase == nil {
		return false
	}
	p := phase(o)
	return p == "Succeeded" || p == "Failed"
}

// withType returns o with apiVersion and kind, which every stored object should
// have; one that has not is copied.
func withType(k *api.Kind, o api.Object) api.Object {
	if o.GetObjectKind().GroupVersionKind() == k.GroupVersionKind {
		return o
	}
	c := api.Clone(o)
	c.GetObjectKind().SetGroupVersionKind(k.GroupVersionKind)
	return c
}
