package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent/probe"
)

// hook runs a container's post-start or pre-stop hook within ctx.
func (j *job) hook(ctx context.Context, start bool) error {
	c := containerSpec(j.pod, j.step.Container)
	if c == nil || c.Lifecycle == nil {
		return nil
	}
	h := c.Lifecycle.PreStop
	if start {
		h = c.Lifecycle.PostStart
	}
	switch {
	case h == nil:
		return nil
	case h.Sleep != nil:
		select {
		case <-time.After(time.Duration(h.Sleep.Seconds) * time.Second):
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case h.Exec != nil:
		return j.execHook(ctx, h.Exec)
	}
	t := j.agent.target(c, j.ips, j.step.ID)
	var r probe.Result
	switch {
	case h.HTTPGet != nil:
		r = probe.HTTPGet(ctx, h.HTTPGet, t)
	case h.TCPSocket != nil:
		r = probe.Check(ctx, &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: h.TCPSocket}}, t)
	default:
		return errors.New("the hook has none of exec, httpGet, tcpSocket and sleep")
	}
	if r.Outcome != probe.Success {
		return errors.New(r.Message)
	}
	return nil
}

func (j *job) execHook(ctx context.Context, e *corev1.ExecAction) error {
	out := &capped{max: 4 << 10}
	code, err := j.agent.cfg.Runtime.Exec(ctx, j.step.ID, ExecConfig{Command: e.Command, Stdout: out, Stderr: out, Timeout: timeLeft(ctx)})
	if err != nil {
		return fmt.Errorf("exec %q: %w", e.Command, err)
	}
	if code != 0 {
		return fmt.Errorf("exec %q exited with %d: %s", e.Command, code, oneLine(out.String()))
	}
	return nil
}

func timeLeft(ctx context.Context) time.Duration {
	if d, ok := ctx.Deadline(); ok {
		return max(time.Until(d), time.Millisecond)
	}
	return 0
}

// capped keeps the first max bytes written to it.
type capped struct {
	bytes.Buffer
	max int
}

func (c *capped) Write(p []byte) (int, error) {
	if room := c.max - c.Len(); room > 0 {
		c.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

var _ io.Writer = (*capped)(nil)
