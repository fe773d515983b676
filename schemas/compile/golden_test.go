package compile_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/tools/txtar"

	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

var update = flag.Bool("update", false, "rewrite the expected part of testdata/*.txtar")

// TestGolden compiles the tree in each testdata/*.txtar and compares what it means with the
// file "want": the objects and their places, or the diagnostics. Other files whose
// name begins with "want/" hold the place of every field of an object.
func TestGolden(t *testing.T) {
	names, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatal("no testdata", err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			fsys, want := fstest.MapFS{}, -1
			for i, f := range archive.Files {
				if f.Name == "want" {
					want = i
					continue
				}
				fsys[f.Name] = &fstest.MapFile{Data: f.Data}
			}
			r, err := compile.Evaluate(t.Context(), fsys, compile.Options{})
			if err != nil {
				t.Fatal(err)
			}
			got := describe(r)
			if *update {
				if want < 0 {
					archive.Files = append(archive.Files, txtar.File{Name: "want"})
					want = len(archive.Files) - 1
				}
				archive.Files[want].Data = []byte(got)
				if err := os.WriteFile(name, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want < 0 {
				t.Fatalf("no file want; run: go test ./schemas/compile -run Golden -update\n%s", got)
			}
			if string(archive.Files[want].Data) != got {
				t.Errorf("got\n%s\nwant\n%s", got, archive.Files[want].Data)
			}
		})
	}
}

// describe prints a result: one line for a diagnostic, or for an object and those of its
// fields that are written elsewhere than the object.
func describe(r *compile.Result) string {
	var b strings.Builder
	for _, d := range r.Diagnostics {
		fmt.Fprintln(&b, d.Error())
	}
	for _, o := range r.Objects {
		fmt.Fprintln(&b, o.Pos, api.KeyOf(o.Object))
		var fields []string
		for f := range o.Fields {
			fields = append(fields, f)
		}
		slices.Sort(fields)
		for _, f := range fields {
			if o.Fields[f] != o.Pos {
				fmt.Fprintf(&b, "  %s %s\n", o.Fields[f], f)
			}
		}
	}
	return b.String()
}
