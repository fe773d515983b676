package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is one containerd process, a child of ours or an adopted one.
type process struct {
	pid   int
	pidfd *os.File
	cmd   *exec.Cmd // nil when adopted
}

// containerdConfig is read by containerd 1.6 to 2.x (configuration version 2 is
// migrated by 2.x). Switched off is what a runtime for containers on overlayfs does
// not need: it makes the start faster and keeps containerd from creating folders
// outside its own (the opt plugin) or serving addresses.
const containerdConfig = `version = 2
root = %q
state = %q
oom_score = -999
imports = []
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.sandbox.controller.v1.shim",
  "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart",
  "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.monitor.v1.cgroups", "io.containerd.monitor.task.v1.cgroups",
  "io.containerd.image-verifier.v1.bindir",
]

[grpc]
  address = %q

[ttrpc]
  address = %q

[debug]
  level = "warn"
`

// spawn runs containerd in its own session, so that it outlives us.
func spawn(cfg SupervisorConfig) (*process, error) {
	text := fmt.Sprintf(containerdConfig, filepath.Join(cfg.Dir, "root"), cfg.stateDir(), cfg.address(), cfg.address()+".ttrpc")
	if err := writeFileAtomic(cfg.configFile(), []byte(text), 0o600); err != nil {
		return nil, fmt.Errorf("write containerd's configuration: %w", err)
	}
	log, err := openContainerdLog(cfg.logFile())
	if err != nil {
		return nil, fmt.Errorf("open containerd's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(cfg.Binary, "-c", cfg.configFile())
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "PATH="+searchPath())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cfg.Binary, err)
	}
	p, err := adopt(cmd.Process.Pid)
	var id string
	if err == nil {
		id, err = identify(cmd.Process.Pid)
	}
	if err == nil {
		err = writeFileAtomic(cfg.pidFile(), []byte(id), 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch containerd: %w", err), cmd.Process.Kill(), cmd.Wait())
	}
	p.cmd = cmd
	return p, nil
}

// openContainerdLog appends to the log, moving a large one aside first.
func openContainerdLog(path string) (*os.File, error) {
	if st, err := os.Stat(path); err == nil && st.Size() > 10<<20 {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

// searchPath is PATH with the folders where Debian and the upstream archives put
// runc and the shim.
func searchPath() string {
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if !strings.Contains(":"+path+":", ":"+dir+":") {
			path = strings.TrimPrefix(path+":"+dir, ":")
		}
	}
	return path
}

// adopt takes hold of a process that is not a child of ours.
func adopt(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &process{pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// wait returns when the process has ended, and reaps it if it is a child, or when
// ctx is done; then the process is left to run.
func (p *process) wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, p.close)
	err := waitPidfd(p.pidfd)
	if !stop() {
		return ctx.Err()
	}
	p.close()
	if p.cmd != nil {
		return p.cmd.Wait()
	}
	return err
}

func (p *process) close() { p.pidfd.Close() }

// waitPidfd parks in the runtime's poller: a pidfd is readable once its process has
// ended. It returns early when the file is closed.
func waitPidfd(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll, 0)
		return err == nil && n == 1
	})
}

// terminate asks the process to end, then kills it after grace.
func (p *process) terminate(ctx context.Context, grace time.Duration) error {
	defer p.close()
	fd := int(p.pidfd.Fd())
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil {
			if errors.Is(err, unix.ESRCH) {
				return nil
			}
			return fmt.Errorf("signal %s: %w", signal, err)
		}
		if gone, err := pollEnd(ctx, fd, grace); gone || err != nil {
			return err
		}
	}
	return errors.New("the process does not end")
}

func pollEnd(ctx context.Context, fd int, grace time.Duration) (bool, error) {
	for end := time.Now().Add(grace); time.Now().Before(end); {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false, err
		}
		if n == 1 {
			return true, nil
		}
	}
	return false, nil
}

func (cfg SupervisorConfig) pidFile() string { return filepath.Join(cfg.RunDir, "containerd.pid") }

// runningContainerd returns the process id of the containerd of this RunDir, 0 when
// none runs. The socket's peer is believed first, then the pid file; both only if
// that process was started with our configuration file.
func runningContainerd(cfg SupervisorConfig) (int, error) {
	if pid, err := socketPeer(cfg.address()); err == nil {
		if !startedWith(pid, cfg.configFile()) {
			return 0, fmt.Errorf("socket %s belongs to process %d, which is not our containerd: stop it or choose another run folder", cfg.address(), pid)
		}
		return pid, nil
	}
	data, err := os.ReadFile(cfg.pidFile())
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read containerd's pid file: %w", err)
	}
	first, _, _ := strings.Cut(string(data), " ")
	pid, err := strconv.Atoi(first)
	if err != nil {
		return 0, nil // not written by us, or torn: there is no process to know
	}
	if id, err := identify(pid); err != nil || id != string(data) || !startedWith(pid, cfg.configFile()) {
		return 0, nil
	}
	return pid, nil
}

// identify returns "pid boot start": the same words never name two processes.
func identify(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return "", fmt.Errorf("process %d has ended", pid)
	}
	return fmt.Sprintf("%d %s %s", pid, bootID(), fields[19]), nil
}

// startedWith reports whether path is an argument of the process.
func startedWith(pid int, path string) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && bytes.Contains(append([]byte{0}, line...), append(append([]byte{0}, path...), 0))
}

// socketPeer returns the process that listens on a unix socket.
func socketPeer(path string) (int, error) {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	rc, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := rc.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return int(cred.Pid), nil
}

// waitSocket returns once the socket accepts a connection.
func waitSocket(ctx context.Context, path string) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}
