package compile_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"go.uber.org/goleak"

	"decree.dev/decree/schemas/compile"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == compile.WorkerVerb {
		os.Exit(compile.WorkerMain(os.Stdin, os.Stdout))
	}
	goleak.VerifyTestMain(m)
}

func newProcess(t testing.TB, cfg compile.ProcessConfig) *compile.Process {
	t.Helper()
	p, err := compile.NewProcess(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// mapFS is a tree in memory.
func mapFS(files map[string]string) fstest.MapFS {
	fsys := fstest.MapFS{}
	for name, text := range files {
		fsys[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return fsys
}

const configMap = `
c: {
	apiVersion: "v1"
	kind:       "ConfigMap"
	metadata: name: %q
	data: key: %s
}
`

// TestBombs feeds trees that would take all memory, all time or all stack. Each must
// end in a diagnostic that names the limit, and the compiler must go on to serve.
func TestBombs(t *testing.T) {
	double := func(n int) string {
		var b strings.Builder
		b.WriteString("x0: \"0123456789abcdef\"\n")
		for i := range n {
			fmt.Fprintf(&b, "x%d: \"\\(x%d)\\(x%d)\"\n", i+1, i, i)
		}
		return b.String()
	}
	chain := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i, i+1)
		}
		return b.String()
	}
	doubling := func(n int) string { return "x0: 1\n" + chain("x%[2]d: {a: x%[1]d, b: x%[1]d}\n", n) }
	tests := []struct {
		name, text string
		opts       compile.Options
		want       string
	}{
		{"a text of 1 GB", double(26), compile.Options{Memory: 256 << 20}, "more memory than the limit of 256 MiB"},
		{"comprehension", `
n: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
x: [for a in n for b in n for c in n for d in n for e in n for f in n for g in n for h in n for i in n {a + b}]
`, compile.Options{Memory: 128 << 20}, "limit of"},
		{"slow", `
n: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
x: [for a in n for b in n for c in n for d in n for e in n for f in n for g in n for h in n if a > 10 {a}]
`, compile.Options{Timeout: time.Second}, "longer than the limit of 1s"},
		{"shared doubling", doubling(60), compile.Options{Memory: 256 << 20, Timeout: time.Second}, "limit of"},
		{"recursion", "x0: 1\n" + chain("x%[2]d: {a: x%[1]d}\n", 100_000), compile.Options{Memory: 512 << 20, Timeout: time.Second}, "limit of"},
		{"nesting", "x: " + strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20), compile.Options{}, "maximum nesting depth"},
		{"long sum", "x0: 1\n" + chain("x%[2]d: x%[1]d + 1\n", 100_000), compile.Options{Timeout: time.Second}, "limit of"},
	}
	p := newProcess(t, compile.ProcessConfig{})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			r, err := p.Compile(t.Context(), mapFS(map[string]string{"sub/bomb.cue": tt.text, "good.cue": fmt.Sprintf(configMap, "c", `"v"`)}), tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(time.Since(start), r.Diagnostics)
			if len(r.Diagnostics) != 1 || !strings.Contains(r.Diagnostics[0].Message, tt.want) || r.Diagnostics[0].Pos.File != "sub/bomb.cue" {
				t.Errorf("diagnostics = %v, want one in sub/bomb.cue with %q", r.Diagnostics, tt.want)
			}
			if r.Objects != nil {
				t.Error("objects beside a diagnostic")
			}
		})
	}
	r, err := p.Compile(t.Context(), os.DirFS("../../examples/hello"), compile.Options{})
	if err != nil || len(r.Diagnostics) > 0 || len(r.Objects) != 3 {
		t.Fatalf("after the bombs: %v, %v, %d objects", err, r.Diagnostics, len(r.Objects))
	}
}

func TestCanceled(t *testing.T) {
	p := newProcess(t, compile.ProcessConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := p.Compile(ctx, mapFS(map[string]string{"a.cue": "a: 1"}), compile.Options{})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error = %v, want context.Canceled", err)
	}
}
