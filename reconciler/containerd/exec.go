package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"decree.dev/decree/reconciler/agent"
)

const (
	execKillWait = 5 * time.Second
	// drainQuiet is how long output may pause after the end of the process before it
	// counts as complete: a grandchild may hold it open for ever.
	drainQuiet = 500 * time.Millisecond
	// firstSize is how long a process waits for the size of its terminal, which clients say
	// as soon as they are connected: programs ask for it when they start.
	firstSize = 500 * time.Millisecond
)

// Exec implements agent.Runtime. The process is killed when ctx ends or the timeout
// passes; the error then matches context.DeadlineExceeded or ctx's.
func (r *Runtime) Exec(ctx context.Context, id string, cfg agent.ExecConfig) (int, error) {
	ctx = r.ns(ctx)
	if cfg.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cfg.Timeout)
		defer cancel()
	}
	code, err := r.exec(ctx, id, cfg)
	if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w: %w", ctx.Err(), err) // containerd reports it without its type
	}
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", id, err)
	}
	return code, nil
}

func (r *Runtime) exec(ctx context.Context, id string, cfg agent.ExecConfig) (int, error) {
	if len(cfg.Command) == 0 {
		return 0, fmt.Errorf("%w: no command is given", agent.ErrInvalidContainer)
	}
	container, err := r.client.LoadContainer(ctx, id)
	if err != nil {
		return 0, notFound(err)
	}
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return 0, fmt.Errorf("it is not running: %w", agent.ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	spec, err := container.Spec(ctx)
	if err != nil {
		return 0, err
	}
	process := execProcess(spec.Process, cfg)
	if cfg.TTY {
		process.ConsoleSize = consoleSize(ctx, cfg.Resize)
	}
	io := newExecIO(cfg)
	defer io.open(func() {}) // for the goroutine that reads stdin, when nothing starts
	p, err := task.Exec(ctx, "exec-"+randomID(), process, io.creator(r.cfg.fifoDir()))
	if err != nil {
		return 0, err
	}
	defer r.deleteExec(ctx, p)
	exited, err := p.Wait(ctx)
	if err != nil {
		return 0, err
	}
	if err := p.Start(ctx); err != nil {
		return 0, cleanStartError(err)
	}
	// Not earlier: before the start there is nothing to close, and the end of the
	// input would be forgotten.
	io.open(func() { _ = p.CloseIO(context.WithoutCancel(ctx), ctrd.WithStdinCloser) })
	return r.waitExec(ctx, p, exited, cfg, io)
}

func notFound(err error) error {
	if errdefs.IsNotFound(err) {
		return agent.ErrNotFound
	}
	return err
}

// waitExec waits for the end of a started process and its output.
func (r *Runtime) waitExec(ctx context.Context, p ctrd.Process, exited <-chan ctrd.ExitStatus, cfg agent.ExecConfig, io *execIO) (int, error) {
	resize := cfg.Resize
	for {
		select {
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			if cfg.TTY {
				_ = p.Resize(ctx, uint32(size.Width), uint32(size.Height)) // it may have ended
			}
		case status := <-exited:
			code, _, err := status.Result()
			if ctx.Err() != nil {
				return 0, ctx.Err()
			}
			if err != nil {
				return 0, err
			}
			io.drain(ctx, p.IO())
			return int(code), ctx.Err()
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// deleteExec kills what still runs and removes the process.
func (r *Runtime) deleteExec(ctx context.Context, p ctrd.Process) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), execKillWait)
	defer cancel()
	if exited, err := p.Wait(ctx); err == nil {
		if err := p.Kill(ctx, syscall.SIGKILL); err == nil {
			<-exited // or the end of ctx
		}
	}
	if pio := p.IO(); pio != nil {
		pio.Cancel()
	}
	if _, err := p.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		r.log.Debug("delete exec process", "process", p.ID(), "error", err)
		if pio := p.IO(); pio != nil {
			_ = pio.Close()
		}
	}
}

// execProcess is the container's own process with another command: same user,
// environment, capabilities and limits.
func execProcess(base *specs.Process, cfg agent.ExecConfig) *specs.Process {
	p := *base
	p.Args, p.Terminal, p.ConsoleSize = cfg.Command, cfg.TTY, nil
	if cfg.TTY {
		p.Env = append(append([]string{}, base.Env...), "TERM=xterm")
	}
	return &p
}

// consoleSize is the first size that arrives, nil if none does within [firstSize].
func consoleSize(ctx context.Context, sizes <-chan agent.TerminalSize) *specs.Box {
	if sizes == nil {
		return nil
	}
	timer := time.NewTimer(firstSize)
	defer timer.Stop()
	select {
	case size, ok := <-sizes:
		if ok {
			return &specs.Box{Width: uint(size.Width), Height: uint(size.Height)}
		}
	case <-timer.C:
	case <-ctx.Done():
	}
	return nil
}

// execIO connects the streams of an exec.
type execIO struct {
	cfg        agent.ExecConfig
	ready      chan struct{} // closed once closeStdin is set
	once       sync.Once
	closeStdin func()
	writing    atomic.Int32
	last       atomic.Int64 // time of the last output, ns
}

func newExecIO(cfg agent.ExecConfig) *execIO { return &execIO{cfg: cfg, ready: make(chan struct{})} }

// open says how the process is told of the end of its input.
func (e *execIO) open(closeStdin func()) {
	e.once.Do(func() {
		e.closeStdin = closeStdin
		close(e.ready)
	})
}

func (e *execIO) creator(dir string) cio.Creator {
	var stdin io.Reader
	if e.cfg.Stdin != nil {
		stdin = &stdinReader{e}
	}
	wrap := func(w io.Writer) io.Writer {
		if w == nil {
			w = io.Discard
		}
		return &execWriter{e, w}
	}
	opts := []cio.Opt{cio.WithStreams(stdin, wrap(e.cfg.Stdout), wrap(e.cfg.Stderr)), cio.WithFIFODir(dir)}
	if e.cfg.TTY {
		opts = append(opts, cio.WithTerminal)
	}
	return cio.NewCreator(opts...)
}

// drain returns once all output was copied.
func (e *execIO) drain(ctx context.Context, pio cio.IO) {
	done := make(chan struct{})
	go func() {
		pio.Wait()
		close(done)
	}()
	e.last.Store(time.Now().UnixNano())
	tick := time.NewTicker(drainQuiet / 5)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
			// A slow reader is waited for, a silent writer is not.
			if e.writing.Load() == 0 && time.Since(time.Unix(0, e.last.Load())) > drainQuiet {
				return
			}
		}
	}
}

type execWriter struct {
	e *execIO
	w io.Writer
}

func (w *execWriter) Write(b []byte) (int, error) {
	w.e.writing.Add(1)
	n, err := w.w.Write(b)
	w.e.last.Store(time.Now().UnixNano())
	w.e.writing.Add(-1)
	return n, err
}

// stdinReader tells containerd when the input has ended: it keeps the pipe open.
type stdinReader struct{ e *execIO }

func (s *stdinReader) Read(b []byte) (int, error) {
	n, err := s.e.cfg.Stdin.Read(b)
	if err != nil {
		go func() {
			<-s.e.ready
			s.e.closeStdin()
		}()
		if !errors.Is(err, io.EOF) {
			err = io.EOF
		}
	}
	return n, err
}
