package client

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/klog/v2"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/schemas/api"
)

// Logs copies the log of a container to w; with opts.Follow until the container or
// ctx ends.
func (c *Client) Logs(ctx context.Context, namespace, pod string, opts corev1.PodLogOptions, w io.Writer) error {
	q := url.Values{}
	set := func(name, v string, given bool) {
		if given {
			q.Set(name, v)
		}
	}
	number := func(name string, n *int64) {
		if n != nil {
			q.Set(name, strconv.FormatInt(*n, 10))
		}
	}
	set("container", opts.Container, opts.Container != "")
	set("follow", "true", opts.Follow)
	set("previous", "true", opts.Previous)
	set("timestamps", "true", opts.Timestamps)
	number("tailLines", opts.TailLines)
	number("sinceSeconds", opts.SinceSeconds)
	number("limitBytes", opts.LimitBytes)
	if opts.SinceTime != nil {
		q.Set("sinceTime", opts.SinceTime.UTC().Format(time.RFC3339))
	}
	k, _ := api.KindFor(api.Pods)
	resp, err := c.do(ctx, request{method: http.MethodGet, path: Path(k, namespace, pod) + "/log", query: q, accept: "text/plain, application/json, */*"})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("logs of pod %s/%s: %w", namespace, pod, err)
	}
	return nil
}

// Exec runs a process in a container, connected to the streams of e that are not
// nil, and returns its exit code. An error says that it could not be run or that
// the connection broke.
func (c *Client) Exec(ctx context.Context, namespace, pod string, e apiserver.ExecStreams) (int, error) {
	q := url.Values{"command": e.Command}
	for name, on := range map[string]bool{"stdin": e.Stdin != nil, "stdout": e.Stdout != nil, "stderr": e.Stderr != nil && !e.TTY, "tty": e.TTY} {
		q.Set(name, strconv.FormatBool(on))
	}
	if e.Container != "" {
		q.Set("container", e.Container)
	}
	k, _ := api.KindFor(api.Pods)
	u := *c.base.Load()
	u.Path += Path(k, namespace, pod) + "/exec"
	u.RawQuery = q.Encode()
	executor, err := remotecommand.NewWebSocketExecutor(c.restConfig(), http.MethodGet, u.String())
	if err != nil {
		return 0, fmt.Errorf("exec in pod %s/%s: %w", namespace, pod, err)
	}
	opts := remotecommand.StreamOptions{Stdin: e.Stdin, Stdout: e.Stdout, Tty: e.TTY}
	if !e.TTY {
		opts.Stderr = e.Stderr
	}
	if e.TTY && e.Resize != nil {
		opts.TerminalSizeQueue = sizeQueue{ctx, e.Resize}
	}
	// What goes wrong is returned; the library would also write it to stderr.
	err = executor.StreamWithContext(klog.NewContext(ctx, logr.Discard()), opts)
	var exit exec.CodeExitError
	if errors.As(err, &exit) {
		return exit.Code, nil
	}
	if err != nil {
		return 0, fmt.Errorf("exec in pod %s/%s: %w", namespace, pod, err)
	}
	return 0, nil
}

// restConfig is what the exec client of client-go wants to know.
func (c *Client) restConfig() *rest.Config {
	return &rest.Config{Host: c.Server(), TLSClientConfig: rest.TLSClientConfig{
		CAData: c.cfg.CA, CertData: c.cfg.Pair.CertPEM, KeyData: c.cfg.Pair.KeyPEM,
	}}
}

// sizeQueue hands terminal sizes to client-go.
type sizeQueue struct {
	ctx   context.Context
	sizes <-chan apiserver.TerminalSize
}

// Next implements remotecommand.TerminalSizeQueue.
func (q sizeQueue) Next() *remotecommand.TerminalSize {
	select {
	case s, ok := <-q.sizes:
		if ok {
			return &remotecommand.TerminalSize{Width: s.Width, Height: s.Height}
		}
	case <-q.ctx.Done():
	}
	return nil
}

// SyncSource, SuspendSource and ResumeSource tell the server what to do with a
// source.
func (c *Client) SyncSource(ctx context.Context, name string) error {
	return c.sourceAction(ctx, name, "sync", nil)
}

// SuspendSource stops following a source; see [Client.SyncSource].
func (c *Client) SuspendSource(ctx context.Context, name, reason string) error {
	return c.sourceAction(ctx, name, "suspend", url.Values{"reason": {reason}})
}

// ResumeSource goes on following a source; see [Client.SyncSource].
func (c *Client) ResumeSource(ctx context.Context, name string) error {
	return c.sourceAction(ctx, name, "resume", nil)
}

func (c *Client) sourceAction(ctx context.Context, name, action string, q url.Values) error {
	k, _ := api.KindFor(api.Sources)
	_, err := c.read(ctx, request{method: http.MethodPost, path: Path(k, "", name) + "/" + action, query: q, again: true})
	return err
}

// PlanSource asks what a push of tree to a source would change. The folder .git is
// left out.
func (c *Client) PlanSource(ctx context.Context, name string, tree fs.FS) (*apiserver.Plan, error) {
	body, err := tarTree(tree)
	if err != nil {
		return nil, fmt.Errorf("plan source %s: %w", name, err)
	}
	k, _ := api.KindFor(api.Sources)
	data, err := c.read(ctx, request{method: http.MethodPost, path: Path(k, "", name) + "/plan", body: body, contentType: "application/x-tar", again: true})
	if err != nil {
		return nil, err
	}
	var p apiserver.Plan
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("plan source %s: decode answer: %w", name, err)
	}
	return &p, nil
}

func tarTree(tree fs.FS) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := fs.WalkDir(tree, ".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() == ".git":
			return fs.SkipDir
		case d.IsDir():
			return nil
		case d.Type() == fs.ModeSymlink: // as it is: whether it is good is for the compiler to say
			to, err := fs.ReadLink(tree, path)
			if err != nil {
				return fmt.Errorf("read link %s: %w", path, err)
			}
			return w.WriteHeader(&tar.Header{Name: path, Linkname: to, Mode: 0o777, Typeflag: tar.TypeSymlink})
		case !d.Type().IsRegular():
			return fmt.Errorf("%s is not a regular file", path)
		}
		data, err := fs.ReadFile(tree, path)
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}); err != nil {
			return fmt.Errorf("pack %s: %w", path, err)
		}
		_, err = w.Write(data)
		return err
	})
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
