// Package vm runs test binaries inside a stock Debian kernel, booted in qemu, for
// what the kernel of this machine lacks: IPVS, dummy links, WireGuard.
//
// It needs qemu and the unpacked kernel package, both of which the task setup-test
// brings. Nothing of this machine is in reach of the machine inside: it has no disk
// and no network, only a file system in memory.
package vm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Config says what to run. Binary has to be set.
type Config struct {
	// Binary is a static executable for linux/amd64; it runs as root, with loopback up
	// and the modules at hand.
	Binary string
	Args   []string
	// Env is added to the few variables that there are, as "KEY=value".
	Env []string
	// Files are executables of this machine that Binary runs, by absolute path.
	Files []string
	// Modules can be loaded, with all they depend on: by the kernel itself when it
	// misses one, as on any host.
	Modules []string
	// Memory is in MiB, zero: 1024. CPUs, zero: 2.
	Memory, CPUs int
	// Timeout is how long all of it may take; zero: DefaultTimeout.
	Timeout time.Duration
	// Console takes what the kernel and Binary print; nil: nobody.
	Console io.Writer
}

// DefaultTimeout is the hard limit unless told otherwise.
const DefaultTimeout = 3 * time.Minute

// marker begins the line by which the machine tells the exit status.
const marker = "decree-vm: exit status "

// ErrMissing is what errors match when qemu or the kernel are not there.
var ErrMissing = errors.New("run: go tool task setup-test")

// Run boots the kernel, runs the binary and returns its exit status. An error means
// that there is no status: the machine did not boot, did not end in time (the error
// matches context.DeadlineExceeded), or ctx ended. Nothing is left running.
func Run(ctx context.Context, cfg Config) (int, error) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return 0, fmt.Errorf("virtual machine: %w; %w", err, ErrMissing)
	}
	k, err := findKernel()
	if err != nil {
		return 0, fmt.Errorf("virtual machine: %w", err)
	}
	dir, err := os.MkdirTemp("", "decree-vm-")
	if err != nil {
		return 0, fmt.Errorf("virtual machine: %w", err)
	}
	defer os.RemoveAll(dir)
	initramfs := filepath.Join(dir, "initramfs")
	if err := k.initramfs(initramfs, &cfg); err != nil {
		return 0, fmt.Errorf("virtual machine: %w", err)
	}
	timeout := cfg.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, arguments(k.image, initramfs, &cfg)...)
	cmd.WaitDelay = 5 * time.Second
	return run(ctx, cmd, cfg.Console)
}

// arguments are those of qemu. KVM is not used: where it works the machine is only
// faster, and where it only seems to work (some clouds) the machine hangs.
func arguments(kernel, initramfs string, cfg *Config) []string {
	memory, cpus := cfg.Memory, cfg.CPUs
	if memory == 0 {
		memory = 1024
	}
	if cpus == 0 {
		cpus = 2
	}
	return []string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", kernel, "-initrd", initramfs,
		"-append", "console=ttyS0 panic=-1 quiet mitigations=off random.trust_cpu=on",
	}
}

// run follows the console until the machine is off.
func run(ctx context.Context, cmd *exec.Cmd, console io.Writer) (int, error) {
	if console == nil {
		console = io.Discard
	}
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, fmt.Errorf("virtual machine: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("virtual machine: %w", err)
	}
	status, known, last, readErr := follow(out, console)
	waitErr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return 0, fmt.Errorf("virtual machine stopped, its last words were %q: %w", last, context.Cause(ctx))
	case known:
		return status, nil
	}
	return 0, fmt.Errorf("virtual machine ended without an exit status, its last words were %q: %w", last,
		errors.Join(readErr, waitErr, errors.New("qemu: "+strings.TrimSpace(complaints.String()))))
}

// follow copies a console, and picks out the exit status and the last line.
func follow(console io.Reader, to io.Writer) (status int, known bool, last string, err error) {
	r := bufio.NewReader(console)
	for {
		line, err := r.ReadString('\n')
		text := strings.TrimRight(line, "\r\n")
		if i := strings.Index(text, marker); i >= 0 {
			n, err := strconv.Atoi(text[i+len(marker):])
			status, known, text = n, err == nil, text[:i]
		}
		if text != "" {
			last = text
			if _, err := fmt.Fprintln(to, text); err != nil {
				to = io.Discard // the machine must not wait for a reader that is gone
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
			return status, known, last, nil
		}
		if err != nil {
			return status, known, last, fmt.Errorf("read console: %w", err)
		}
	}
}
