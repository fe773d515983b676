package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// step is one line of the README's transcript with what must be seen.
type step struct {
	line  string
	check func(t *testing.T, w *world, out string, code int)
}

// transcript is the README's, line by line. TestReadme keeps them the same.
var transcript = []step{
	{"export PATH=$PWD/bin:$PATH", ok},
	{"decree get pods", func(t *testing.T, _ *world, out string, code int) {
		ok(t, nil, out, code)
		wantRunning(t, out, 2)
	}},
	{"git clone decree://127.0.0.1:7443/cluster repo && cd repo", ok},
	{"curl http://$(decree get service hello -o jsonpath={.spec.clusterIP})/", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		w.pods = answers(t, w)
		if len(w.pods) != 2 {
			t.Errorf("answers came from pods %v, want 2 different ones", w.pods)
		}
	}},
	{"sed -i 's/replicas: 2/replicas: 4/' hello.cue && git commit -qam 'hello: four replicas' && git push", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		contains(t, out, `remote: ~ deployments.apps "default/hello"`, "2 → 4", "hello.cue:", "is in force", "healthy after")
	}},
	{"decree get pods", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		wantRunning(t, out, 4)
		if got := answers(t, w); len(got) != 4 {
			t.Errorf("answers came from pods %v, want 4 different ones", got)
		}
	}},
	{`sed -i 's/replicas: 4/replicas: "four"/' hello.cue && git commit -qam 'hello: a mistake' && git push`, func(t *testing.T, w *world, out string, code int) {
		if code == 0 {
			t.Errorf("the broken push was accepted:\n%s", out)
		}
		if !regexp.MustCompile(`remote: hello\.cue:\d+:\d+: .*replicas.*expected .*found .*four`).MatchString(out) {
			t.Errorf("the refusal does not say file:line:column, field, expected and found:\n%s", out)
		}
		contains(t, out, "refused")
		wantRunning(t, w.must(t, "decree get pods"), 4)
	}},
	{"git reset -q --hard HEAD~1", ok},
	{"kill -9 $(pidof -s hello)", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		w.eventually(t, "decree get pods", func(out string) bool { return restarts(out) == 1 && running(out) == 4 })
	}},
	{"decree describe pods", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		contains(t, out, "137", "SIGKILL", "Restart Count:")
	}},
	{"decree events", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		contains(t, out, "137")
	}},
	{"git revert --no-edit HEAD && git push", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		contains(t, out, "4 → 2")
		w.eventually(t, "decree get pods", func(out string) bool { return running(out) == 2 && lines(out) == 2 })
	}},
	{"git rm -q hello.cue && git commit -qm 'hello: remove it' && git push", func(t *testing.T, w *world, out string, code int) {
		ok(t, w, out, code)
		contains(t, out, `remote: - deployments.apps "default/hello"`, `remote: - services "default/hello"`)
		w.eventually(t, "decree get pods", func(out string) bool { return lines(out) == 0 })
	}},
}

// restartAfter is the transcript's line after which `decree up` is stopped and
// started again, as the README says in words.
const restartAfter = "decree events"

// TestTranscript runs what the README promises: a real git client, containerd and
// kernel tables, in a network namespace of its own.
func TestTranscript(t *testing.T) {
	w := newWorld(t)
	w.up(t)
	for _, s := range transcript {
		out, code := w.run(t, s.line)
		t.Logf("$ %s\n%s", s.line, out)
		s.check(t, w, out, code)
		if t.Failed() {
			t.Fatalf("stopped at: %s\nlog of decree up:\n%s", s.line, w.log())
		}
		if s.line == restartAfter {
			w.restart(t)
		}
	}
	w.stop(t)
	if busy := w.machine(t); busy == w.before {
		t.Error("the description of the machine does not see a running cluster: it cannot show that nothing is left")
	}
	if out := w.must(t, "decree down --purge"); strings.Contains(out, "level=") {
		t.Errorf("down complains: %s", out)
	}
	w.nothingLeft(t)
}

// TestReadme keeps the transcript and the README the same.
func TestReadme(t *testing.T) {
	data, err := os.ReadFile(root + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(data), "<!-- transcript")
	_, rest, fenced := strings.Cut(rest, "```sh\n")
	block, _, closed := strings.Cut(rest, "```")
	if !found || !fenced || !closed {
		t.Fatal("README.md has no transcript block")
	}
	var want []string
	for _, s := range transcript {
		want = append(want, s.line)
	}
	var got []string
	for line := range strings.Lines(block) {
		line, _, _ = strings.Cut(strings.TrimRight(line, "\n"), "  # ")
		if line = strings.TrimSpace(line); line != "" {
			got = append(got, line)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("README.md shows\n%s\nthe test runs\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// world is one machine: a folder with bin/ and examples/, a network namespace, a
// data folder, and one shell that keeps its state from line to line.
type world struct {
	dir, data, netns string
	before           string // what the machine looked like
	daemon           *exec.Cmd
	exited           chan error
	logFile          string
	shell            *exec.Cmd
	in               io.Writer
	out              *bufio.Reader
	pods             []string
	serviceIP        string
}

// builtOnce is bin/ as the README's commands make it, for all worlds; see built.
var builtOnce struct {
	sync.Mutex
	dir string
}

// built returns a folder with bin/, which TestMain removes.
func built(t *testing.T) string {
	t.Helper()
	builtOnce.Lock()
	defer builtOnce.Unlock()
	if builtOnce.dir != "" {
		return builtOnce.dir
	}
	dir, err := os.MkdirTemp("/tmp", "decree-built-")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "bin")
	sh(t, root, "go", "build", "-o", filepath.Join(bin, "decree"), "./cmd/decree")
	sh(t, root, "env", "CGO_ENABLED=0", "go", "build", "-ldflags=-s -w", "-o", filepath.Join(bin, "hello"), "./examples/hello/server")
	if err := errors.Join(os.Symlink("decree", filepath.Join(bin, "git-remote-decree")), os.Mkdir(filepath.Join(bin, "images"), 0o755)); err != nil {
		t.Fatal(err)
	}
	sh(t, dir, "bin/decree", "image", "pack", "bin/hello", "--name", "decree.dev/hello:v1", "--output", "bin/images/hello.tar")
	builtOnce.dir = dir
	return dir
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test runs containers: run it as root")
	}
	dir, err := os.MkdirTemp("/tmp", "decree-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{dir: dir, data: filepath.Join(dir, "data"), netns: filepath.Base(dir), logFile: filepath.Join(dir, "up.log")}
	t.Cleanup(func() { w.cleanup(t) })
	sh(t, "", "ip", "netns", "add", w.netns)
	sh(t, "", "ip", "-n", w.netns, "link", "set", "lo", "up")
	sh(t, built(t), "cp", "-a", "bin", dir)
	sh(t, root, "cp", "-r", "examples", dir)
	w.ownProcessesOnly(t)
	w.before = w.machine(t)

	w.shell = w.command("bash")
	stdin, err := w.shell.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := w.shell.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.shell.Stderr = w.shell.Stdout
	w.in, w.out = stdin, bufio.NewReader(stdout)
	if err := w.shell.Start(); err != nil {
		t.Fatal(err)
	}
	return w
}

// ownProcessesOnly puts a pidof before the machine's own that knows the processes of
// this world's pods only: other clusters may run on the machine that tests.
func (w *world) ownProcessesOnly(t *testing.T) {
	t.Helper()
	script := `#!/bin/sh
one=; [ "$1" = -s ] && one=1 && shift
found=
for pid in $(/bin/pidof "$@"); do
	grep -qF ` + w.cgroup() + ` /proc/$pid/cgroup && found="$found $pid" && [ -n "$one" ] && break
done
echo $found
[ -n "$found" ]
`
	tools := filepath.Join(w.dir, "tools")
	if err := os.Mkdir(tools, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tools, "pidof"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
}

// cgroup is the name of the cgroup that holds the pods of this world.
func (w *world) cgroup() string {
	return fmt.Sprintf("decree-%x", sha256.Sum256([]byte(w.data)))[:15]
}

// command is a command inside the world's network namespace.
func (w *world) command(args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"--net=/run/netns/" + w.netns, "--"}, args...)...)
	cmd.Dir = w.dir
	cmd.Env = append(os.Environ(), "DECREE_DATA="+w.data, "HOME="+w.dir, "PATH="+filepath.Join(w.dir, "tools")+":"+os.Getenv("PATH"), "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=Ada", "GIT_AUTHOR_EMAIL=ada@example.com", "GIT_COMMITTER_NAME=Ada", "GIT_COMMITTER_EMAIL=ada@example.com")
	return cmd
}

// up starts `decree up` and waits until it says that the example is healthy.
func (w *world) up(t *testing.T, flags ...string) {
	t.Helper()
	w.daemon = w.command(append([]string{"bin/decree", "up", "--repo", "examples/hello", "--images", "bin/images", "--log-level", "debug"}, flags...)...)
	log, err := os.OpenFile(w.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	w.daemon.Stderr = log
	stdout, err := w.daemon.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.daemon.Start(); err != nil {
		t.Fatal(err)
	}
	w.exited = make(chan error, 1)
	healthy := make(chan string, 1)
	go func() {
		var seen strings.Builder
		for s := bufio.NewScanner(stdout); s.Scan(); {
			seen.WriteString(s.Text() + "\n")
			if strings.HasPrefix(s.Text(), "healthy") {
				healthy <- seen.String()
			}
		}
		w.exited <- w.daemon.Wait()
	}()
	select {
	case text := <-healthy:
		t.Logf("decree up:\n%s", text)
		contains(t, text, "decree://127.0.0.1:7443/cluster", "decree get pods")
	case err := <-w.exited:
		t.Fatalf("decree up ended: %v\n%s", err, w.log())
	case <-time.After(time.Minute):
		t.Fatalf("decree up is not ready after a minute\n%s", w.log())
	}
}

func (w *world) stop(t *testing.T) {
	t.Helper()
	if err := w.daemon.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-w.exited:
		if err != nil {
			t.Errorf("decree up ended with %v\n%s", err, w.log())
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("decree up does not stop\n%s", w.log())
	}
	w.daemon = nil
}

// restart stops decree up, sees that pods keep running and the service keeps
// answering, starts it again, and sees that the same pods were adopted.
func (w *world) restart(t *testing.T) {
	t.Helper()
	before := w.must(t, "decree get pods -o name | sort")
	pids := w.must(t, "pidof hello | tr ' ' '\\n' | sort")
	w.stop(t)
	if got := w.must(t, "pidof hello | tr ' ' '\\n' | sort"); got != pids {
		t.Errorf("with decree stopped the processes changed from %q to %q", pids, got)
	}
	w.must(t, "curl -sS --max-time 5 http://"+w.serviceIP+"/")
	w.up(t)
	if got := w.must(t, "decree get pods -o name | sort"); got != before {
		t.Errorf("after the restart the pods changed from\n%s\nto\n%s", before, got)
	}
	if got := w.must(t, "pidof hello | tr ' ' '\\n' | sort"); got != pids {
		t.Errorf("after the restart the processes changed from %q to %q", pids, got)
	}
	if got := restarts(w.must(t, "decree get pods")); got != 1 {
		t.Errorf("restarts counted after the restart of decree: %d, want the 1 from before", got)
	}
	// After down nothing runs, and the next up must not call that healthy.
	w.stop(t)
	w.must(t, "decree down")
	if out, code := w.run(t, "pidof hello"); code == 0 {
		t.Errorf("after down these processes run: %s", out)
	}
	w.up(t)
	// The kernel learns of pods that are ready a moment after everybody else.
	w.eventually(t, "curl -sS --max-time 5 http://"+w.serviceIP+"/ || true", func(out string) bool { return strings.Contains(out, "Hello") })
}

// run executes one line in the world's shell.
func (w *world) run(t *testing.T, line string) (out string, code int) {
	t.Helper()
	const mark = "--- done "
	fmt.Fprintf(w.in, "%s\nprintf '\\n%s%%d\\n' $?\n", line, mark)
	type result struct {
		out  string
		code int
	}
	done := make(chan result, 1)
	go func() {
		var b strings.Builder
		for {
			s, err := w.out.ReadString('\n')
			if rest, ok := strings.CutPrefix(s, mark); ok {
				var code int
				fmt.Sscan(rest, &code)
				done <- result{strings.TrimSuffix(b.String(), "\n"), code}
				return
			}
			b.WriteString(s)
			if err != nil {
				done <- result{b.String(), -1}
				return
			}
		}
	}()
	select {
	case r := <-done:
		return r.out, r.code
	case <-time.After(2 * time.Minute):
		t.Fatalf("%s: no end after two minutes\n%s", line, w.log())
	}
	panic("unreachable")
}

func (w *world) must(t *testing.T, line string) string {
	t.Helper()
	out, code := w.run(t, line)
	if code != 0 {
		t.Fatalf("%s: exit status %d\n%s\n%s", line, code, out, w.log())
	}
	return out
}

// eventually repeats a looking command until good accepts its output.
func (w *world) eventually(t *testing.T, line string, good func(string) bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		out := w.must(t, line)
		if good(out) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not as wanted after a minute:\n%s\n%s", line, out, w.log())
		}
		time.Sleep(100 * time.Millisecond) // polling a command line: there is no event to await
	}
}

func (w *world) log() string {
	data, _ := os.ReadFile(w.logFile)
	if n := len(data) - 20000; n > 0 {
		data = data[n:]
	}
	return string(data)
}

// machine describes everything that decree could leave behind.
func (w *world) machine(t *testing.T) string {
	t.Helper()
	var b bytes.Buffer
	for _, args := range [][]string{
		{"ip", "-brief", "link"}, {"ip", "-brief", "address"}, {"ip", "route", "show", "table", "all"}, {"ip", "rule"},
		{"nft", "list", "ruleset"},
		{"sh", "-c", "sysctl -a 2>/dev/null | grep -E 'forward|bridge-nf|route_localnet' | grep -v mc_forward | sort"},
		{"sh", "-c", "cut -d' ' -f2 /proc/mounts | grep -F " + filepath.Base(w.dir) + " || true"},
		{"sh", "-c", "find /sys/fs/cgroup -type d -name '" + w.cgroup() + "' | sort"},
		{"sh", "-c", "ps -eo args | grep -F " + w.data + " | grep -v -e grep -e 'sh -c' || true"},
		{"sh", "-c", "ip netns | cut -d' ' -f1 | grep -E 'cni|decree' | grep -v '^decree-e2e-' | sort"},
	} {
		out, err := w.command(args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		fmt.Fprintf(&b, "# %s\n%s", strings.Join(args, " "), out)
	}
	return b.String()
}

func (w *world) nothingLeft(t *testing.T) {
	t.Helper()
	if after := w.machine(t); after != w.before {
		t.Errorf("down --purge left something behind; before:\n%s\nafter:\n%s", w.before, after)
	}
	if _, err := os.Stat(w.data); !os.IsNotExist(err) {
		t.Errorf("down --purge left the data folder: %v", err)
	}
}

func (w *world) cleanup(t *testing.T) {
	if w.daemon != nil {
		_ = w.daemon.Process.Kill()
		<-w.exited
	}
	if w.shell != nil {
		_ = w.shell.Process.Kill()
		_ = w.shell.Wait()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	purge := exec.CommandContext(ctx, "nsenter", "--net=/run/netns/"+w.netns, "--", filepath.Join(w.dir, "bin/decree"), "down", "--purge", "--data", w.data)
	if out, err := purge.CombinedOutput(); err != nil && !t.Failed() {
		t.Errorf("purge: %v\n%s", err, out)
	}
	_ = exec.Command("ip", "netns", "delete", w.netns).Run()
	_ = os.RemoveAll(w.dir)
}

func sh(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func ok(t *testing.T, _ *world, out string, code int) {
	t.Helper()
	if code != 0 {
		t.Errorf("exit status %d:\n%s", code, out)
	}
}

func contains(t *testing.T, out string, want ...string) {
	t.Helper()
	for _, s := range want {
		if !strings.Contains(out, s) {
			t.Errorf("%q is missing in:\n%s", s, out)
		}
	}
}

func running(table string) int { return strings.Count(table, " Running ") }

func lines(table string) int {
	n := 0
	for line := range strings.Lines(table) {
		if strings.HasPrefix(line, "hello-") {
			n++
		}
	}
	return n
}

func wantRunning(t *testing.T, table string, n int) {
	t.Helper()
	if running(table) != n || lines(table) != n {
		t.Errorf("want %d pods, all Running:\n%s", n, table)
	}
}

// restarts adds up the RESTARTS column of a table of pods.
func restarts(table string) int {
	sum := 0
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasPrefix(f[0], "hello-") {
			var n int
			fmt.Sscan(f[3], &n)
			sum += n
		}
	}
	return sum
}

// answers asks the service until it has seen a hundred answers, and returns the
// names of the pods that gave them.
func answers(t *testing.T, w *world) []string {
	t.Helper()
	w.serviceIP = strings.TrimSpace(w.must(t, "decree get service hello -o jsonpath={.spec.clusterIP}"))
	out := w.must(t, "for i in $(seq 100); do curl -sS --max-time 5 http://"+w.serviceIP+"/; done")
	var pods []string
	for line := range strings.Lines(out) {
		_, pod, ok := strings.Cut(strings.TrimSpace(line), " from ")
		if !ok {
			t.Fatalf("unexpected answer %q", line)
		}
		if !slices.Contains(pods, pod) {
			pods = append(pods, pod)
		}
	}
	return pods
}
