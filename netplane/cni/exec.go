package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"decree.dev/decree/netplane/netspace"
)

const (
	// pluginTimeout bounds one call of one plugin.
	pluginTimeout = 30 * time.Second
	// maxOutput bounds what is kept of what a plugin prints.
	maxOutput = 1 << 20
	// maxPlugins bounds the plugins that run at a time.
	maxPlugins = 8
)

// runner implements invoke.Exec: it runs plugins in the node's network namespace,
// with bounded time and output.
type runner struct {
	version.PluginDecoder
	netns   string
	timeout time.Duration
	slots   chan struct{}
}

// FindInPath implements invoke.Exec.
func (r *runner) FindInPath(plugin string, paths []string) (string, error) {
	path, err := invoke.FindInPath(plugin, paths)
	if err != nil {
		return "", fmt.Errorf("cni plugin %q is not in %s; run: apt-get install containernetworking-plugins", plugin, strings.Join(paths, ", "))
	}
	return path, nil
}

// ExecPlugin implements invoke.Exec.
func (r *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, r.timeout, fmt.Errorf("did not end within %s", r.timeout))
	defer cancel()
	stdout, stderr := bounded{max: maxOutput}, bounded{max: 16 << 10}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ, bytes.NewReader(stdin), &stdout, &stderr
	// A group of its own, so that what the plugin started ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := netspace.Do(r.netns, cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	name := filepath.Base(path)
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("cni plugin %s: %w", name, context.Cause(ctx))
	case err != nil:
		return nil, pluginError(name, err, stdout.kept.Bytes(), stderr.kept.String())
	case stdout.over:
		return nil, fmt.Errorf("cni plugin %s: %w: it printed more than %d bytes", name, ErrResult, maxOutput)
	}
	if slices.Contains(environ, "CNI_COMMAND=ADD") {
		if _, err := decodeResult(stdout.kept.Bytes()); err != nil {
			return nil, fmt.Errorf("cni plugin %s: %w", name, err)
		}
	}
	return stdout.kept.Bytes(), nil
}

// pluginError says what the plugin said: its structured error if there is one.
func pluginError(name string, err error, stdout []byte, stderr string) error {
	var said types.Error
	if json.Unmarshal(stdout, &said) == nil && (said.Msg != "" || said.Code != 0) {
		return fmt.Errorf("cni plugin %s: %w", name, &said)
	}
	if stderr = strings.TrimSpace(stderr); stderr != "" {
		return fmt.Errorf("cni plugin %s: %w: %s", name, err, stderr)
	}
	return fmt.Errorf("cni plugin %s: %w", name, err)
}

// bounded keeps the first max bytes and takes the rest as if it did. It has no
// ReadFrom, by which io.Copy would go past Write.
type bounded struct {
	kept bytes.Buffer
	max  int
	over bool
}

func (b *bounded) Write(p []byte) (int, error) {
	n := len(p)
	if room := b.max - b.kept.Len(); n > room {
		b.over = true
		p = p[:room]
	}
	b.kept.Write(p)
	return n, nil
}

// isTryAgain reports whether the plugin asked for another attempt later.
func isTryAgain(err error) bool {
	var said *types.Error
	return errors.As(err, &said) && said.Code == types.ErrTryAgainLater
}
