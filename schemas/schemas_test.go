package schemas_test

import (
	"bytes"
	"io/fs"
	"os/exec"
	"strings"
	"testing"

	"cuelang.org/go/cue/format"

	"decree.dev/decree/schemas"
)

// TestGenerated fails when the generated definitions are not what the Go types in go.mod
// and schemas/gen/fields.go give.
func TestGenerated(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "run", "./gen", "-check")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestFormatted keeps the module as `cue fmt` writes it.
func TestFormatted(t *testing.T) {
	files := 0
	err := fs.WalkDir(schemas.Module, "module", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		files++
		text, err := fs.ReadFile(schemas.Module, name)
		if err != nil {
			return err
		}
		want, err := format.Source(text)
		if err != nil {
			return err
		}
		if !strings.HasSuffix(name, "_gen.cue") && !bytes.Equal(text, want) {
			t.Errorf("%s is not formatted; run: go tool cue fmt schemas/%s", name, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Fatal("the module has no files")
	}
}
