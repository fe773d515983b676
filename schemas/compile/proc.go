package compile

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/schemas/api"
)

const (
	workerNice = 5
	// minMemory is what a worker needs for itself: less would end it before the tree.
	minMemory = 128 << 20
	// maxWords is how much of what a worker says on stderr is kept.
	maxWords = 16 << 10
)

var errTimeout = errors.New("the time limit of the evaluation has passed")

// spawner starts children from one thread that lives until close: PDEATHSIG is about the
// thread that forks, and Go's threads come and go.
type spawner struct {
	jobs    chan func()
	done    chan struct{}
	started atomic.Int64 // workers, for tests and measurements
}

func newSpawner() *spawner {
	s := &spawner{jobs: make(chan func()), done: make(chan struct{})}
	go func() {
		runtime.LockOSThread()
		// Children inherit it, whatever their parent's other threads have.
		_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, workerNice) // more is always allowed
		defer close(s.done)
		for job := range s.jobs {
			job()
		}
	}()
	return s
}

func (s *spawner) close() {
	close(s.jobs)
	<-s.done
}

// start starts a worker. It does not wait until it is ready.
func (s *spawner) start(command []string) (*proc, error) {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c := &proc{cmd: cmd, exited: make(chan struct{})}
	cmd.Stderr = &c.words
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start compile worker: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start compile worker: %w", err)
	}
	started := make(chan error, 1)
	s.jobs <- func() { started <- cmd.Start() }
	s.started.Add(1)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start compile worker %s: %w", command[0], err)
	}
	c.in, c.out = stdin, newFrameReader(stdout, maxResponse)
	if err := c.confine(); err != nil {
		c.kill()
		return nil, fmt.Errorf("limit compile worker: %w", err)
	}
	return c, nil
}

// proc is one worker process.
type proc struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *frameReader
	words  lastWords
	ready  bool
	reap   sync.Once
	exited chan struct{}
}

// confine sets the limits that do not depend on the tree: no files, no core, few
// descriptors.
func (c *proc) confine() error {
	pid := c.cmd.Process.Pid
	for resource, limit := range map[int]uint64{unix.RLIMIT_FSIZE: 0, unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: 32} {
		if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
			return err
		}
	}
	return nil
}

// bound sets the limits of one evaluation. RLIMIT_DATA counts all writable private
// memory, which is where Go's heap and stacks are, from the moment it is mapped: the
// kernel refuses more, also within one allocation. RLIMIT_CPU is for a parent that
// cannot kill any more.
func (c *proc) bound(opts Options) error {
	pid := c.cmd.Process.Pid
	memory := uint64(max(opts.Memory, minMemory))
	cpu := uint64(opts.Timeout/time.Second+1) * uint64(runtime.NumCPU())
	for resource, limit := range map[int]uint64{unix.RLIMIT_DATA: memory, unix.RLIMIT_CPU: cpu} {
		if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
			return fmt.Errorf("limit compile worker: %w", err)
		}
	}
	return nil
}

// wait reaps the process once and returns how it ended.
func (c *proc) wait() *os.ProcessState {
	c.reap.Do(func() {
		_ = c.cmd.Wait() // the state says all
		close(c.exited)
	})
	<-c.exited
	return c.cmd.ProcessState
}

// kill ends the process now and reaps it.
func (c *proc) kill() {
	_ = c.cmd.Process.Kill() // an error means that it has ended
	c.wait()
}

// alive reports whether a waiting worker can still take a tree.
func (c *proc) alive() bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, c.cmd.Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err == nil && info.Signo == 0 {
		return true
	}
	c.wait()
	return false
}

// awaitReady waits until the worker has loaded its definitions; a worker that does not
// is ended.
func (c *proc) awaitReady(ctx context.Context) error {
	if c.ready {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = c.cmd.Process.Kill() })
	defer stop()
	kind, payload, err := c.out.next()
	switch {
	case err != nil:
		c.kill()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("compile worker did not start (%s): %s", c.cmd.ProcessState, c.words.first())
	case kind != frameReady || len(payload) != 4 || binary.BigEndian.Uint32(payload) != wireVersion:
		c.kill()
		return errors.New("compile worker speaks another version; this program was replaced: restart it")
	}
	c.ready = true
	return nil
}

// folderResult is what a worker found in a folder.
type folderResult struct {
	results []*packageResult
	size    int64
}

// run sends the tree and reads the results. It always ends the worker.
func (c *proc) run(ctx context.Context, t *tree, opts Options, dirs []string) (map[string]folderResult, []api.Diagnostic, error) {
	defer c.kill()
	stop := context.AfterFunc(ctx, func() { _ = c.cmd.Process.Kill() })
	defer stop()
	if err := c.awaitReady(ctx); err != nil {
		return nil, nil, err
	}
	if err := c.bound(opts); err != nil {
		return nil, nil, err
	}
	sent := make(chan error, 1)
	go func() { sent <- c.send(t, opts, dirs) }()
	results, current, err := c.receive()
	if err != nil {
		c.kill() // also ends a send under way
	}
	sendErr := <-sent
	if err == nil {
		return results, nil, sendErr
	}
	limit, explained := c.limit(ctx, opts, err)
	if !explained {
		return nil, nil, limit
	}
	pos := api.Position{File: current}
	if files := t.dirs[current]; len(files) == 1 {
		pos.File = current + "/" + files[0]
	}
	pos.File = strings.TrimPrefix(pos.File, "./")
	return results, []api.Diagnostic{{
		Pos: pos, Message: limit.Error(), Hint: "look for a recursion, a comprehension or a text that grows too fast",
	}}, nil
}

// send writes the request.
func (c *proc) send(t *tree, opts Options, dirs []string) error {
	w := newFrameWriter(c.in)
	err := w.encode(frameOptions, wireOptions{Memory: max(opts.Memory, minMemory), Dirs: dirs})
	for dir, names := range t.dirs {
		for _, base := range names {
			name := base
			if dir != "." {
				name = dir + "/" + base
			}
			err = errors.Join(err, w.encode(frameFile, wireFile{Name: name, Data: t.files[name]}))
		}
	}
	err = errors.Join(err, w.write(frameEnd, nil), w.w.Flush(), c.in.Close())
	if err != nil {
		return fmt.Errorf("send tree to compile worker: %w", err)
	}
	return nil
}

// receive reads results until the end. current is the folder under way when it broke.
func (c *proc) receive() (results map[string]folderResult, current string, err error) {
	results = map[string]folderResult{}
	for {
		kind, payload, err := c.out.next()
		if err != nil {
			return results, current, err
		}
		switch kind {
		case frameBegin:
			current = string(payload)
		case frameResult:
			var packages []wirePackage
			if err := decMode.Unmarshal(payload, &packages); err != nil {
				return results, current, fmt.Errorf("%w: %w", errFrame, err)
			}
			r := folderResult{size: int64(len(payload)) * 4}
			for _, w := range packages {
				p, err := fromWire(w)
				if err != nil {
					return results, current, err
				}
				r.results = append(r.results, p)
			}
			results[current] = r
		case frameEnd:
			return results, current, nil
		default:
			return results, current, errFrame
		}
	}
}

// limit says which limit ended the worker; explained is false if it was something
// else, and the error says what.
func (c *proc) limit(ctx context.Context, opts Options, err error) (_ error, explained bool) {
	state, words := c.wait(), c.words.String()
	memory := max(opts.Memory, minMemory)
	signal := syscall.Signal(-1)
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		signal = ws.Signal()
	}
	switch {
	case errors.Is(context.Cause(ctx), errTimeout), signal == syscall.SIGXCPU:
		return fmt.Errorf("the evaluation takes longer than the limit of %v", opts.Timeout), true
	case ctx.Err() != nil:
		return context.Cause(ctx), false
	case errors.Is(err, errLarge):
		return fmt.Errorf("the result of the evaluation is larger than the limit of %d MiB", maxFrame>>20), true
	case strings.Contains(words, "stack exceeds") || strings.Contains(words, "stack overflow"):
		return fmt.Errorf("the evaluation is nested too deeply: its stack is over the limit of %d MiB", workerMaxStack>>20), true
	case state.ExitCode() == exitMemory, strings.Contains(words, "out of memory"), strings.Contains(words, "cannot allocate memory"):
		return fmt.Errorf("the evaluation needs more memory than the limit of %d MiB", memory>>20), true
	}
	return fmt.Errorf("compile worker ended (%s): %w: %s", state, err, c.words.first()), false
}

// lastWords keeps the beginning of what a worker writes on stderr.
type lastWords struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer; it never fails, so that the worker is not held up.
func (t *lastWords) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := maxWords - t.buf.Len(); room > 0 {
		t.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (t *lastWords) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// first is the first line, which in a crash of Go says why.
func (t *lastWords) first() string {
	line, _, _ := strings.Cut(t.String(), "\n")
	return line
}
