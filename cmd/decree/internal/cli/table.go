package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// tablePrinter prints the tables that the server renders (KEP-1623) the way kubectl
// does. Columns keep their width from one table to the next, so that the lines of a
// watch stay aligned. It is not safe for concurrent use.
type tablePrinter struct {
	out       io.Writer
	wide      bool
	namespace bool   // a first column with the namespace
	prefix    string // "deployment.apps/" before every name when kinds are mixed
	noHeaders bool
	headed    bool
	widths    []int
}

// print writes the rows of t, with headers before the first.
func (p *tablePrinter) print(t *metav1.Table) error {
	var lines [][]string
	if !p.noHeaders && !p.headed {
		lines = append(lines, p.header(t.ColumnDefinitions))
	}
	p.headed = true
	for i := range t.Rows {
		cells, err := p.row(t.ColumnDefinitions, &t.Rows[i])
		if err != nil {
			return err
		}
		lines = append(lines, cells)
	}
	for _, cells := range lines {
		for i, cell := range cells {
			if i == len(p.widths) {
				p.widths = append(p.widths, 0)
			}
			p.widths[i] = max(p.widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, cells := range lines {
		for i, cell := range cells {
			if i == len(cells)-1 {
				b.WriteString(cell + "\n")
				break
			}
			b.WriteString(cell + strings.Repeat(" ", p.widths[i]-utf8.RuneCountInString(cell)+3))
		}
	}
	_, err := io.WriteString(p.out, b.String())
	return err
}

func (p *tablePrinter) header(defs []metav1.TableColumnDefinition) []string {
	var cells []string
	if p.namespace {
		cells = append(cells, "NAMESPACE")
	}
	for _, d := range defs {
		if d.Priority == 0 || p.wide {
			cells = append(cells, strings.ToUpper(d.Name))
		}
	}
	return cells
}

func (p *tablePrinter) row(defs []metav1.TableColumnDefinition, row *metav1.TableRow) ([]string, error) {
	var cells []string
	if p.namespace {
		ns, err := rowNamespace(row)
		if err != nil {
			return nil, err
		}
		cells = append(cells, ns)
	}
	for i, d := range defs {
		if i >= len(row.Cells) {
			return nil, fmt.Errorf("table: a row has %d cells for %d columns", len(row.Cells), len(defs))
		}
		if d.Priority != 0 && !p.wide {
			continue
		}
		cell := fmt.Sprint(row.Cells[i])
		if first, _, cut := strings.Cut(cell, "\n"); cut {
			cell = first + "..."
		}
		if cell = printable(cell); d.Format == "name" {
			cell = p.prefix + cell
		}
		cells = append(cells, cell)
	}
	return cells, nil
}

// rowNamespace reads the namespace from the object, or the metadata, that came with
// a row.
func rowNamespace(row *metav1.TableRow) (string, error) {
	if o, ok := row.Object.Object.(metav1.Object); ok {
		return o.GetNamespace(), nil
	}
	var o metav1.PartialObjectMetadata
	if err := json.Unmarshal(row.Object.Raw, &o); err != nil {
		return "", fmt.Errorf("table: %w", err)
	}
	return o.Namespace, nil
}
