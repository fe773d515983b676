package containerd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"decree.dev/decree/reconciler/agent"
)

func TestExecStreams(t *testing.T) {
	r := newRuntime(t)
	ids := start(t, r, pod("sleep 1000"))
	var out, errOut bytes.Buffer
	code, err := r.Exec(t.Context(), ids[0], agent.ExecConfig{
		Command: []string{"sh", "-c", "cat; echo problem >&2; exit 4"}, Stdin: strings.NewReader("typed"), Stdout: &out, Stderr: &errOut,
	})
	if err != nil || code != 4 || out.String() != "typed" || errOut.String() != "problem\n" {
		t.Errorf("exec: %d, %v, %q, %q", code, err, out.String(), errOut.String())
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	out.Reset()
	code, err = r.Exec(t.Context(), ids[0], agent.ExecConfig{Command: []string{"cat"}, Stdin: bytes.NewReader(big), Stdout: &out})
	if err != nil || code != 0 || !bytes.Equal(out.Bytes(), big) {
		t.Errorf("1 MiB through cat: %d, %v, %d bytes", code, err, out.Len())
	}
	out.Reset()
	if code, err = r.Exec(t.Context(), ids[0], agent.ExecConfig{Command: []string{"cat"}, Stdin: strings.NewReader(""), Stdout: &out}); err != nil || code != 0 || out.Len() != 0 {
		t.Errorf("empty stdin: %d, %v", code, err)
	}
}

func TestExecTerminal(t *testing.T) {
	r := newRuntime(t)
	ids := start(t, r, pod("sleep 1000"))
	rd, wr := io.Pipe()
	resize := make(chan agent.TerminalSize, 1)
	resize <- agent.TerminalSize{Width: 132, Height: 43}
	out := &seen{text: "43 132", found: func() { go io.WriteString(wr, "exit 11\n") }}
	go io.WriteString(wr, "test -t 0 && echo is-terminal; while ! stty size | grep '43 132'; do sleep 0.02; done\n")
	code, err := r.Exec(t.Context(), ids[0], agent.ExecConfig{
		Command: []string{"sh"}, TTY: true, Stdin: rd, Stdout: out, Resize: resize, Timeout: 20 * time.Second,
	})
	wr.Close()
	if err != nil || code != 11 || !strings.Contains(out.buf.String(), "is-terminal") {
		t.Errorf("shell in a terminal: %d, %v, %q", code, err, out.buf.String())
	}
	// A program that asks when it starts is told a size that arrives a little later than the
	// request.
	said := make(chan agent.TerminalSize)
	time.AfterFunc(firstSize/2, func() { said <- agent.TerminalSize{Width: 99, Height: 33} })
	var size bytes.Buffer
	if code, err = r.Exec(t.Context(), ids[0], agent.ExecConfig{Command: []string{"stty", "size"}, TTY: true, Stdout: &size, Resize: said}); err != nil || code != 0 || strings.TrimSpace(size.String()) != "33 99" {
		t.Errorf("the size at the start: %d, %v, %q", code, err, size.String())
	}
	// Nobody has to say one.
	if code, err = r.Exec(t.Context(), ids[0], agent.ExecConfig{Command: []string{"true"}, TTY: true, Stdout: &size, Resize: said}); err != nil || code != 0 {
		t.Errorf("without a size: %d, %v", code, err)
	}
}

func TestExecIsKilled(t *testing.T) {
	r := newRuntime(t)
	ids := start(t, r, pod("sleep 1000"))
	_, err := r.Exec(t.Context(), ids[0], agent.ExecConfig{Command: []string{"sleep", "12345"}, Timeout: 200 * time.Millisecond})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("timeout: %v", err)
	}
	if out, _ := execOut(t, r, ids[0], "sh", "-c", "cat /proc/[0-9]*/cmdline | grep -c 12345"); strings.TrimSpace(out) != "1" {
		t.Errorf("the killed process is still there: %s (1 is the grep)", out)
	}
	if _, err = r.Exec(t.Context(), ids[0], agent.ExecConfig{Command: []string{"no-such-program"}}); !errors.Is(err, agent.ErrInvalidContainer) {
		t.Errorf("missing program: %v", err)
	}
	// A grandchild that holds the output open does not hold up the answer.
	begin := time.Now()
	if out, code := execOut(t, r, ids[0], "sh", "-c", "sleep 100 & echo done"); out != "done\n" || code != 0 || time.Since(begin) > 10*time.Second {
		t.Errorf("with a grandchild: %q, %d after %s", out, code, time.Since(begin))
	}
}

func TestStartErrors(t *testing.T) {
	r := newRuntime(t)
	p := pod("")
	createSandbox(t, r, p)
	cfg := containerConfig(p, 0, 0)
	cfg.Args = []string{"/no/such/program"}
	id, err := r.CreateContainer(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.StartContainer(t.Context(), id); !errors.Is(err, agent.ErrInvalidContainer) || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("missing program: %v", err)
	}
	if c := find(t, r, id); c.State != agent.Created {
		t.Errorf("after a start that failed: %+v", c)
	}
	if err := r.RemoveContainer(t.Context(), id); err != nil {
		t.Error(err)
	}
}
