// Package process runs the servers that benchmarks measure, as processes of their own, and
// reads what they use. It is for Linux.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Process is one that runs until it is stopped.
type Process struct {
	Name   string
	cmd    *exec.Cmd
	output bytes.Buffer
	ended  chan struct{}
}

// Start runs a command; it has to be stopped. env is added to the caller's.
func Start(ctx context.Context, name string, env []string, argv ...string) (*Process, error) {
	p := &Process{Name: name, cmd: exec.CommandContext(ctx, argv[0], argv[1:]...), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { _ = p.cmd.Wait(); close(p.ended) }()
	return p, nil
}

// Await calls try from time to time until it returns nil, for 30 seconds at most, or until
// the process or ctx ends.
func (p *Process) Await(ctx context.Context, try func(context.Context) error) error {
	var err error
	for range 300 {
		if err = try(ctx); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.ended:
			return fmt.Errorf("%s ended: %s", p.Name, strings.TrimSpace(p.output.String()))
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Errorf("%s does not answer: %w", p.Name, err)
}

// Stop ends the process and waits for it.
func (p *Process) Stop() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// CPU is the processor time that the process has used so far.
func (p *Process) CPU() (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(text, []byte(") ")) // the name may have blanks
	f := strings.Fields(string(rest))
	if len(f) < 13 {
		return 0, errors.New("/proc: unknown format")
	}
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	return time.Duration(user+system) * time.Second / 100, errors.Join(err1, err2) // USER_HZ is 100 everywhere
}

// Memory is the process's resident memory in MiB.
func (p *Process) Memory() (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	f := strings.Fields(rest)
	if len(f) == 0 {
		return 0, errors.New("/proc: no VmRSS")
	}
	kib, err := strconv.Atoi(f[0])
	return float64(kib) / 1024, err
}

// FreePort is one on loopback that nobody listens on, by TCP and UDP.
func FreePort() (int, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	pc, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		return 0, err
	}
	return ln.Addr().(*net.TCPAddr).Port, pc.Close()
}
