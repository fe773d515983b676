package cli

import (
	"bytes"
	"strings"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain äöü …": "plain äöü …",
		"\x1b[2Jgone": "^[[2Jgone",
		"a\rb\x07":    "a^Mb^G",
		"\u009b31m":   "\ufffd31m",
		"\x7f":        "\ufffd",
	} {
		if got := printable(in); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}

// A watch prints table after table: columns must stay where they are, and grow only.
func TestTableKeepsWidths(t *testing.T) {
	var out bytes.Buffer
	p := &tablePrinter{out: &out, prefix: "pod/"}
	defs := []metav1.TableColumnDefinition{{Name: "Name", Format: "name"}, {Name: "Status"}, {Name: "Age"}, {Name: "IP", Priority: 1}}
	for _, cells := range [][]any{{"a-long-name", "Up", "5s", "x"}, {"b", "é\nsecond line", "6s", "x"}, {"c", "Up", 7, "x"}} {
		if err := p.print(&metav1.Table{ColumnDefinitions: defs, Rows: []metav1.TableRow{{Cells: cells}}}); err != nil {
			t.Fatal(err)
		}
	}
	want := `NAME              STATUS   AGE
pod/a-long-name   Up       5s
pod/b             é...     6s
pod/c             Up       7
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
	if err := p.print(&metav1.Table{ColumnDefinitions: defs, Rows: []metav1.TableRow{{Cells: []any{"short"}}}}); err == nil {
		t.Error("a row with too few cells is accepted")
	}
}

func TestPrefixed(t *testing.T) {
	var out bytes.Buffer
	var mu sync.Mutex
	w := &prefixed{mu: &mu, out: &out, prefix: "[p/c] "}
	for _, part := range []string{"one\ntw", "o\n\n", strings.Repeat("x", maxLine), "y", "end"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
	}
	if err := w.end(); err != nil {
		t.Fatal(err)
	}
	want := "[p/c] one\n[p/c] two\n[p/c] \n[p/c] " + strings.Repeat("x", maxLine) + "\n[p/c] yend\n"
	if out.String() != want {
		t.Errorf("got %.80q..., want %.80q...", &out, want)
	}
}

func TestCheckOutput(t *testing.T) {
	if err := checkOutput("xml", "json", "yaml"); err == nil || err.Error() != `-o "xml": expected json or yaml` {
		t.Errorf("refused with %v", err)
	}
	if err := checkOutput("", "json"); err != nil {
		t.Error(err)
	}
}
