// Package cli is the command line of decree: one file per verb. Verbs write to the
// streams they are given and return errors; only Run turns an error into text and
// an exit status.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
)

// Streams are where a verb reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// env is what all verbs share.
type env struct {
	Streams
	kubeconfig string // --kubeconfig
	namespace  string // --namespace
	stale      bool   // --stale
}

// exitCode ends the process with a status and no further text.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit status %d", int(c)) }

// usageError marks an error of the command line itself: exit status 2.
type usageError struct{ error }

// Run executes the command line args (without the program's name) and returns the
// exit status: 0, 1 for an error, 2 for wrong usage, or that of a remote command.
func Run(args []string, s Streams) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot(s)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var code exitCode
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &usage):
		fmt.Fprintf(s.Err, "decree: %v\n", err)
		return 2
	}
	for _, err := range separate(err) {
		fmt.Fprintf(s.Err, "decree: %v\n", explain(err))
	}
	return 1
}

// separate takes errors apart that were joined, one for each thing asked for.
func separate(err error) []error {
	several, ok := err.(interface{ Unwrap() []error })
	if !ok || errors.Join(several.Unwrap()...).Error() != err.Error() {
		return []error{err} // one error, maybe of several causes
	}
	var list []error
	for _, err := range several.Unwrap() {
		list = append(list, separate(err)...)
	}
	return list
}

func newRoot(s Streams) *cobra.Command {
	e := &env{Streams: s}
	root := &cobra.Command{
		Use:   "decree",
		Short: "Runs what Git says: a container orchestrator whose only desired state is Git",
		Long: `Decree runs containers as Git repositories written in CUE describe them.

Push a commit: it is checked, planned, applied as one transaction, and rolled out.
Nothing else changes what should run.`,
		Example: `  decree up                      # a one-node cluster on this machine
  git clone decree://127.0.0.1:7443/cluster
  decree get pods
  decree plan .                  # what would a push of this tree change?`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w\nsee '%s --help'", err, c.CommandPath())}
	})
	pf := root.PersistentFlags()
	pf.StringVar(&e.kubeconfig, "kubeconfig", "", "credentials of the cluster (default: $DECREE_KUBECONFIG, else the data folder's admin.kubeconfig)")
	groups := []struct {
		id, title string
		verbs     []*cobra.Command
	}{
		{"cluster", "Cluster:", []*cobra.Command{upCmd(e), downCmd(e), serverCmd(e), agentCmd(e), statusCmd(e), doctorCmd(e), netcheckCmd(e)}},
		{"servers", "Servers:", []*cobra.Command{membersCmd(e), tokenCmd(e), caCmd(e), keysCmd(e), snapshotCmd(e, snapshotGit{check: daemon.CheckRepository, importing: daemon.ImportRepository})}},
		{"git", "Manifests and Git:", []*cobra.Command{initCmd(e), vetCmd(e), renderCmd(e), planCmd(e), sourceCmd(e)}},
		{"look", "Looking:", []*cobra.Command{getCmd(e), describeCmd(e), logsCmd(e), execCmd(e), eventsCmd(e), whyBlockedCmd(e)}},
	}
	for _, g := range groups {
		root.AddGroup(&cobra.Group{ID: g.id, Title: g.title})
		for _, c := range g.verbs {
			c.GroupID = g.id
			root.AddCommand(c)
		}
	}
	root.AddCommand(versionCmd(e), completionCmd(e), benchCmd(e), imageCmd(e), compileWorkerCmd(e), frontCmd(e))
	root.Version = version
	root.SetVersionTemplate("decree {{.Version}}\n")
	strict(root)
	return root
}

// strict makes wrong arguments of any verb a usage error, and an unknown verb too.
func strict(c *cobra.Command) {
	check := c.Args
	if c.HasSubCommands() {
		check = knownVerb
		if c.RunE == nil {
			c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
		}
		c.DisableFlagsInUseLine, c.SuggestionsMinimumDistance = true, 2
	}
	c.Args = func(c *cobra.Command, args []string) error {
		if check == nil {
			return nil
		}
		if err := check(c, args); err != nil {
			return usageError{fmt.Errorf("%w\nsee '%s --help'", err, c.CommandPath())}
		}
		return nil
	}
	for _, sub := range c.Commands() {
		strict(sub)
	}
}

// knownVerb refuses arguments of a command that only has verbs.
func knownVerb(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	err := fmt.Errorf("unknown command %q", args[0])
	if like := c.SuggestionsFor(args[0]); len(like) > 0 {
		err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(like, " or "))
	}
	return err
}

// namespaceFlag adds -n to a verb that looks at namespaced objects.
func namespaceFlag(e *env, c *cobra.Command) {
	c.Flags().StringVarP(&e.namespace, "namespace", "n", "default", "namespace")
}
