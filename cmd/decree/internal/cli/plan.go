package cli

import (
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/reconciler/plan"
)

func planCmd(e *env) *cobra.Command {
	var source, output string
	c := &cobra.Command{
		Use:   "plan [FOLDER]",
		Short: "Show what a push of this tree would change; change nothing",
		Long: `Plan evaluates a folder as the server would evaluate a commit of it, and lists what
would be added, changed and deleted. What a push would refuse is refused here too,
with exit status 1. The folder .git is left out.`,
		Example: `  decree plan
  decree plan --source shop ./shop -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
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
			done := e.progress("planning")
			p, err := cl.PlanSource(c.Context(), source, withoutGit{root.FS()})
			done()
			if err != nil {
				return err
			}
			if output == "json" {
				if err := e.writeJSON(p); err != nil {
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
