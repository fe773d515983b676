package cli

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/reconciler/plan"
)

func planCmd(e *env) *cobra.Command {
	var source, output string
	c := &cobra.Command{
		Use:   "plan [FOLDER]",
		Short: "Show what a push of this tree would change; change nothing",
		Example: `  decree plan
  decree plan --source shop ./shop -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if output != "" && output != "json" {
				return usageError{fmt.Errorf("-o %q: expected json", output)}
			}
			root, err := os.OpenRoot(folder(args))
			if err != nil {
				return fmt.Errorf("plan: %w", err)
			}
			defer root.Close()
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			p, err := cl.PlanSource(c.Context(), source, withoutGit{root.FS()})
			if err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(e.Out)
				enc.SetIndent("", "  ")
				if err := enc.Encode(p); err != nil {
					return err
				}
				if len(p.Refusals) > 0 {
					return exitCode(1)
				}
				return nil
			}
			if len(p.Refusals) > 0 {
				return e.refuse(p.Refusals)
			}
			return plan.ChangeSet{Changes: p.Changes, Unchanged: p.Unchanged}.Text(e.Out)
		},
	}
	c.Flags().StringVar(&source, "source", daemon.BuiltIn, "source whose next commit the tree would be")
	c.Flags().StringVarP(&output, "output", "o", "", "json for everything")
	return c
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// withoutGit is a tree the way a commit would hold it: without its .git folder.
type withoutGit struct{ fs.FS }

func (w withoutGit) ReadDir(name string) ([]fs.DirEntry, error) {
	entries, err := fs.ReadDir(w.FS, name)
	if name == "." {
		entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return e.Name() == ".git" })
	}
	return entries, err
}

func (w withoutGit) ReadLink(name string) (string, error) { return fs.ReadLink(w.FS, name) }

func (w withoutGit) Lstat(name string) (fs.FileInfo, error) { return fs.Lstat(w.FS, name) }
