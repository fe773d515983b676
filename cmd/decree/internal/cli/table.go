package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// tablePrinter prints the tables that the server renders (KEP-1623) the way kubectl
// does. It is not safe for concurrent use.
type tablePrinter struct {
	out       io.Writer
	wide      bool
	namespace bool   // a first column with the namespace
	prefix    string // "deployment.apps/" before every name when kinds are mixed
	noHeaders bool
	headed    bool
}

// print writes the rows of t, with headers before the first.
func (p *tablePrinter) print(t *metav1.Table) error {
	w := tabwriter.NewWriter(p.out, 6, 8, 3, ' ', 0)
	var shown []int
	var head []string
	for i, c := range t.ColumnDefinitions {
		if c.Priority == 0 || p.wide {
			shown = append(shown, i)
			head = append(head, strings.ToUpper(c.Name))
		}
	}
	if p.namespace {
		head = append([]string{"NAMESPACE"}, head...)
	}
	if !p.noHeaders && !p.headed {
		fmt.Fprintln(w, strings.Join(head, "\t"))
	}
	p.headed = true
	for i := range t.Rows {
		var cells []string
		if p.namespace {
			ns, err := rowNamespace(&t.Rows[i])
			if err != nil {
				return err
			}
			cells = append(cells, ns)
		}
		for n, col := range shown {
			cell := fmt.Sprint(t.Rows[i].Cells[col])
			if n == 0 {
				cell = p.prefix + cell
			}
			cells = append(cells, cell)
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	return w.Flush()
}

// rowNamespace reads the namespace from the metadata that came with a row.
func rowNamespace(row *metav1.TableRow) (string, error) {
	var o metav1.PartialObjectMetadata
	if err := json.Unmarshal(row.Object.Raw, &o); err != nil {
		return "", fmt.Errorf("table: %w", err)
	}
	return o.Namespace, nil
}
