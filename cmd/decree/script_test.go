package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/raftstore/client"
)

// tests are all of them, and what is to be removed after them.
type tests struct{ *testing.M }

// Run implements testscript.TestingM.
func (t tests) Run() int {
	code := t.M.Run()
	os.RemoveAll(builtOnce.dir)
	return code
}

// TestMain makes this test binary the commands that the scripts call.
func TestMain(m *testing.M) {
	testscript.Main(tests{m}, map[string]func(){"decree": main, "git-remote-decree": main})
}

// TestScripts runs the command line as a user would: testdata/script/*.txtar. A
// script that starts a control plane has its own, without an agent, on a free port.
func TestScripts(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "decree-script-") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		WorkdirRoot:         dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			for name, value := range map[string]string{
				"DECREE_DATA": filepath.Join(env.WorkDir, "data"), "DECREE_KUBECONFIG": "",
				"HOME": env.WorkDir, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0",
				"GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.com",
				"GIT_COMMITTER_NAME": "Ada", "GIT_COMMITTER_EMAIL": "ada@example.com",
			} {
				env.Setenv(name, value)
			}
			env.Values[processes{}] = &processes{}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": status, "cluster": cluster, "ended": ended, "watch": watch, "await": await, "request": request, "occupy": occupy,
		},
	})
}

// status runs a command and checks its exit status: "status 2 decree get".
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status CODE COMMAND [ARG...]")
	}
	code := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		code = exit.ExitCode()
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit status %d, want %s", code, args[0])
	}
}

// process is a command that runs beside a script.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended; err is set before
	err   error
	more  chan string // its lines, standard error too
	seen  []string
}

// beside starts decree with the environment of the script; it is stopped when the
// script ends.
func beside(ts *testscript.TestScript, args ...string) *process {
	dirs := filepath.SplitList(ts.Getenv("PATH"))
	i := slices.IndexFunc(dirs, func(dir string) bool { _, err := os.Stat(filepath.Join(dir, "decree")); return err == nil })
	p := &process{cmd: exec.Command(filepath.Join(dirs[max(0, i)], "decree"), args...), ended: make(chan struct{}), more: make(chan string, 1024)}
	p.cmd.Dir = ts.MkAbs(".")
	for _, k := range []string{"PATH", "HOME", "DECREE_DATA"} {
		p.cmd.Env = append(p.cmd.Env, k+"="+ts.Getenv(k))
	}
	r, w := io.Pipe()
	p.cmd.Stdout, p.cmd.Stderr = w, w
	ts.Check(p.cmd.Start())
	go func() {
		defer close(p.more)
		for s := bufio.NewScanner(r); s.Scan(); {
			p.more <- s.Text()
		}
	}()
	go func() {
		p.err = p.cmd.Wait()
		w.Close()
		close(p.ended)
	}()
	ts.Defer(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		for range p.more { // until it has ended
		}
		<-p.ended
	})
	return p
}

// until reads output up to the first line that matches, and returns that line.
func (p *process) until(ts *testscript.TestScript, pattern *regexp.Regexp) string {
	deadline := time.After(30 * time.Second)
	for {
		select {
		case line, ok := <-p.more:
			if !ok {
				<-p.ended
				ts.Fatalf("%v ended (%v) before it printed %q:\n%s", p.cmd.Args, p.err, pattern, strings.Join(p.seen, "\n"))
			}
			p.seen = append(p.seen, line)
			if pattern.MatchString(line) {
				return line
			}
		case <-deadline:
			ts.Fatalf("%v did not print %q:\n%s", p.cmd.Args, pattern, strings.Join(p.seen, "\n"))
		}
	}
}

// evidence ends the process with a trace of its goroutines and returns all that it
// has printed.
func (p *process) evidence() string {
	if p == nil {
		return ""
	}
	_ = p.cmd.Process.Signal(syscall.SIGQUIT)
	for line := range p.more {
		p.seen = append(p.seen, line)
	}
	return strings.Join(p.seen, "\n")
}

// processes are what a script has started: its control plane and its watch.
type processes struct{ up, watch *process }

func started(ts *testscript.TestScript) *processes { return ts.Value(processes{}).(*processes) }

// cluster starts a control plane and waits until it is ready: "cluster [FLAG...]".
// $PORT is where it listens, $PID its process.
func cluster(ts *testscript.TestScript, _ bool, args []string) {
	p := beside(ts, append([]string{"up", "--agent=false", "--address", "127.0.0.1:0"}, args...)...)
	ready := regexp.MustCompile(`^ready in .* repository decree://127\.0\.0\.1:(\d+)/cluster$`)
	ts.Setenv("PORT", ready.FindStringSubmatch(p.until(ts, ready))[1])
	ts.Setenv("PID", fmt.Sprint(p.cmd.Process.Pid))
	started(ts).up = p
}

// ended waits until the control plane has ended without an error.
func ended(ts *testscript.TestScript, _ bool, _ []string) {
	p := started(ts).up
	select {
	case <-p.ended:
		ts.Check(p.err)
	case <-time.After(30 * time.Second):
		ts.Fatalf("decree up still runs")
	}
}

// watch starts a command that goes on, or checks the next line of it:
// "watch decree events -w", "watch -line PATTERN".
func watch(ts *testscript.TestScript, _ bool, args []string) {
	if args[0] == "-line" {
		if line := started(ts).watch.until(ts, regexp.MustCompile("")); !regexp.MustCompile(args[1]).MatchString(line) {
			ts.Fatalf("the next line is %q, want %q", line, args[1])
		}
		return
	}
	started(ts).watch = beside(ts, args[1:]...)
}

// await repeats a command until its output matches: "await PATTERN COMMAND...". It
// is for what controllers do some time after a push.
func await(ts *testscript.TestScript, _ bool, args []string) {
	pattern := regexp.MustCompile(args[0])
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) { // a command line has no event
		if err := ts.Exec(args[1], args[2:]...); err == nil && pattern.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("the output did not come to match %q; the control plane's log and goroutines:\n%s", pattern, started(ts).up.evidence())
		}
	}
}

// request sends a request to the API as the administrator: "request DELETE PATH".
func request(ts *testscript.TestScript, neg bool, args []string) {
	cfg, err := client.FromKubeconfig(daemon.Kubeconfig(ts.Getenv("DECREE_DATA")))
	ts.Check(err)
	c, err := client.New(cfg)
	ts.Check(err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var body []byte
	if len(args) > 2 {
		body = []byte(ts.ReadFile(args[2]))
	}
	data, err := c.Raw(ctx, args[0], args[1], nil, "application/json", body)
	_, _ = ts.Stdout().Write(data)
	if err != nil {
		fmt.Fprintln(ts.Stderr(), err)
	}
	if (err != nil) != neg {
		ts.Fatalf("%s %s: %v", args[0], args[1], err)
	}
}

// occupy listens on a free port, $TAKEN, until the script ends.
func occupy(ts *testscript.TestScript, _ bool, _ []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	_, port, err := net.SplitHostPort(l.Addr().String())
	ts.Check(err)
	ts.Setenv("TAKEN", port)
}
