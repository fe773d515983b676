package cli

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/client"
)

func logsCmd(e *env) *cobra.Command {
	var o corev1.PodLogOptions
	var tail int64
	var since time.Duration
	c := &cobra.Command{
		Use:   "logs POD",
		Short: "Print the log of a container",
		Example: `  decree logs web-7d4b9c-x2x5k
  decree logs -f --tail 20 web-7d4b9c-x2x5k -c proxy
  decree logs --previous web-7d4b9c-x2x5k`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if c.Flags().Changed("tail") {
				o.TailLines = &tail
			}
			if since > 0 {
				seconds := int64((since + time.Second - 1) / time.Second)
				o.SinceSeconds = &seconds
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			err = cl.Logs(c.Context(), e.namespace, podName(args[0]), o, e.Out)
			if c.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	namespaceFlag(e, c)
	f := c.Flags()
	f.StringVarP(&o.Container, "container", "c", "", "container, when the pod has several")
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on until the container ends")
	f.BoolVarP(&o.Previous, "previous", "p", false, "the log of the container before its last restart")
	f.BoolVar(&o.Timestamps, "timestamps", false, "with the time of each line")
	f.Int64Var(&tail, "tail", 0, "only so many last lines")
	f.DurationVar(&since, "since", 0, "only lines newer than this, such as 5m")
	return c
}

// podName accepts "web" and "pod/web".
func podName(arg string) string {
	if kind, name, ok := strings.Cut(arg, "/"); ok && (kind == "pod" || kind == "pods" || kind == "po") {
		return name
	}
	return arg
}

func execCmd(e *env) *cobra.Command {
	var container string
	var stdin, tty bool
	c := &cobra.Command{
		Use:   "exec POD -- COMMAND [ARG...]",
		Short: "Run a command in a container",
		Example: `  decree exec web-7d4b9c-x2x5k -- cat /etc/hosts
  decree exec -it web-7d4b9c-x2x5k -- sh`,
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
			code, err := e.exec(c.Context(), cl, podName(args[0]), container, args[1:], stdin, tty)
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
