package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

// compileFolder evaluates a folder on disk in a bounded child process, as the
// server would.
func compileFolder(ctx context.Context, dir, path string) (*compile.Result, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is not a folder", dir)
	}
	compiler, err := newCompiler()
	if err != nil {
		return nil, err
	}
	defer compiler.Close()
	return compiler.Compile(ctx, os.DirFS(dir), compile.Options{Path: path})
}

// refuse prints diagnostics and returns the error that counts them.
func (e *env) refuse(ds []api.Diagnostic) error {
	for _, d := range ds {
		fmt.Fprintln(e.Err, d.Error())
	}
	if len(ds) == 1 {
		return fmt.Errorf("1 error")
	}
	return fmt.Errorf("%d errors", len(ds))
}

func vetCmd(e *env) *cobra.Command {
	var path, output string
	c := &cobra.Command{
		Use:   "vet [FOLDER]",
		Short: "Check a tree of manifests as a push would, without a cluster",
		Example: `  decree vet
  decree vet -o json ./shop | jq '.[].pos'`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			begun := time.Now()
			res, err := compileFolder(c.Context(), folder(args), path)
			if err != nil {
				return fmt.Errorf("vet %s: %w", folder(args), err)
			}
			switch output {
			case "json":
				ds := res.Diagnostics
				if ds == nil {
					ds = []api.Diagnostic{}
				}
				if err := json.NewEncoder(e.Out).Encode(ds); err != nil {
					return err
				}
				if len(ds) > 0 {
					return exitCode(1)
				}
				return nil
			case "":
			default:
				return usageError{fmt.Errorf("-o %q: expected json", output)}
			}
			if len(res.Diagnostics) > 0 {
				return e.refuse(res.Diagnostics)
			}
			_, err = fmt.Fprintf(e.Out, "ok: %d objects from %d files in %s\n", len(res.Objects), res.Files, time.Since(begun).Round(time.Millisecond))
			return err
		},
	}
	c.Flags().StringVar(&path, "path", ".", "folder inside the tree to evaluate")
	c.Flags().StringVarP(&output, "output", "o", "", "json: the list of what is wrong")
	return c
}

func renderCmd(e *env) *cobra.Command {
	var path, output string
	c := &cobra.Command{
		Use:   "render [FOLDER]",
		Short: "Print the objects that a tree of manifests means",
		Example: `  decree render > all.yaml
  decree render -o json ./shop`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if output != "yaml" && output != "json" {
				return usageError{fmt.Errorf("-o %q: expected yaml or json", output)}
			}
			res, err := compileFolder(c.Context(), folder(args), path)
			if err != nil {
				return fmt.Errorf("render %s: %w", folder(args), err)
			}
			if len(res.Diagnostics) > 0 {
				return e.refuse(res.Diagnostics)
			}
			objects := make([]api.Object, len(res.Objects))
			for i, o := range res.Objects {
				objects[i] = o.Object
			}
			return e.writeObjects(objects, output)
		},
	}
	c.Flags().StringVar(&path, "path", ".", "folder inside the tree to evaluate")
	c.Flags().StringVarP(&output, "output", "o", "yaml", "yaml or json")
	return c
}

// writeObjects prints objects as a stream of YAML documents, or as one JSON List.
func (e *env) writeObjects(objects []api.Object, output string) error {
	if output == "json" {
		enc := json.NewEncoder(e.Out)
		enc.SetIndent("", "  ")
		if len(objects) == 1 {
			return enc.Encode(objects[0])
		}
		return enc.Encode(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	}
	for i, o := range objects {
		data, err := yaml.Marshal(o)
		if err != nil {
			return err
		}
		if i > 0 {
			fmt.Fprintln(e.Out, "---")
		}
		if _, err := e.Out.Write(data); err != nil {
			return err
		}
	}
	return nil
}
