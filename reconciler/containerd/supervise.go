package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoContainerd means that the containerd program is not installed.
var ErrNoContainerd = errors.New("containerd is not installed (run: apt-get install containerd runc)")

const (
	restartMin = 100 * time.Millisecond
	restartMax = 10 * time.Second
	// steadyAfter is how long containerd must have run for its next restart to
	// start again at restartMin.
	steadyAfter = 30 * time.Second
)

// SupervisorConfig says where a containerd of our own lives.
type SupervisorConfig struct {
	Dir    string // root: content, snapshots and metadata; created when missing
	RunDir string // state and sockets; short, because a socket path holds 107 bytes
	Binary string // empty: containerd from PATH
	Logger *slog.Logger
}

// Supervisor keeps one containerd running. It outlives the supervisor: it runs in
// its own session, and a later supervisor of the same RunDir adopts it.
type Supervisor struct {
	cfg    SupervisorConfig
	cancel context.CancelFunc
	done   chan struct{}
	lock   *os.File

	mu   sync.Mutex
	proc *process // nil while containerd is down
}

// Supervise starts containerd, or adopts the one that runs, and restarts it with
// backoff when it ends. It does not wait until containerd answers: see WaitReady.
// It stops supervising, and leaves containerd alone, when ctx ends or on Close.
// A second supervisor of the same RunDir is refused.
func Supervise(ctx context.Context, cfg SupervisorConfig) (*Supervisor, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{cfg.Dir, cfg.RunDir, filepath.Join(cfg.Dir, "root")} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("supervise containerd: %w", err)
		}
	}
	lock, err := lockFile(filepath.Join(cfg.RunDir, "supervisor.lock"))
	if err != nil {
		return nil, fmt.Errorf("supervise containerd in %s: %w", cfg.RunDir, err)
	}
	proc, err := adoptOrStart(ctx, cfg)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("supervise containerd in %s: %w", cfg.RunDir, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &Supervisor{cfg: cfg, cancel: cancel, done: make(chan struct{}), lock: lock, proc: proc}
	go s.run(ctx, proc)
	return s, nil
}

func (cfg SupervisorConfig) withDefaults() (SupervisorConfig, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Binary == "" {
		path, err := exec.LookPath("containerd")
		if err != nil {
			return cfg, ErrNoContainerd
		}
		cfg.Binary = path
	}
	if n := len(cfg.address() + ".ttrpc"); n > 107 {
		return cfg, fmt.Errorf("socket path %s.ttrpc has %d bytes, more than the 107 a socket path may have: choose a shorter run folder", cfg.address(), n)
	}
	return cfg, nil
}

func (cfg SupervisorConfig) address() string    { return filepath.Join(cfg.RunDir, "containerd.sock") }
func (cfg SupervisorConfig) configFile() string { return filepath.Join(cfg.RunDir, "containerd.toml") }
func (cfg SupervisorConfig) logFile() string    { return filepath.Join(cfg.Dir, "containerd.log") }
func (cfg SupervisorConfig) stateDir() string   { return filepath.Join(cfg.RunDir, "state") }

// Address is the path of containerd's socket, known before containerd answers.
func (s *Supervisor) Address() string { return s.cfg.address() }

// Pid is the process id of the supervised containerd; 0 while it is down.
func (s *Supervisor) Pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc == nil {
		return 0
	}
	return s.proc.pid
}

func (s *Supervisor) set(proc *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proc = proc
}

// WaitReady returns once containerd's socket accepts connections.
func (s *Supervisor) WaitReady(ctx context.Context) error {
	if err := waitSocket(ctx, s.cfg.address()); err != nil {
		return fmt.Errorf("wait for containerd at %s (its log: %s): %w", s.cfg.address(), s.cfg.logFile(), err)
	}
	return nil
}

// Close ends the supervision and leaves containerd running.
func (s *Supervisor) Close() error {
	s.cancel()
	<-s.done
	return nil
}

// Stop ends the supervision and terminates containerd. Containers keep running,
// held by their shims.
func (s *Supervisor) Stop(ctx context.Context) error {
	s.cancel()
	<-s.done
	if err := StopContainerd(ctx, s.cfg); err != nil {
		return err
	}
	if s.proc != nil && s.proc.cmd != nil {
		_ = s.proc.cmd.Wait() // reaps it; its exit status is that of our signal
	}
	return nil
}

// run waits for the process to end and starts the next one.
func (s *Supervisor) run(ctx context.Context, proc *process) {
	defer close(s.done)
	defer s.lock.Close()
	delay, since := restartMin, time.Now()
	for {
		if proc != nil {
			err := proc.wait(ctx)
			if ctx.Err() != nil {
				return
			}
			s.set(nil)
			s.cfg.Logger.Warn("containerd ended, starting it again", "pid", proc.pid, "error", err, "log", s.cfg.logFile())
			if time.Since(since) > steadyAfter {
				delay = restartMin
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
		delay = min(2*delay, restartMax)
		var err error
		if proc, err = adoptOrStart(ctx, s.cfg); err != nil {
			proc = nil
			s.cfg.Logger.Error("start containerd", "error", err)
			continue
		}
		since = time.Now()
		s.set(proc)
	}
}

// adoptOrStart returns the containerd of this RunDir, started if there is none.
func adoptOrStart(ctx context.Context, cfg SupervisorConfig) (*process, error) {
	pid, err := runningContainerd(cfg)
	if err != nil {
		return nil, err
	}
	if pid != 0 {
		p, err := adopt(pid)
		if err == nil {
			cfg.Logger.Info("adopted running containerd", "pid", pid, "address", cfg.address())
		}
		return p, err
	}
	return spawn(cfg)
}

// StopContainerd terminates the containerd of cfg.RunDir if there is one, and
// waits until it has gone. Containers keep running, held by their shims.
func StopContainerd(ctx context.Context, cfg SupervisorConfig) error {
	pid, err := runningContainerd(cfg)
	if err != nil || pid == 0 {
		return err
	}
	p, err := adopt(pid)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop containerd (pid %d): %w", pid, err)
	}
	if err := p.terminate(ctx, 10*time.Second); err != nil {
		return fmt.Errorf("stop containerd (pid %d): %w", pid, err)
	}
	os.Remove(cfg.pidFile())
	return nil
}

// WipeContainerd stops the containerd of cfg and removes everything it kept:
// mounts, images, snapshots, metadata and sockets.
func WipeContainerd(ctx context.Context, cfg SupervisorConfig) error {
	if err := StopContainerd(ctx, cfg); err != nil {
		return err
	}
	for _, dir := range []string{cfg.RunDir, cfg.Dir} {
		if err := unmountBelow(dir); err != nil {
			return err
		}
	}
	for _, path := range []string{
		cfg.stateDir(), cfg.address(), cfg.address() + ".ttrpc", cfg.configFile(), cfg.pidFile(),
		filepath.Join(cfg.RunDir, "supervisor.lock"), filepath.Join(cfg.Dir, "root"), cfg.logFile(), cfg.logFile() + ".1",
	} {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove containerd's files: %w", err)
		}
	}
	for _, dir := range []string{cfg.RunDir, cfg.Dir} {
		os.Remove(dir) // only when nothing else lives there
	}
	return nil
}
