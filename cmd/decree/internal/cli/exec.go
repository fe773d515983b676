package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"k8s.io/streaming/pkg/httpstream"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/client"
)

func execCmd(e *env) *cobra.Command {
	var container string
	var stdin, tty bool
	c := &cobra.Command{
		Use:   "exec POD|KIND/NAME -- COMMAND [ARG...]",
		Short: "Run a command in a container",
		Example: `  decree exec web-7d4b9c-x2x5k -- cat /etc/hosts
  decree exec -it deployment/web -- sh`,
		ValidArgsFunction: completePod(e),
		Args: func(c *cobra.Command, args []string) error {
			if dash := c.ArgsLenAtDash(); len(args) < 2 || (dash >= 0 && dash != 1) {
				return fmt.Errorf("expected a pod and, after --, a command")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			pod, err := e.onePod(c.Context(), cl, args[0])
			if err != nil {
				return err
			}
			code, err := e.exec(c.Context(), cl, pod, container, args[1:], stdin, tty)
			var refused *httpstream.UpgradeFailureError
			if errors.As(err, &refused) {
				return refused.Cause // the server's own words
			}
			if err != nil {
				return err
			}
			if code != 0 {
				return exitCode(code)
			}
			return nil
		},
	}
	namespaceFlag(e, c)
	f := c.Flags()
	f.StringVarP(&container, "container", "c", "", "container, when the pod has several")
	f.BoolVarP(&stdin, "stdin", "i", false, "pass standard input on")
	f.BoolVarP(&tty, "tty", "t", false, "with a terminal")
	return c
}

// exec connects this terminal to a process in a container and returns its exit code.
func (e *env) exec(ctx context.Context, c *client.Client, pod, container string, command []string, stdin, tty bool) (int, error) {
	s := apiserver.ExecStreams{Container: container, Command: command, TTY: tty, Stdout: e.Out, Stderr: e.Err}
	if stdin {
		s.Stdin = e.In
	}
	if !tty {
		return c.Exec(ctx, e.namespace, pod, s)
	}
	s.Stderr = nil // a terminal has one output
	in, ok := e.In.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return c.Exec(ctx, e.namespace, pod, s)
	}
	before, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return 0, fmt.Errorf("terminal: %w", err)
	}
	defer term.Restore(int(in.Fd()), before)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.Resize = terminalSizes(ctx, int(in.Fd()))
	return c.Exec(ctx, e.namespace, pod, s)
}

// terminalSizes sends the size of a terminal now and whenever it changes.
func terminalSizes(ctx context.Context, fd int) <-chan apiserver.TerminalSize {
	sizes := make(chan apiserver.TerminalSize, 1)
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	go func() {
		defer close(sizes)
		defer signal.Stop(changed)
		for {
			if w, h, err := term.GetSize(fd); err == nil {
				select {
				case sizes <- apiserver.TerminalSize{Width: uint16(w), Height: uint16(h)}:
				case <-ctx.Done():
					return
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return sizes
}
