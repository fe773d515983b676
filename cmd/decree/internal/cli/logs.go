package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/client"
)

// logging is one `decree logs`.
type logging struct {
	env      *env
	client   *client.Client
	options  corev1.PodLogOptions
	selector string
	every    bool // container of the pod
}

func logsCmd(e *env) *cobra.Command {
	l := &logging{env: e}
	var tail int64
	var since time.Duration
	c := &cobra.Command{
		Use:   "logs POD | KIND/NAME | -l SELECTOR",
		Short: "Print the log of a container",
		Long: `Logs prints what a container writes. Of a deployment, a replica set or a service
it takes the first running pod; with -l it takes all pods that match, and says of
every line where it comes from.`,
		Example: `  decree logs web-7d4b9c-x2x5k
  decree logs -f --tail 20 deployment/web
  decree logs --previous web-7d4b9c-x2x5k -c proxy
  decree logs -l app=web --since 5m`,
		Args: func(_ *cobra.Command, args []string) error {
			if (len(args) == 1) == (l.selector != "") || len(args) > 1 {
				return errors.New("expected one pod, or KIND/NAME, or a selector with -l")
			}
			return nil
		},
		ValidArgsFunction: completePod(e),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if c.Flags().Changed("tail") {
				if tail < 0 {
					return usageError{errors.New("--tail: expected a number that is not negative")}
				}
				l.options.TailLines = &tail
			}
			if since > 0 {
				seconds := int64((since + time.Second - 1) / time.Second)
				l.options.SinceSeconds = &seconds
			}
			if l.client, err = e.client(); err != nil {
				return err
			}
			defer l.client.Close()
			if err = l.run(c.Context(), args); c.Context().Err() != nil {
				return nil // the user has seen enough
			}
			return err
		},
	}
	namespaceFlag(e, c)
	f := c.Flags()
	f.StringVarP(&l.options.Container, "container", "c", "", "container, when the pod has several")
	f.BoolVar(&l.every, "all-containers", false, "all containers of the pod")
	f.BoolVarP(&l.options.Follow, "follow", "f", false, "go on until the container ends")
	f.BoolVarP(&l.options.Previous, "previous", "p", false, "the log of the container before its last restart")
	f.StringVarP(&l.selector, "selector", "l", "", "all pods with these labels, such as app=web")
	f.BoolVar(&l.options.Timestamps, "timestamps", false, "with the time of each line")
	f.Int64Var(&tail, "tail", 0, "only so many last lines")
	f.DurationVar(&since, "since", 0, "only lines newer than this, such as 5m")
	return c
}

func (l *logging) run(ctx context.Context, args []string) error {
	if l.selector == "" {
		pod, err := l.env.onePod(ctx, l.client, args[0])
		if err != nil {
			return err
		}
		if !l.every {
			return l.client.Logs(ctx, l.env.namespace, pod, l.options, l.env.Out)
		}
		p, err := client.Get[*corev1.Pod](ctx, l.client, l.env.namespace, pod)
		if err != nil {
			return err
		}
		return l.several(ctx, []*corev1.Pod{p})
	}
	pods, _, err := client.List[*corev1.Pod](ctx, l.client, client.ListOptions{Namespace: l.env.namespace, LabelSelector: l.selector})
	if err != nil {
		return err
	}
	if len(pods) == 0 {
		l.env.nothing("resources", true)
		return nil
	}
	return l.several(ctx, pods)
}

// maxFollowed bounds the logs that are followed at once.
const maxFollowed = 20

// several prints the logs of several containers, each line with its origin: one
// after the other, or all at once when they are followed.
func (l *logging) several(ctx context.Context, pods []*corev1.Pod) error {
	type part struct{ pod, container string }
	var parts []part
	for _, p := range pods {
		for _, c := range p.Spec.Containers {
			if l.options.Container == "" || l.options.Container == c.Name {
				parts = append(parts, part{p.Name, c.Name})
			}
		}
	}
	if len(parts) == 0 {
		return fmt.Errorf("none of %s has a container %q", count(len(pods), "pod"), l.options.Container)
	}
	if l.options.Follow && len(parts) > maxFollowed {
		return fmt.Errorf("%d containers match: at most %d can be followed at once", len(parts), maxFollowed)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	errs := make([]error, len(parts))
	for i, p := range parts {
		one := func() {
			o := l.options
			o.Container = p.container
			w := &prefixed{mu: &mu, out: l.env.Out, prefix: fmt.Sprintf("[%s/%s] ", p.pod, p.container)}
			errs[i] = errors.Join(l.client.Logs(ctx, l.env.namespace, p.pod, o, w), w.end())
		}
		if l.options.Follow {
			wg.Go(one)
		} else {
			one()
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

// prefixed writes whole lines, each with a prefix. Writers that share mu and out
// may be used at the same time.
type prefixed struct {
	mu     *sync.Mutex
	out    io.Writer
	prefix string
	rest   []byte // the beginning of a line
}

// maxLine is where a line without an end is broken.
const maxLine = 64 << 10

func (w *prefixed) Write(data []byte) (int, error) {
	w.rest = append(w.rest, data...)
	var lines bytes.Buffer
	for {
		i := bytes.IndexByte(w.rest, '\n')
		if i < 0 && len(w.rest) < maxLine {
			break
		}
		if i < 0 {
			i = maxLine - 1
		}
		lines.WriteString(w.prefix)
		lines.Write(bytes.TrimSuffix(w.rest[:i+1], []byte("\n")))
		lines.WriteByte('\n')
		w.rest = w.rest[i+1:]
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := w.out.Write(lines.Bytes()); err != nil {
		return 0, err
	}
	return len(data), nil
}

// end writes a last line that has no end of its own.
func (w *prefixed) end() error {
	if len(w.rest) == 0 {
		return nil
	}
	_, err := w.Write([]byte("\n"))
	return err
}
