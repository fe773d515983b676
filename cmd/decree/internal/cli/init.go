package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// scaffold is what `decree init` writes: file name to content.
var scaffold = map[string]string{
	"cue.mod/module.cue": `module: "example.com/cluster"
language: version: "v0.17.0"
`,
	"hello.cue": `package cluster

import "decree.dev/app"

// A Deployment with two pods and a Service in front of them.
hello: app.#App & {
	name:     "hello"
	image:    "decree.dev/hello:v1"
	port:     8080
	replicas: 2
}
`,
	".gitignore": "*.key\n",
}

func initCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "init [FOLDER]",
		Short: "Write the files of a new manifest repository",
		Long: `Init writes a CUE module with one application into a folder. It never
overwrites: a file that exists is an error, and then nothing is written.`,
		Example: `  decree init shop && cd shop && git init
  decree vet`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			dir := folder(args)
			for _, name := range sortedKeys(scaffold) {
				if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
					return fmt.Errorf("init %s: %s exists already: nothing was written, choose another folder", dir, name)
				} else if !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("init %s: %w", dir, err)
				}
			}
			for name, content := range scaffold {
				file := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					return fmt.Errorf("init %s: %w", dir, err)
				}
				if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
					return fmt.Errorf("init %s: %w", dir, err)
				}
			}
			_, err := fmt.Fprintf(e.Out, "wrote %s; next: decree vet %s\n", filepath.Join(dir, "hello.cue"), dir)
			return err
		},
	}
}

// folder is the optional argument FOLDER; the current folder without it.
func folder(args []string) string {
	if len(args) > 0 {
		return args[0]
	}
	return "."
}
