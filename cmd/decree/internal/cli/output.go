package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/term"
	"sigs.k8s.io/yaml"

	"decree.dev/decree/schemas/api"
)

// checkOutput refuses a value of -o that a verb does not know. Verbs call it before
// they do anything else.
func checkOutput(output string, known ...string) error {
	if output == "" || slices.Contains(known, output) {
		return nil
	}
	expected := known[len(known)-1]
	if len(known) > 1 {
		expected = strings.Join(known[:len(known)-1], ", ") + " or " + expected
	}
	return usageError{fmt.Errorf("-o %q: expected %s", output, expected)}
}

// writeJSON prints v for programs.
func (e *env) writeJSON(v any) error {
	enc := json.NewEncoder(e.Out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// writeValue prints v as "json" or "yaml".
func (e *env) writeValue(v any, output string) error {
	if output == "json" {
		return e.writeJSON(v)
	}
	data, err := yaml.Marshal(v)
	if err != nil {
		return err
	}
	_, err = e.Out.Write(data)
	return err
}

// listOf is a List as kubectl prints it; items are never null.
func listOf(objects []api.Object) map[string]any {
	return map[string]any{
		"apiVersion": "v1", "kind": "List", "metadata": map[string]any{"resourceVersion": ""},
		"items": append([]api.Object{}, objects...),
	}
}

// writeStream prints objects as YAML documents, one after the other.
func (e *env) writeStream(objects []api.Object) error {
	for i, o := range objects {
		if i > 0 {
			fmt.Fprintln(e.Out, "---")
		}
		if err := e.writeValue(o, "yaml"); err != nil {
			return err
		}
	}
	return nil
}

// printable makes s safe for a terminal: what others wrote (a commit's subject, a
// container's message) must not move the cursor.
func printable(s string) string {
	if strings.IndexFunc(s, unicode.IsControl) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r < 0x20:
			b.WriteString("^" + string('@'+r))
		case unicode.IsControl(r):
			b.WriteRune(unicode.ReplacementChar)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

func oneLine(s string) string { return printable(strings.Join(strings.Fields(s), " ")) }

// count says how many there are of something: "1 object", "3 objects".
func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// progress tells a person at a terminal what takes longer than a second. The
// returned function ends it and removes the line.
func (e *env) progress(what string) (done func()) {
	f, ok := e.Err.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func() {}
	}
	var mu sync.Mutex
	shown := false
	t := time.AfterFunc(time.Second, func() {
		mu.Lock()
		defer mu.Unlock()
		shown = true
		fmt.Fprintf(f, "%s ...", what)
	})
	return func() {
		t.Stop()
		mu.Lock()
		defer mu.Unlock()
		if shown {
			_, _ = io.WriteString(f, "\r\x1b[K")
			shown = false
		}
	}
}
