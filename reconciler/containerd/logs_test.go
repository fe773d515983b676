package containerd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent"
)

var everything = agent.LogOptions{TailLines: -1}

func TestLogRotation(t *testing.T) {
	r := newRuntime(t)
	r.Close()
	cfg := r.cfg
	cfg.LogMaxBytes, cfg.LogFiles = 8<<10, 3
	r = openRuntime(t, cfg)
	p := pod("for i in $(seq 1 100000); do echo line number $i; done")
	last := 0
	for line := range strings.Lines(output(t, r, p)) {
		var n int
		if _, err := fmt.Sscanf(line, "line number %d\n", &n); err != nil || n <= last {
			t.Fatalf("followed %q after line %d", line, last)
		}
		last = n // a reader that is slower than three files misses some
	}
	if last != 100000 {
		t.Errorf("the last line followed is %d", last)
	}
	files, err := filepath.Glob(filepath.Join(cfg.containerLogDir(p.UID, "c0"), "0.log*"))
	if err != nil || len(files) != 3 {
		t.Errorf("files %v, %v; want 3", files, err)
	}
	for _, f := range files {
		if st, err := os.Stat(f); err != nil || st.Size() > cfg.LogMaxBytes+100 {
			t.Errorf("%s: %v, %v", f, st, err)
		}
	}
	kept := strings.Split(strings.TrimSpace(logs(t, r, p, "c0", everything)), "\n")
	if n := len(kept); n < 250 || kept[n-1] != "line number 100000" {
		t.Errorf("kept %d lines up to %q", n, kept[n-1])
	}
	tail := logs(t, r, p, "c0", agent.LogOptions{TailLines: int64(len(kept) - 2)})
	if want := strings.Join(kept[2:], "\n") + "\n"; tail != want {
		t.Errorf("tail over several files: %d bytes, want %d", len(tail), len(want))
	}
}

// TestFollowAcrossRotation has a follower that keeps up see every line, while the
// files it reads are rotated away.
func TestFollowAcrossRotation(t *testing.T) {
	cfg, err := Config{Address: "none", Dir: t.TempDir(), LogMaxBytes: 4 << 10, LogFiles: 2}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	ps, err := newPumps(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer ps.close()
	m := meta{pod: "u", name: "c"}
	if _, err := ps.prepare(m); err != nil {
		t.Fatal(err)
	}
	raw, err := os.OpenFile(cfg.logPaths(m).stdout(), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	rd, wr := io.Pipe()
	r := &Runtime{cfg: cfg, pumps: ps}
	done := make(chan error, 1)
	go func() {
		err := r.Logs(t.Context(), m.pod, m.name, agent.LogOptions{Follow: true, TailLines: -1}, wr)
		wr.CloseWithError(err)
		done <- err
	}()
	lines := bufio.NewScanner(rd)
	for i := range 2000 {
		if i%20 == 0 {
			for j := range 20 {
				fmt.Fprintf(raw, "line %d\n", i+j)
			}
		}
		if !lines.Scan() || lines.Text() != fmt.Sprintf("line %d", i) {
			t.Fatalf("line %d is %q, %v", i, lines.Text(), lines.Err())
		}
	}
	if _, err := os.Stat(cfg.logPaths(m).old(1)); err != nil {
		t.Errorf("nothing was rotated: %v", err)
	}
	fmt.Fprint(raw, "unfinished")
	if err := ps.finish(m); err != nil {
		t.Fatal(err)
	}
	if !lines.Scan() || lines.Text() != "unfinished" || lines.Scan() || lines.Err() != nil {
		t.Errorf("at the end: %q, %v", lines.Text(), lines.Err())
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestLogParts(t *testing.T) {
	r := newRuntime(t)
	p := pod("yes x | head -n 40000 | busybox tr -d '\\n'; echo; echo second; printf unfinished")
	got := output(t, r, p)
	if want := strings.Repeat("x", 40000) + "\nsecond\nunfinished\n"; got != want {
		t.Errorf("%d bytes ending in %q, want %d", len(got), got[max(0, len(got)-30):], len(want))
	}
	if got := logs(t, r, p, "c0", agent.LogOptions{TailLines: 3}); len(got) != 40000+1+7+11 {
		t.Errorf("the parts of a line count as one: %d bytes", len(got))
	}
	if got := logs(t, r, p, "c0", agent.LogOptions{TailLines: 2}); got != "second\nunfinished\n" {
		t.Errorf("tail 2: %q", got[:min(len(got), 60)])
	}
}

func TestLogSinceAndPrevious(t *testing.T) {
	r := newRuntime(t)
	p := pod("echo early; while ! test -e /tmp/go; do sleep 0.01; done; echo late; sleep 1000")
	ids := start(t, r, p)
	followUntil(t, r, p, "early")
	mark := time.Now()
	execOut(t, r, ids[0], "sh", "-c", ">/tmp/go")
	followUntil(t, r, p, "late")
	if got := logs(t, r, p, "c0", agent.LogOptions{TailLines: -1, Since: mark}); got != "late\n" {
		t.Errorf("since: %q", got)
	}
	if err := r.SignalContainer(t.Context(), ids[0], 9); err != nil {
		t.Fatal(err)
	}
	waitExit(t, r, ids[0])
	for attempt := 1; attempt <= 3; attempt++ {
		p.Spec.Containers[0].Args = []string{fmt.Sprintf("echo attempt %d", attempt)}
		waitExit(t, r, startContainer(t, r, containerConfig(p, 0, attempt)))
	}
	if got := logs(t, r, p, "c0", agent.LogOptions{TailLines: -1, Previous: true}); got != "attempt 2\n" {
		t.Errorf("previous: %q", got)
	}
	if _, err := os.Stat(r.cfg.logPaths(meta{pod: p.UID, name: "c0", attempt: 1}).log()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the log of attempt 1 is kept at attempt 3: %v", err)
	}
}

// followUntil follows a log until text has appeared, with a reader that goes away.
func followUntil(t *testing.T, r *Runtime, p *corev1.Pod, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	w := &seen{text: text, found: cancel}
	err := r.Logs(ctx, p.UID, "c0", agent.LogOptions{TailLines: -1, Follow: true}, w)
	if !errors.Is(err, context.Canceled) || !w.has() {
		t.Fatalf("following until %q: %v", text, err)
	}
}

type seen struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	text  string
	found func()
	done  bool
}

func (s *seen) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from := max(0, s.buf.Len()-len(s.text))
	n, err := s.buf.Write(b)
	if !s.done && bytes.Contains(s.buf.Bytes()[from:], []byte(s.text)) {
		s.done = true
		s.found()
	}
	return n, err
}

func (s *seen) has() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done
}

func TestTerminalOutputIsLogged(t *testing.T) {
	r := newRuntime(t)
	p := pod("test -t 1 && echo terminal; stty size; echo err >&2")
	p.Spec.Containers[0].TTY, p.Spec.Containers[0].Stdin = true, true
	if got := strings.ReplaceAll(output(t, r, p), "\r", ""); !strings.HasPrefix(got, "terminal\n") || !strings.HasSuffix(got, "err\n") {
		t.Errorf("log of a terminal: %q", got)
	}
}

func TestOpenStdinWaits(t *testing.T) {
	r := newRuntime(t)
	p := pod("echo waiting; cat; echo closed")
	p.Spec.Containers[0].Stdin = true
	ids := start(t, r, p)
	followUntil(t, r, p, "waiting")
	if c := find(t, r, ids[0]); c.State != agent.Running {
		t.Errorf("a container with open stdin: %+v", c)
	}
}

// TestPumpCrash puts the files in the state that a crash between two writes leaves.
func TestPumpCrash(t *testing.T) {
	cfg, err := Config{Address: "none", Dir: t.TempDir(), RunDir: t.TempDir()}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	m := meta{pod: "u", name: "c"}
	paths := cfg.logPaths(m)
	if err := os.MkdirAll(paths.raw(), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(path, data string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(paths.stdout(), "one\ntwo\nthr")
	kept := "2026-01-01T00:00:00Z stdout F one\n"
	write(paths.log(), kept+"2026-01-01T00:00:00Z stdout F two\n2026-01-0")
	var state [24]byte
	binary.LittleEndian.PutUint64(state[0:], 4)
	binary.LittleEndian.PutUint64(state[16:], uint64(len(kept)))
	write(paths.state(), string(state[:]))
	p, err := openPump(paths, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer p.closeFiles()
	if err := p.move(true); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(paths.log())
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for line := range strings.Lines(string(data)) {
		_, text, _, ok := parseLine([]byte(line))
		if !ok {
			t.Errorf("broken line %q", line)
		}
		texts = append(texts, string(text))
	}
	if got := strings.Join(texts, ","); got != "one,two,thr" {
		t.Errorf("after the crash: %s", got)
	}
}

// TestPumpFrees writes a lot and looks at the space that the raw file takes.
func TestPumpFrees(t *testing.T) {
	r := newRuntime(t)
	p := pod("yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa | head -c 50000000; echo; echo end; sleep 1000")
	start(t, r, p)
	followUntil(t, r, p, "end\n")
	paths := r.cfg.logPaths(meta{pod: p.UID, name: "c0"})
	st, err := os.Stat(paths.stdout())
	if err != nil {
		t.Fatal(err)
	}
	if used := st.Sys().(*syscall.Stat_t).Blocks * 512; st.Size() < 50000000 || used > 4<<20 {
		t.Errorf("the raw file of %d bytes takes %d", st.Size(), used)
	}
}

func BenchmarkAppendLines(b *testing.B) {
	data := bytes.Repeat([]byte("a line of some length, as programs write them, of eighty bytes or so.........\n"), 800)
	now := time.Now()
	b.SetBytes(int64(len(data)))
	var out bytes.Buffer
	for b.Loop() {
		out.Reset()
		appendLines(&out, now, "stdout", data, false, 10<<20)
	}
}
