package gitsource

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if maybeHelper() {
		return
	}
	// Tests use a git of their own: no configuration of the machine, no prompts.
	for k, v := range map[string]string{
		"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0", "HOME": "/nonexistent",
		"GIT_AUTHOR_NAME": "Ann", "GIT_AUTHOR_EMAIL": "ann@example.org", "GIT_COMMITTER_NAME": "Ann", "GIT_COMMITTER_EMAIL": "ann@example.org",
	} {
		os.Setenv(k, v)
	}
	goleak.VerifyTestMain(m)
}

// fakeReceiver keeps heads in memory and lets a test decide about pushes.
type fakeReceiver struct {
	mu      sync.Mutex
	heads   map[string]string
	pushes  []*Push
	receive func(ctx context.Context, p *Push, durable func() error, progress io.Writer) error
}

func newFakeReceiver() *fakeReceiver { return &fakeReceiver{heads: make(map[string]string)} }

func (f *fakeReceiver) Head(_ context.Context, repo string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.heads[repo], nil
}

func (f *fakeReceiver) setHead(repo, hash string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.heads[repo] = hash
}

func (f *fakeReceiver) Receive(ctx context.Context, p *Push, durable func() error, progress io.Writer) error {
	f.mu.Lock()
	f.pushes = append(f.pushes, p)
	receive := f.receive
	f.mu.Unlock()
	if receive != nil {
		return receive(ctx, p, durable, progress)
	}
	return f.accept(p, durable)
}

// seen is how many pushes the receiver was asked about.
func (f *fakeReceiver) seen() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.pushes)
}

func (f *fakeReceiver) accept(p *Push, durable func() error) error {
	if err := durable(); err != nil {
		return err
	}
	f.setHead(p.Repository, p.New)
	return nil
}

// bench is a server with a repository "shop", seeded, and its address.
type bench struct {
	t      *testing.T
	dir    string
	recv   *fakeReceiver
	server *Server
	http   *httptest.Server
	url    string
	env    []string
}

func newBench(t *testing.T, change ...func(*ServerConfig)) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), recv: newFakeReceiver()}
	cfg := ServerConfig{Dir: filepath.Join(b.dir, "repos"), Receiver: b.recv, Logger: slog.New(slog.DiscardHandler),
		Identity: func(*http.Request) string { return "ann" }}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if b.server, err = NewServer(cfg); err != nil {
		t.Fatal(err)
	}
	b.serve()
	return b
}

// serve puts the server on the network.
func (b *bench) serve() {
	b.t.Helper()
	b.http = httptest.NewTLSServer(b.server)
	b.t.Cleanup(b.http.Close)
	b.url = b.http.URL + "/git/shop.git"
	ca := filepath.Join(b.dir, "ca.pem")
	if err := os.WriteFile(ca, certPEM(b.http.Certificate().Raw), 0o600); err != nil {
		b.t.Fatal(err)
	}
	b.env = append(os.Environ(), "GIT_SSL_CAINFO="+ca)
}

func (b *bench) seed(files fstest.MapFS) *Commit {
	b.t.Helper()
	c, err := b.server.Seed(b.t.Context(), "shop", files, "Ann <ann@example.org>", "first")
	if err != nil {
		b.t.Fatal(err)
	}
	b.recv.setHead("shop", c.Hash)
	return c
}

// git runs git in a folder and returns all it prints.
func (b *bench) git(dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(b.t.Context(), "git", args...)
	cmd.Dir, cmd.Env = dir, b.env
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (b *bench) mustGit(dir string, args ...string) string {
	b.t.Helper()
	out, err := b.git(dir, args...)
	if err != nil {
		b.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (b *bench) clone(args ...string) string {
	b.t.Helper()
	dir := b.t.TempDir()
	b.mustGit(dir, append(append([]string{"clone", "-q"}, args...), b.url, "work")...)
	return filepath.Join(dir, "work")
}

func (b *bench) commit(work, name, content string) string {
	b.t.Helper()
	path := filepath.Join(work, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		b.t.Fatal(err)
	}
	b.mustGit(work, "add", "-A")
	b.mustGit(work, "commit", "-q", "-m", "change "+name)
	return strings.TrimSpace(b.mustGit(work, "rev-parse", "HEAD"))
}

func (b *bench) head() string {
	h, _ := b.recv.Head(b.t.Context(), "shop")
	return h
}

// files lists all files below the server's folder.
func (b *bench) files() []string {
	var list []string
	err := filepath.WalkDir(filepath.Join(b.dir, "repos"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			list = append(list, p)
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return list
}

var hello = fstest.MapFS{
	"app.cue":     {Data: []byte("replicas: 2\n"), Mode: 0o644},
	"run.sh":      {Data: []byte("#!/bin/sh\n"), Mode: 0o755},
	"sub/dir/one": {Data: []byte("one\n"), Mode: 0o644},
	"link":        {Data: []byte("../../etc/passwd"), Mode: fs.ModeSymlink | 0o777},
}

func TestPushIsValidatedAndNarrated(t *testing.T) {
	b := newBench(t)
	b.seed(hello)
	work := b.clone()
	if got, err := os.ReadFile(filepath.Join(work, "app.cue")); err != nil || string(got) != "replicas: 2\n" {
		t.Fatalf("cloned app.cue: %q, %v", got, err)
	}
	var seen string
	b.recv.receive = func(_ context.Context, p *Push, durable func() error, progress io.Writer) error {
		data, err := fs.ReadFile(p.Commit.Tree, "app.cue")
		if err != nil {
			return err
		}
		seen = string(data)
		fmt.Fprintf(progress, "plan: 1 to change\n")
		fmt.Fprintf(progress, "rollout: 4 of 4 ready\n")
		return b.recv.accept(p, durable)
	}
	old := b.head()
	hash := b.commit(work, "app.cue", "replicas: 4\n")
	out := b.mustGit(work, "push", "origin", "main")
	if seen != "replicas: 4\n" {
		t.Errorf("the receiver read %q", seen)
	}
	if !strings.Contains(out, "remote: plan: 1 to change") || !strings.Contains(out, "remote: rollout: 4 of 4 ready") {
		t.Errorf("no remote lines in:\n%s", out)
	}
	if b.head() != hash {
		t.Errorf("head is %s, want %s", b.head(), hash)
	}
	p := b.recv.pushes[0]
	if p.Old != old || p.New != hash || p.Pusher != "ann" || p.Force || p.Ref != FollowedRef || p.Repository != "shop" {
		t.Errorf("push: %+v", p)
	}
	if p.Commit.Subject != "change app.cue" || p.Commit.Author != "Ann <ann@example.org>" || len(p.Commit.Parents) != 1 {
		t.Errorf("commit: %+v", p.Commit)
	}
	// The tree of an accepted push reads on after the objects have moved.
	if data, err := fs.ReadFile(p.Commit.Tree, "sub/dir/one"); err != nil || string(data) != "one\n" {
		t.Errorf("tree after the push: %q, %v", data, err)
	}
	b.mustGit(filepath.Join(b.dir, "repos", "shop.git"), "fsck", "--strict", hash)
}

func TestPushRefused(t *testing.T) {
	b := newBench(t)
	first := b.seed(hello)
	work := b.clone()
	before := b.files()
	b.recv.receive = func(context.Context, *Push, func() error, io.Writer) error {
		return errors.New("2 errors\napps/web.cue:14:3: spec.replicas: expected int, found \"x\"\napps/web.cue:15:3: unknown field \"replcas\"")
	}
	b.commit(work, "app.cue", "replicas: x\n")
	out, err := b.git(work, "push", "origin", "main")
	if err == nil {
		t.Fatalf("a refused push succeeded:\n%s", out)
	}
	for _, want := range []string{"remote: apps/web.cue:14:3: spec.replicas", "remote: apps/web.cue:15:3", "! [remote rejected] main -> main (2 errors)"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if b.head() != first.Hash {
		t.Errorf("head moved to %s", b.head())
	}
	if after := b.files(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("a refused push left files:\n%v\nbefore:\n%v", after, before)
	}
}

func certPEM(der []byte) []byte {
	var buf bytes.Buffer
	encodePEM(&buf, "CERTIFICATE", der)
	return buf.Bytes()
}
