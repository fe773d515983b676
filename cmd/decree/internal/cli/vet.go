package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

// compileFolder evaluates a folder on disk in a bounded child process, as the
// server would.
func (e *env) compileFolder(ctx context.Context, dir, path string) (*compile.Result, error) {
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
	defer e.progress("evaluating " + dir)()
	return compiler.Compile(ctx, os.DirFS(dir), compile.Options{Path: path})
}

// refuse prints diagnostics and returns the error that counts them.
func (e *env) refuse(ds []api.Diagnostic) error {
	for _, d := range ds {
		fmt.Fprintln(e.Err, d.Error())
	}
	return errors.New(count(len(ds), "error"))
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
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			begun := time.Now()
			res, err := e.compileFolder(c.Context(), folder(args), path)
			if err != nil {
				return fmt.Errorf("vet %s: %w", folder(args), err)
			}
			if output == "json" {
				if err := e.writeJSON(append([]api.Diagnostic{}, res.Diagnostics...)); err != nil {
					return err
				}
				if len(res.Diagnostics) > 0 {
					return exitCode(1)
				}
				return nil
			}
			if len(res.Diagnostics) > 0 {
				return e.refuse(res.Diagnostics)
			}
			_, err = fmt.Fprintf(e.Out, "ok: %s from %s in %s\n", count(len(res.Objects), "object"), count(res.Files, "file"), time.Since(begun).Round(time.Millisecond))
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
			if err := checkOutput(output, "yaml", "json"); err != nil {
				return err
			}
			res, err := e.compileFolder(c.Context(), folder(args), path)
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
			if output == "json" {
				return e.writeJSON(listOf(objects))
			}
			return e.writeStream(objects)
		},
	}
	c.Flags().StringVar(&path, "path", ".", "folder inside the tree to evaluate")
	c.Flags().StringVarP(&output, "output", "o", "yaml", "yaml or json")
	return c
}
