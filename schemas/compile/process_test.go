package compile_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/compile"
)

// raceDetector is true in a build with -race.
var raceDetector bool

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == compile.WorkerVerb {
		os.Exit(compile.WorkerMain(os.Stdin, os.Stdout))
	}
	if len(os.Args) == 2 && os.Args[1] == "inspect" {
		inspect()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func newProcess(t testing.TB, cfg compile.ProcessConfig) *compile.Process {
	t.Helper()
	p, err := compile.NewProcess(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// mapFS is a tree in memory.
func mapFS(files map[string]string) fstest.MapFS {
	fsys := fstest.MapFS{}
	for name, text := range files {
		fsys[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return fsys
}

const configMap = `
c: {
	apiVersion: "v1"
	kind:       "ConfigMap"
	metadata: name: %q
	data: key: %s
}
`

// TestBombs feeds trees that would take all memory, all time or all stack. Each must
// end in a diagnostic that names the limit, and the compiler must go on to serve.
func TestBombs(t *testing.T) {
	double := func(n int) string {
		var b strings.Builder
		b.WriteString("x0: \"0123456789abcdef\"\n")
		for i := range n {
			fmt.Fprintf(&b, "x%d: \"\\(x%d)\\(x%d)\"\n", i+1, i, i)
		}
		return b.String()
	}
	chain := func(format string, n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i, i+1)
		}
		return b.String()
	}
	doubling := func(n int) string { return "x0: 1\n" + chain("x%[2]d: {a: x%[1]d, b: x%[1]d}\n", n) }
	tests := []struct {
		name, text string
		opts       compile.Options
		want       string
	}{
		{"a text of 1 GB", double(26), compile.Options{Memory: 256 << 20}, "more memory than the limit of 256 MiB"},
		{"comprehension", `
n: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
x: [for a in n for b in n for c in n for d in n for e in n for f in n for g in n for h in n for i in n {a + b}]
`, compile.Options{Memory: 128 << 20}, "limit of"},
		{"slow", `
n: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
x: [for a in n for b in n for c in n for d in n for e in n for f in n for g in n for h in n if a > 10 {a}]
`, compile.Options{Timeout: time.Second}, "longer than the limit of 1s"},
		{"shared doubling", doubling(60), compile.Options{Memory: 256 << 20, Timeout: time.Second}, "limit of"},
		{"recursion", "x0: 1\n" + chain("x%[2]d: {a: x%[1]d}\n", 100_000), compile.Options{Memory: 512 << 20, Timeout: time.Second}, "limit of"},
		{"nesting", "x: " + strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20), compile.Options{}, "maximum nesting depth"},
		{"long sum", "x0: 1\n" + chain("x%[2]d: x%[1]d + 1\n", 100_000), compile.Options{Timeout: time.Second}, "limit of"},
	}
	p := newProcess(t, compile.ProcessConfig{})
	var limit int64
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if raceDetector && tt.opts.Memory > 0 {
				t.Skip("the race detector itself needs more memory than the limit")
			}
			start := time.Now()
			r, err := p.Compile(t.Context(), mapFS(map[string]string{"sub/bomb.cue": tt.text, "good.cue": fmt.Sprintf(configMap, "c", `"v"`)}), tt.opts)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(time.Since(start), r.Diagnostics)
			limit = max(limit, tt.opts.Memory, 128<<20)
			var used syscall.Rusage // of all workers so far
			if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &used); err != nil || used.Maxrss<<10 > limit && !raceDetector {
				t.Errorf("a worker held %d MiB, the limit is %d MiB (%v)", used.Maxrss>>10, limit>>20, err)
			}
			if len(r.Diagnostics) != 1 || !strings.Contains(r.Diagnostics[0].Message, tt.want) || r.Diagnostics[0].Pos.File != "sub/bomb.cue" {
				t.Errorf("diagnostics = %v, want one in sub/bomb.cue with %q", r.Diagnostics, tt.want)
			}
			if r.Objects != nil {
				t.Error("objects beside a diagnostic")
			}
		})
	}
	r, err := p.Compile(t.Context(), os.DirFS("../../examples/hello"), compile.Options{})
	if err != nil || len(r.Diagnostics) > 0 || len(r.Objects) != 3 {
		t.Fatalf("after the bombs: %v, %v, %d objects", err, r.Diagnostics, len(r.Objects))
	}
}

func TestCanceled(t *testing.T) {
	p := newProcess(t, compile.ProcessConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := p.Compile(ctx, mapFS(map[string]string{"a.cue": "a: 1"}), compile.Options{})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error = %v, want context.Canceled", err)
	}
}

// inspect writes what a worker process sees of the world.
func inspect() {
	var files []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(target, "/") && !ownFiles.MatchString(target) {
			files = append(files, target)
		}
	}
	dir, _ := os.Getwd()
	var death int32
	_, _, _ = unix.Syscall6(unix.SYS_PRCTL, unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&death)), 0, 0, 0, 0)
	nice, _ := syscall.Getpriority(syscall.PRIO_PROCESS, 0) // the kernel counts from 20 down
	fmt.Fprintf(os.Stderr, "env=%d files=%v dir=%s death=%d nice=%d\n", len(os.Environ()), files, dir, death, 20-nice)
}

// ownFiles are what Go's runtime opens by itself.
var ownFiles = regexp.MustCompile("^(/dev/null|/proc/.*|/sys/fs/cgroup/.*)$")

// TestConfined looks at a worker from inside.
func TestConfined(t *testing.T) {
	t.Setenv("DECREE_SECRET", "hunter2")
	f, err := os.Open("process_test.go") // must not be inherited
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := newProcess(t, compile.ProcessConfig{Command: []string{os.Args[0], "inspect"}})
	_, err = p.Compile(t.Context(), mapFS(map[string]string{"a.cue": "a: 1"}), compile.Options{})
	if want := "env=0 files=[] dir=/ death=9 nice=5"; err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("worker says %v, want %q", err, want)
	}
}

// TestCache counts what is evaluated when a part of a tree changes.
func TestCache(t *testing.T) {
	p := newProcess(t, compile.ProcessConfig{Idle: -1})
	files := map[string]string{
		"cue.mod/module.cue": "module: \"example.com/m@v0\"\nlanguage: version: \"v0.17.0\"\n",
		"lib/lib.cue":        "package lib\n\nv: \"1\"\n",
		"a/a.cue":            "package a\n\nimport \"example.com/m/lib\"\n" + fmt.Sprintf(configMap, "a", "lib.v"),
		"b/b.cue":            "package b\n" + fmt.Sprintf(configMap, "b", `"x"`),
		"b/c.cue":            fmt.Sprintf(configMap, "c", `"x"`),
		"shared.cue":         "package d\n\n_x: \"1\"\n",
		"d/d.cue":            "package d\n" + fmt.Sprintf(configMap, "d", "_x"),
	}
	steps := []struct {
		name, file, text          string
		evaluated, cached, starts int
		value                     string // of the key in ConfigMap a
	}{
		{"first", "", "", 6, 0, 1, "1"},
		{"nothing changed", "", "", 0, 6, 1, "1"},
		{"one package", "b/b.cue", "package b\n" + fmt.Sprintf(configMap, "b", `"y"`), 2, 4, 2, "1"},
		{"an import", "lib/lib.cue", "package lib\n\nv: \"2\"\n", 2, 4, 3, "2"},
		{"a file of the package above", "shared.cue", "package d\n\n_x: \"2\"\n", 2, 4, 4, "2"},
		{"back again", "lib/lib.cue", "package lib\n\nv: \"1\"\n", 0, 6, 4, "1"},
		{"the module", "cue.mod/module.cue", "module: \"example.com/m@v0\"\nlanguage: version: \"v0.16.0\"\n", 6, 0, 5, "1"},
	}
	for _, s := range steps {
		if s.file != "" {
			files[s.file] = s.text
		}
		r, err := p.Compile(t.Context(), mapFS(files), compile.Options{})
		if err != nil || len(r.Diagnostics) > 0 {
			t.Fatal(s.name, err, r.Diagnostics)
		}
		if r.Evaluated != s.evaluated || r.Cached != s.cached || p.Started() != int64(s.starts) {
			t.Errorf("%s: evaluated %d, cached %d with %d workers; want %d, %d, %d", s.name, r.Evaluated, r.Cached, p.Started(), s.evaluated, s.cached, s.starts)
		}
		if len(r.Objects) != 4 {
			t.Fatalf("%s: %d objects", s.name, len(r.Objects))
		}
		for _, o := range r.Objects {
			c := o.Object.(*corev1.ConfigMap)
			if c.Name == "a" && c.Data["key"] != s.value {
				t.Errorf("%s: a = %q, want %q", s.name, c.Data["key"], s.value)
			}
			c.Data["key"] = "changed by the caller" // must not reach the cache
		}
	}
}

// TestSameAsInProcess compares what comes over the wire with what Evaluate says.
func TestSameAsInProcess(t *testing.T) {
	p := newProcess(t, compile.ProcessConfig{})
	names, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		archive, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files := map[string]string{}
		for _, f := range archive.Files {
			files[f.Name] = string(f.Data)
		}
		want, err := compile.Evaluate(t.Context(), mapFS(files), compile.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // evaluated, then cached
			got, err := p.Compile(t.Context(), mapFS(files), compile.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if describe(got) != describe(want) {
				t.Errorf("%s: got\n%s\nwant\n%s", name, describe(got), describe(want))
			}
		}
	}
}

func TestClosed(t *testing.T) {
	p := newProcess(t, compile.ProcessConfig{})
	if _, err := p.Compile(t.Context(), os.DirFS("../../examples/hello"), compile.Options{}); err != nil {
		t.Fatal(err)
	}
	p.AwaitWarm()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Compile(t.Context(), mapFS(map[string]string{"a.cue": "a: 1"}), compile.Options{}); !errors.Is(err, compile.ErrClosed) {
		t.Fatalf("error = %v, want ErrClosed", err)
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a worker is left after Close: %v", err)
	}
}

// TestConcurrent compiles several trees at once.
func TestConcurrent(t *testing.T) {
	p := newProcess(t, compile.ProcessConfig{})
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			r, err := p.Compile(t.Context(), mapFS(map[string]string{"a.cue": fmt.Sprintf(configMap, fmt.Sprintf("c%d", i), `"v"`)}), compile.Options{})
			if err != nil || len(r.Objects) != 1 || r.Objects[0].GetName() != fmt.Sprintf("c%d", i) {
				t.Error(err, r)
			}
		})
	}
	group.Wait()
}
