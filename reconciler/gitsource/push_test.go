package gitsource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// must holds when out has every want.
func mustContain(t *testing.T, out string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
}

func TestBranchesAndTags(t *testing.T) {
	b := newBench(t)
	first := b.seed(hello)
	work := b.clone()
	b.recv.receive = func(context.Context, *Push, func() error, io.Writer) error {
		return errors.New("must not be asked")
	}
	b.mustGit(work, "checkout", "-q", "-b", "topic/one")
	hash := b.commit(work, "topic.txt", "topic")
	b.mustGit(work, "tag", "-a", "v1", "-m", "version 1")
	out := b.mustGit(work, "push", "origin", "topic/one", "v1")
	mustContain(t, out, "[new branch]", "[new tag]")

	other := b.clone("-b", "topic/one")
	if got := strings.TrimSpace(b.mustGit(other, "rev-parse", "HEAD")); got != hash {
		t.Errorf("topic/one cloned at %s, want %s", got, hash)
	}
	if got := strings.TrimSpace(b.mustGit(other, "rev-parse", "v1^{commit}")); got != hash {
		t.Errorf("v1 is at %s, want %s", got, hash)
	}
	// A force push to an ordinary branch is ordinary.
	b.mustGit(work, "commit", "-q", "--amend", "-m", "amended")
	b.mustGit(work, "push", "-f", "origin", "topic/one")
	// Deleting makes room for a branch whose name was a folder.
	b.mustGit(work, "push", "origin", ":topic/one", ":v1")
	b.mustGit(work, "push", "origin", "HEAD:topic")
	refs := b.mustGit(work, "ls-remote", "origin")
	if want := first.Hash + "\trefs/heads/main"; !strings.Contains(refs, want) || strings.Contains(refs, "topic/one") || strings.Contains(refs, "v1") {
		t.Errorf("references after deletion:\n%s", refs)
	}
	out, err := b.git(work, "push", "origin", "HEAD:refs/decree/secret")
	if err == nil {
		t.Errorf("pushed outside of heads, tags and notes")
	}
	mustContain(t, out, "only refs/heads/")
}

func TestFollowedBranchIsProtected(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	b.commit(work, "a", "1")
	b.mustGit(work, "push", "-q", "origin", "main")
	head := b.head()

	out, err := b.git(work, "push", "origin", ":main")
	if err == nil {
		t.Error("main was deleted")
	}
	mustContain(t, out, "cannot be deleted")

	b.mustGit(work, "commit", "-q", "--amend", "-m", "rewritten")
	out, err = b.git(work, "push", "-f", "origin", "main")
	if err == nil {
		t.Error("main was rewritten")
	}
	mustContain(t, out, "non-fast-forward", "git pull --rebase")
	if b.head() != head {
		t.Errorf("head moved from %s to %s", head, b.head())
	}
}

func TestForceWhereAllowed(t *testing.T) {
	b := newBench(t, func(c *ServerConfig) { c.AllowForce = func(name string) bool { return name == "shop" } })
	b.seed(hello)
	work := b.clone()
	b.commit(work, "a", "1")
	b.mustGit(work, "push", "-q", "origin", "main")
	b.mustGit(work, "commit", "-q", "--amend", "-m", "rewritten")
	b.mustGit(work, "push", "-f", "origin", "main")
	if p := b.recv.pushes[1]; !p.Force {
		t.Error("Force is not set")
	}
}

func TestAtomicPush(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	b.commit(work, "a", "1")
	b.recv.receive = func(context.Context, *Push, func() error, io.Writer) error { return errors.New("no") }
	out, err := b.git(work, "push", "--atomic", "origin", "main", "main:other")
	if err == nil {
		t.Error("the push succeeded")
	}
	mustContain(t, out, "(no)", "(atomic push: another reference was refused)")
	if refs := b.mustGit(work, "ls-remote", "origin"); strings.Contains(refs, "other") {
		t.Errorf("half of an atomic push was done:\n%s", refs)
	}
	// Without atomic, each reference stands for itself.
	out, err = b.git(work, "push", "origin", "main", "main:other")
	if err == nil {
		t.Error("the push succeeded")
	}
	mustContain(t, out, "[new branch]")
}

func TestEmptyRepositoryTakesFirstPush(t *testing.T) {
	b := newBench(t)
	if err := b.server.Init(t.Context(), "shop"); err != nil {
		t.Fatal(err)
	}
	work := b.clone()
	b.mustGit(work, "checkout", "-q", "-B", "main")
	hash := b.commit(work, "a", "1")
	b.mustGit(work, "push", "origin", "main")
	if b.head() != hash {
		t.Errorf("head is %q, want %s", b.head(), hash)
	}
	if p := b.recv.pushes[0]; p.Old != strings.Repeat("0", 40) || p.Force {
		t.Errorf("first push: %+v", p)
	}
}

func TestConcurrentPushesOneWins(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	one, two := b.clone(), b.clone()
	b.commit(one, "a", "1")
	b.commit(two, "a", "2")
	entered, proceed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	b.recv.receive = func(_ context.Context, p *Push, durable func() error, _ io.Writer) error {
		once.Do(func() { close(entered); <-proceed })
		return b.recv.accept(p, durable)
	}
	type result struct {
		out string
		err error
	}
	results := make(chan result, 2)
	push := func(dir string) {
		out, err := b.git(dir, "push", "origin", "main")
		results <- result{out, err}
	}
	go push(one)
	<-entered
	second := make(chan struct{})
	go func() { push(two); close(second) }()
	// The second push has read the same head and waits for the first.
	awaitQuarantines(t, b, 2)
	close(proceed)
	<-second
	won := 0
	for range 2 {
		r := <-results
		if r.err == nil {
			won++
		} else if !strings.Contains(r.out, "fetch first") {
			t.Errorf("the loser is told:\n%s", r.out)
		}
	}
	if won != 1 || b.recv.seen() != 1 {
		t.Errorf("%d pushes won, the receiver saw %d", won, b.recv.seen())
	}
}

// awaitQuarantines waits until n pushes have their pack on disk.
func awaitQuarantines(t *testing.T, b *bench, n int) {
	t.Helper()
	await(t, func() bool {
		list, _ := filepath.Glob(filepath.Join(b.dir, "repos", "shop.git", incomingDir, "*", "objects", "??"))
		dirs := map[string]bool{}
		for _, p := range list {
			dirs[filepath.Dir(p)] = true
		}
		return len(dirs) == n
	})
}

// await polls a condition that another process brings about.
func await(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatal("waited 20 s in vain")
		case <-tick.C:
		}
	}
}

func TestRolloutDoesNotBlockNextPush(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work, fix := b.clone(), b.clone()
	b.commit(work, "a", "broken")
	stuck, release := make(chan struct{}), make(chan struct{})
	b.recv.receive = func(ctx context.Context, p *Push, durable func() error, w io.Writer) error {
		if err := b.recv.accept(p, durable); err != nil {
			return err
		}
		p.InForce()
		if b.recv.seen() > 1 {
			return nil
		}
		close(stuck)
		<-release
		return errors.New("rollout not healthy: 0 of 2 ready")
	}
	done := make(chan string)
	go func() {
		out, err := b.git(work, "push", "origin", "main")
		if err != nil {
			out = "failed: " + out
		}
		done <- out
	}()
	<-stuck
	b.mustGit(fix, "pull", "-q", "--rebase")
	hash := b.commit(fix, "a", "mended")
	b.mustGit(fix, "push", "-q", "origin", "main")
	if b.head() != hash {
		t.Errorf("head is %s, want the fix %s", b.head(), hash)
	}
	close(release)
	out := <-done
	mustContain(t, out, "remote: rollout not healthy: 0 of 2 ready", "main -> main")
	if strings.HasPrefix(out, "failed") {
		t.Errorf("a push that is in force was reported as refused:\n%s", out)
	}
}

// TestClientGoesAway kills git while Receive runs, at the two moments that matter.
func TestClientGoesAway(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("afterDurable=%v", late), func(t *testing.T) {
			b := newBench(t)
			first := b.seed(hello)
			work := b.clone()
			hash := b.commit(work, "a", "1")
			before := len(b.files())
			entered, gone, finished := make(chan struct{}), make(chan struct{}), make(chan error, 1)
			b.recv.receive = func(ctx context.Context, p *Push, durable func() error, w io.Writer) (err error) {
				defer func() { finished <- err }()
				if late {
					if err := durable(); err != nil {
						return err
					}
				}
				close(entered)
				<-gone
				if late {
					fmt.Fprintln(w, "nobody reads this")
					if ctx.Err() != nil {
						return errors.New("the context ended after durable")
					}
					b.recv.setHead(p.Repository, p.New)
					return nil
				}
				<-ctx.Done()
				return b.recv.accept(p, durable)
			}
			cmd := exec.CommandContext(t.Context(), "git", "push", "origin", "main")
			cmd.Dir, cmd.Env = work, b.env
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			<-entered
			killGroup(t, cmd)
			b.http.CloseClientConnections()
			close(gone)
			err := <-finished
			want := first.Hash
			if late {
				want = hash
			}
			if b.head() != want || (err == nil) != late {
				t.Errorf("head is %s, want %s; Receive returned %v", b.head(), want, err)
			}
			b.http.Close() // waits for the handler
			if !late && len(b.files()) != before {
				t.Errorf("files left: %v", b.files())
			}
		})
	}
}

func killGroup(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // says "killed"
}

func TestLargePushAndLimits(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	for i := range 10_000 {
		path := filepath.Join(work, fmt.Sprintf("d%02d", i%100), fmt.Sprintf("f%d.cue", i))
		if i < 100 {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(path, fmt.Appendf(nil, "file: %d\n", i), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	hash := b.commit(work, "last", "1")
	began := time.Now()
	b.mustGit(work, "push", "-q", "origin", "main")
	t.Logf("pushed 10,000 files in %v", time.Since(began))
	if b.head() != hash {
		t.Fatalf("head is %s", b.head())
	}
	began = time.Now()
	again := b.clone()
	t.Logf("cloned 10,000 files in %v", time.Since(began))
	if got := strings.TrimSpace(b.mustGit(again, "rev-parse", "HEAD")); got != hash {
		t.Errorf("cloned %s", got)
	}
	b.mustGit(again, "fsck", "--strict")
	// A small push on top is sent as deltas on what the server has (a thin pack).
	hash = b.commit(again, "d00/f0.cue", "file: changed\n")
	b.mustGit(again, "push", "-q", "origin", "main")
	if b.head() != hash {
		t.Errorf("head is %s, want %s", b.head(), hash)
	}
	b.mustGit(filepath.Join(b.dir, "repos", "shop.git"), "fsck", "--strict", hash)
}

func TestPushOverLimits(t *testing.T) {
	tests := []struct {
		name   string
		limits Limits
		files  int
		size   int
		want   string
	}{
		{"pack bytes", Limits{PackBytes: 1 << 20}, 1, 5 << 20, "the pack is larger than 1 MiB"},
		{"objects", Limits{Objects: 50}, 60, 10, "declares 62 objects, more than 50"},
		{"object bytes", Limits{ObjectBytes: 1 << 20}, 1, 2 << 20, "an object is larger than 1 MiB"},
		{"inflated", Limits{InflatedBytes: 1 << 20}, 3, 1 << 19, "larger than 1 MiB together"},
		{"files", Limits{Files: 20}, 30, 10, "more than 20 files and folders"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, func(c *ServerConfig) { c.Limits = tt.limits })
			first := b.seed(hello)
			work := b.clone()
			for i := range tt.files {
				data := make([]byte, tt.size)
				if tt.limits.PackBytes > 0 { // does not compress
					random(data)
				}
				data = fmt.Appendf(data, "%d", i)
				if err := os.WriteFile(filepath.Join(work, fmt.Sprintf("f%d", i)), data, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			b.mustGit(work, "add", "-A")
			b.mustGit(work, "commit", "-q", "-m", "large")
			before := b.files()
			out, err := b.git(work, "push", "origin", "main")
			if err == nil {
				t.Errorf("the push was taken:\n%s", out)
			}
			mustContain(t, out, tt.want)
			if after := b.files(); len(after) != len(before) || b.head() != first.Hash {
				t.Errorf("something changed: head %s, files %v", b.head(), after)
			}
		})
	}
}

func TestShallowCloneDeepenAndPush(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	for i := range 10 {
		b.commit(work, "count", fmt.Sprint(i))
	}
	b.mustGit(work, "push", "-q", "origin", "main")
	shallow := b.clone("--depth", "1")
	count := func() string { return strings.TrimSpace(b.mustGit(shallow, "rev-list", "--count", "HEAD")) }
	if got := count(); got != "1" {
		t.Errorf("shallow clone has %s commits", got)
	}
	b.mustGit(shallow, "fetch", "-q", "--depth", "4")
	if got := count(); got != "4" {
		t.Errorf("deepened clone has %s commits", got)
	}
	hash := b.commit(shallow, "count", "from shallow")
	b.mustGit(shallow, "push", "-q", "origin", "main")
	if b.head() != hash {
		t.Errorf("head is %s", b.head())
	}
	b.mustGit(work, "pull", "-q")
	b.mustGit(shallow, "fetch", "-q", "--unshallow")
	if got := count(); got != "12" {
		t.Errorf("unshallowed clone has %s commits", got)
	}
	b.mustGit(shallow, "fsck", "--strict")
}

// TestFetchNegotiation lets both sides go on for a while, so that fetches take
// several rounds, and checks what arrives.
func TestFetchNegotiation(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	one, two := b.clone(), b.clone()
	for i := range 80 {
		b.commit(two, "mine", fmt.Sprint(i))
	}
	for i := range 30 {
		b.commit(one, "theirs", fmt.Sprint(i))
	}
	b.mustGit(one, "push", "-q", "origin", "main")
	out := b.mustGit(two, "-c", "fetch.negotiationAlgorithm=consecutive", "fetch", "--progress", "origin")
	b.mustGit(two, "fsck", "--strict")
	if got := strings.TrimSpace(b.mustGit(two, "rev-parse", "origin/main")); got != b.head() {
		t.Errorf("fetched %s, want %s", got, b.head())
	}
	mustContain(t, out, "remote: 90 objects") // 30 commits, trees and files; nothing the client has
	// By hash, also of a commit that no branch names.
	b.mustGit(two, "fetch", "-q", "origin", b.head()+":refs/heads/pinned")
	out, err := b.git(two, "fetch", "origin", strings.Repeat("ab", 20))
	if err == nil {
		t.Error("fetched a commit that does not exist")
	}
	mustContain(t, out, "not our ref")
}

func TestAddressesAndStrangers(t *testing.T) {
	b := newBench(t, func(c *ServerConfig) {
		c.Authorize = func(_ *http.Request, repo string, push bool) error {
			if push {
				return errors.New("ann may not push to " + repo)
			}
			return nil
		}
	})
	b.seed(hello)
	dir := t.TempDir()
	b.mustGit(dir, "clone", "-q", b.http.URL+"/git/shop", "bare-name")
	b.mustGit(dir, "-c", "protocol.version=2", "clone", "-q", b.url, "v2")
	b.mustGit(dir, "-c", "protocol.version=1", "clone", "-q", b.url, "v1")
	out, err := b.git(dir, "clone", b.http.URL+"/git/nothing.git")
	if err == nil {
		t.Error("cloned a repository that does not exist")
	}
	mustContain(t, out, "not found")
	if out, err = b.git(filepath.Join(dir, "v2"), "push", "origin", "main:other"); err == nil {
		t.Error("pushed without the right to")
	}
	mustContain(t, out, "403")
	get := func(path string) int {
		resp, err := b.http.Client().Get(b.http.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for path, want := range map[string]int{
		"/git/shop.git/info/refs":                             http.StatusForbidden, // the dumb protocol
		"/git/shop.git/objects/info/packs":                    http.StatusNotFound,
		"/git/../shop.git/info/refs?service=git-upload-pack":  http.StatusNotFound,
		"/git/..%2fshop/info/refs?service=git-upload-pack":    http.StatusNotFound,
		"/git/SHOP.git/info/refs?service=git-upload-pack":     http.StatusNotFound,
		"/git/shop.git/git-upload-pack":                       http.StatusMethodNotAllowed,
		"/git/shop.git/info/refs?service=git-upload-archive":  http.StatusForbidden,
		"/git/shop.git/info/refs?service=git-upload-pack&x=1": http.StatusOK,
	} {
		if got := get(path); got != want {
			t.Errorf("GET %s: %d, want %d", path, got, want)
		}
	}
}

func TestNobodyIsRefused(t *testing.T) {
	b := newBench(t, func(c *ServerConfig) { c.Identity = func(*http.Request) string { return "" } })
	b.seed(hello)
	if _, err := b.git(t.TempDir(), "clone", b.url); err == nil {
		t.Error("nobody may clone")
	}
}

// TestLinesArriveWhileReceiveRuns sees the first line before Receive goes on.
func TestLinesArriveWhileReceiveRuns(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	b.commit(work, "a", "1")
	proceed := make(chan struct{})
	b.recv.receive = func(_ context.Context, p *Push, durable func() error, w io.Writer) error {
		fmt.Fprintln(w, "step one")
		<-proceed
		return b.recv.accept(p, durable)
	}
	cmd := exec.CommandContext(t.Context(), "git", "push", "origin", "main")
	cmd.Dir, cmd.Env = work, b.env
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	buf := make([]byte, 256)
	for !strings.Contains(got.String(), "remote: step one") {
		n, err := out.Read(buf)
		got.Write(buf[:n])
		if err != nil {
			t.Fatalf("the push ended before the line came: %v\n%s", err, got.String())
		}
	}
	close(proceed)
	if _, err := io.Copy(&got, out); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, got.String())
	}
}

func TestRestartFindsRepositoriesAndCleansUp(t *testing.T) {
	b := newBench(t)
	first := b.seed(hello)
	left := filepath.Join(b.dir, "repos", "shop.git", incomingDir, "123", "objects")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	again, err := NewServer(b.server.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a leftover quarantine is still there: %v", err)
	}
	c, err := again.Commit(t.Context(), "shop", first.Hash)
	if err != nil || c.Subject != "first" {
		t.Errorf("commit after restart: %+v, %v", c, err)
	}
	log, err := again.Log(t.Context(), "shop", "", 10)
	if err != nil || len(log) != 1 || log[0].Hash != first.Hash {
		t.Errorf("log: %v, %v", log, err)
	}
	if _, err := again.Commit(t.Context(), "shop", strings.Repeat("ab", 20)); !errors.Is(err, ErrNotFound) {
		t.Errorf("a missing commit: %v", err)
	}
	if _, err := again.Seed(t.Context(), "shop", hello, "Ann <a@b>", "again"); !errors.Is(err, ErrExists) {
		t.Errorf("seeding twice: %v", err)
	}
}

// TestLostObjectsComeBackByPush: the state knows a commit that the folder lost.
func TestLostObjectsComeBackByPush(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	if err := os.RemoveAll(filepath.Join(b.dir, "repos", "shop.git")); err != nil {
		t.Fatal(err)
	}
	var err error
	if b.server, err = NewServer(b.server.cfg); err != nil {
		t.Fatal(err)
	}
	if err := b.server.Init(t.Context(), "shop"); err != nil {
		t.Fatal(err)
	}
	b.http.Close()
	b.serve()
	b.mustGit(work, "remote", "set-url", "origin", b.url)
	out, err := b.git(work, "fetch", "origin")
	if err == nil {
		t.Errorf("fetched what is not there:\n%s", out)
	}
	b.mustGit(work, "push", "origin", "main")
	b.mustGit(work, "fetch", "-q", "origin")
	if b.recv.seen() != 0 {
		t.Error("the receiver was asked about a commit that is in force")
	}
}
