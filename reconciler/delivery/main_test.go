package delivery_test

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

func TestMain(m *testing.M) {
	// Tests use a git of their own: no configuration of the machine, no prompts.
	for k, v := range map[string]string{
		"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0", "HOME": "/nonexistent",
		"GIT_AUTHOR_NAME": "Ann", "GIT_AUTHOR_EMAIL": "ann@example.org", "GIT_COMMITTER_NAME": "Ann", "GIT_COMMITTER_EMAIL": "ann@example.org",
	} {
		os.Setenv(k, v)
	}
	goleak.VerifyTestMain(m)
}

// evaluator compiles in this process, and counts.
type evaluator struct {
	mu sync.Mutex
	n  int
}

func (e *evaluator) Compile(ctx context.Context, tree fs.FS, opts compile.Options) (*compile.Result, error) {
	e.mu.Lock()
	e.n++
	e.mu.Unlock()
	return compile.Evaluate(ctx, tree, opts)
}

func (e *evaluator) runs() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.n
}

// gate is the real store; a test may step in before a proposal.
type gate struct {
	replicated.Store

	mu     sync.Mutex
	before func(t command.Txn) error
	answer *command.Rejection // to everything, instead of the store's
	txns   []command.Txn
}

func (g *gate) Propose(ctx context.Context, t command.Txn) (command.Result, error) {
	g.mu.Lock()
	g.txns = append(g.txns, t)
	before, answer := g.before, g.answer
	g.mu.Unlock()
	if answer != nil {
		return command.Result{Rejected: answer}, nil
	}
	if before != nil {
		if err := before(t); err != nil {
			return command.Result{}, err
		}
	}
	return g.Store.Propose(ctx, t)
}

func (g *gate) onPropose(f func(command.Txn) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.before = f
}

func (g *gate) reject(r *command.Rejection) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.answer = r
}

func (g *gate) proposals() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.txns)
}

// world is a cluster without nodes: a store with a source "decree", and a pipeline.
type world struct {
	t        *testing.T
	dir      string
	store    *gate
	compiler *evaluator
	pipeline *delivery.Pipeline
	log      *syncBuffer
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), compiler: &evaluator{}, log: &syncBuffer{}}
	s, err := raftstore.Open(raftstore.Config{
		Dir: filepath.Join(w.dir, "raft"), NodeID: "one",
		Bootstrap: &command.Bootstrap{
			ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"),
			NodeMask: 24, DNS: netip.MustParseAddr("10.97.0.10"),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.WaitReady(w.ctx()); err != nil {
		t.Fatal(err)
	}
	w.store = &gate{Store: replicated.Store{Store: s}}
	w.pipeline = &delivery.Pipeline{Compiler: w.compiler, Store: w.store, Log: slog.New(slog.NewTextHandler(w.log, nil))}
	w.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})
	w.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "decree-system"}})
	w.create(&api.Source{ObjectMeta: metav1.ObjectMeta{Name: "decree"}})
	return w
}

// ctx ends with the test, or when something hangs.
func (w *world) ctx() context.Context {
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	w.t.Cleanup(cancel)
	return ctx
}

func (w *world) mutate(ms ...api.Mutation) {
	w.t.Helper()
	res, err := w.store.Store.Propose(w.ctx(), command.Txn{Time: time.Now().UnixMilli(), Actor: "test", Mutations: ms})
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) create(o api.Object) {
	w.t.Helper()
	o.GetObjectKind().SetGroupVersionKind(api.KindOf(o).GroupVersionKind)
	w.mutate(api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
}

func (w *world) source(name string) *api.Source {
	w.t.Helper()
	src, ok := api.Get[*api.Source](w.store.View(), "", name)
	if !ok {
		w.t.Fatalf("no source %q", name)
	}
	return src
}

func (w *world) exists(r api.Resource, name string) bool {
	_, ok := w.store.View().Get(api.Key{Resource: r, Namespace: "default", Name: name})
	return ok
}

// revisions lists the records of a source, oldest first.
func (w *world) revisions(source string) []api.RevisionSpec {
	var out []api.RevisionSpec
	for r := range api.List[*api.Revision](w.store.View(), "") {
		if r.Spec.Source == source {
			out = append(out, r.Spec)
		}
	}
	return out
}

// await waits until the state satisfies ok.
func (w *world) await(what string, ok func(api.Reader) bool) {
	w.t.Helper()
	ctx := w.ctx()
	for {
		view := w.store.View()
		if ok(view) {
			return
		}
		if err := w.store.Await(ctx, view.Revision(), ""); err != nil {
			w.t.Fatalf("waiting until %s: %v", what, err)
		}
	}
}

// tree is a folder in one file of CUE.
func tree(cue string) fstest.MapFS {
	return fstest.MapFS{"shop.cue": {Data: []byte("package shop\n" + cue)}}
}

// configMap is one object in CUE, on one line.
func configMap(name, value string) string {
	return strings.NewReplacer("NAME", name, "VALUE", value).Replace(
		`"NAME": {apiVersion: "v1", kind: "ConfigMap", metadata: name: "NAME", data: x: "VALUE"}` + "\n")
}

// commit makes a commit whose hash follows from its message.
func commit(message string, tree fs.FS) *gitsource.Commit {
	sum := sha1.Sum([]byte(message))
	subject, _, _ := strings.Cut(message, "\n")
	return &gitsource.Commit{
		Hash: hex.EncodeToString(sum[:]), Author: "Ann <ann@example.org>", Time: time.Unix(1_800_000_000, 0),
		Subject: subject, Message: message, Tree: tree,
	}
}

// deliver brings a commit of the source "decree" into force.
func (w *world) deliver(c *gitsource.Commit) *delivery.Outcome {
	w.t.Helper()
	out, err := w.pipeline.Deliver(w.ctx(), delivery.Request{Source: "decree", Commit: c, Parent: w.source("decree").Status.Applied})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// applied is deliver of a commit that must be good.
func (w *world) applied(c *gitsource.Commit) *delivery.Outcome {
	w.t.Helper()
	out := w.deliver(c)
	if !out.Applied {
		w.t.Fatalf("refused: %v", out.Diagnostics)
	}
	return out
}

// git runs git and returns all it prints.
func git(t *testing.T, env []string, dir string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustGit(t *testing.T, env []string, dir string, args ...string) string {
	t.Helper()
	out, err := git(t, env, dir, args...)
	if err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

func contains(t *testing.T, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
}
