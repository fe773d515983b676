package delivery_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// counted counts fetches, and may replace what they return.
type counted struct {
	delivery.Fetcher

	mu     sync.Mutex
	n      int
	remote gitsource.Remote // of the last fetch
	fake   func(n int) (*gitsource.Fetched, error)
	polled chan struct{} // gets a signal after each fetch, if there is room
}

func (c *counted) Fetch(ctx context.Context, r gitsource.Remote) (*gitsource.Fetched, error) {
	c.mu.Lock()
	c.n++
	c.remote = r
	n, fake := c.n, c.fake
	c.mu.Unlock()
	defer func() {
		select {
		case c.polled <- struct{}{}:
		default:
		}
	}()
	if fake != nil {
		return fake(n)
	}
	return c.Fetcher.Fetch(ctx, r)
}

func (c *counted) answer(fake func(n int) (*gitsource.Fetched, error)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fake = fake
}

func (c *counted) fetches() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// trail is a world whose external sources are followed.
type trail struct {
	*world
	follower *delivery.Follower
	fetcher  *counted
	stop     func()
}

func (w *world) follow() *trail { return w.lead("mirror", w.pipeline) }

// lead follows as a leader does whose mirror is in the folder called mirror.
func (w *world) lead(mirrorDir string, p *delivery.Pipeline) *trail {
	w.t.Helper()
	log := slog.New(slog.NewTextHandler(w.log, nil))
	mirror, err := gitsource.NewMirror(gitsource.MirrorConfig{Dir: filepath.Join(w.dir, mirrorDir), Logger: log})
	if err != nil {
		w.t.Fatal(err)
	}
	f := &trail{world: w, fetcher: &counted{Fetcher: mirror, polled: make(chan struct{}, 1)}}
	f.follower = &delivery.Follower{Pipeline: p, Fetcher: f.fetcher, Log: log}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.follower.Run(ctx) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			w.t.Errorf("the follower ended with %v", err)
		}
	})
	w.t.Cleanup(f.stop)
	return f
}

// sync asks for a poll and waits until its fetch is over.
func (f *trail) sync(name string) {
	f.t.Helper()
	select {
	case <-f.fetcher.polled:
	default:
	}
	if err := f.follower.Sync(name); err != nil {
		f.t.Fatal(err)
	}
	select {
	case <-f.fetcher.polled:
	case <-f.ctx().Done():
		f.t.Fatal("no poll")
	}
}

// respec changes the spec of a source that does not come from Git.
func (w *world) respec(name string, change func(*api.SourceSpec)) {
	w.t.Helper()
	for {
		src := api.Clone(w.source(name))
		change(&src.Spec)
		res, err := w.store.Store.Propose(w.ctx(), command.Txn{Actor: "test", Mutations: []api.Mutation{api.Guarded(api.Update, src)}})
		switch {
		case err != nil:
			w.t.Fatal(err)
		case res.Rejected == nil:
			return
		case res.Rejected.Code != command.Conflict:
			w.t.Fatal(res.Rejected)
		}
	}
}

// condition returns Ready of a source, zero if it has none.
func condition(r api.Reader, name string) metav1.Condition {
	src, ok := api.Get[*api.Source](r, "", name)
	if !ok {
		return metav1.Condition{}
	}
	if c := meta.FindStatusCondition(src.Status.Conditions, "Ready"); c != nil {
		return *c
	}
	return metav1.Condition{}
}

func (w *world) awaitReason(name, reason string) metav1.Condition {
	w.t.Helper()
	w.await(name+" is "+reason, func(r api.Reader) bool { return condition(r, name).Reason == reason })
	return condition(w.store.View(), name)
}

// awaitApplied waits until a commit is in force and the status says so.
func (w *world) awaitApplied(name, hash string) {
	w.t.Helper()
	w.await(name+" is at "+hash, func(r api.Reader) bool {
		src, _ := api.Get[*api.Source](r, "", name)
		return src != nil && src.Status.Applied == hash && condition(r, name).Status == metav1.ConditionTrue && condition(r, name).ObservedGeneration == src.Generation
	})
}

// repository makes a real one, outside of the cluster, with one commit.
func (w *world) repository(name string) (dir, hash string) {
	w.t.Helper()
	dir = filepath.Join(w.dir, name)
	mustGit(w.t, nil, w.dir, "init", "-q", "-b", "main", dir)
	return dir, write(w.t, dir, "shop.cue", "package shop\n"+configMap("a", "1"))
}

func (w *world) external(name, url string, change ...func(*api.SourceSpec)) {
	w.t.Helper()
	src := &api.Source{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: api.SourceSpec{URL: url, Interval: metav1.Duration{Duration: time.Hour}}}
	for _, c := range change {
		c(&src.Spec)
	}
	w.create(src)
}

func TestFollowBranchTagAndCommit(t *testing.T) {
	f := newWorld(t).follow()
	dir, first := f.repository("shop")
	f.external("shop", dir)
	f.awaitApplied("shop", first)

	second := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	f.sync("shop")
	f.awaitApplied("shop", second)

	// What changes in the spec is followed at once: there is no sync from here on.
	mustGit(t, nil, dir, "tag", "-a", "v1", "-m", "one")
	mustGit(t, nil, dir, "checkout", "-q", "-b", "next")
	third := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "3"))
	f.respec("shop", func(s *api.SourceSpec) { s.Branch = "next" })
	f.awaitApplied("shop", third)
	f.respec("shop", func(s *api.SourceSpec) { s.Branch, s.Commit = "", first })
	f.awaitApplied("shop", first)
	f.respec("shop", func(s *api.SourceSpec) { s.Commit, s.Tag = "", "v1" })
	f.awaitApplied("shop", second)
	if n := len(f.revisions("shop")); n != 5 {
		t.Errorf("%d revisions", n)
	}
	if a, _ := api.Get[*corev1.ConfigMap](f.store.View(), "default", "a"); a.Data["x"] != "2" {
		t.Errorf("a is %v", a.Data)
	}
}

func TestFollowFileURL(t *testing.T) {
	f := newWorld(t).follow()
	dir, hash := f.repository("shop")
	f.external("shop", "file://"+dir)
	f.awaitApplied("shop", hash)
}

// Another path is another meaning of the same commit.
func TestPathChange(t *testing.T) {
	f := newWorld(t).follow()
	dir, _ := f.repository("shop")
	hash := write(t, dir, "sub/sub.cue", "package sub\n"+configMap("sub", "1"))
	f.external("shop", dir)
	f.awaitApplied("shop", hash)
	f.respec("shop", func(s *api.SourceSpec) { s.Path = "sub" })
	f.awaitApplied("shop", hash)
	if f.exists(api.ConfigMaps, "a") || !f.exists(api.ConfigMaps, "sub") {
		t.Error("the objects of the old path are in force")
	}
	f.respec("shop", func(s *api.SourceSpec) { s.Path = "absent" })
	f.awaitReason("shop", delivery.ReasonCompileError)
	if !f.exists(api.ConfigMaps, "sub") {
		t.Error("a refusal changed something")
	}
}

func TestRepositoryVanishesAndReturns(t *testing.T) {
	f := newWorld(t).follow()
	dir, hash := f.repository("shop")
	f.external("shop", dir)
	f.awaitApplied("shop", hash)
	was := condition(f.store.View(), "shop")
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	begun := time.Now().Truncate(time.Second)
	f.sync("shop")
	c := f.awaitReason("shop", delivery.ReasonFetchError)
	if c.Status != metav1.ConditionFalse || c.LastTransitionTime.Time.Before(begun) {
		t.Errorf("%+v", c)
	}
	contains(t, c.Message, dir)
	if src := f.source("shop"); src.Status.Applied != hash || !f.exists(api.ConfigMaps, "a") {
		t.Errorf("something else changed: %+v", src.Status)
	}
	revision := f.store.View().Revision()
	for range 20 {
		f.sync("shop")
	}
	if now := f.store.View().Revision(); now != revision {
		t.Errorf("20 failing polls moved the state from %d to %d", revision, now)
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	f.sync("shop")
	f.awaitApplied("shop", hash)
	if c := condition(f.store.View(), "shop"); c.Message != was.Message {
		t.Errorf("%q, was %q", c.Message, was.Message)
	}
	if n := len(f.revisions("shop")); n != 1 {
		t.Errorf("%d revisions", n)
	}
}

func TestGarbageChangesNothing(t *testing.T) {
	f := newWorld(t).follow()
	dir, hash := f.repository("shop")
	f.external("shop", dir)
	f.awaitApplied("shop", hash)
	next := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	object := filepath.Join(dir, ".git", "objects", next[:2], next[2:])
	if err := os.Chmod(object, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(object, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.sync("shop")
	f.awaitReason("shop", delivery.ReasonFetchError)
	if src := f.source("shop"); src.Status.Applied != hash || !f.exists(api.ConfigMaps, "a") {
		t.Errorf("%+v", src.Status)
	}
}

func TestRewindIsRefusedUntilPinned(t *testing.T) {
	f := newWorld(t).follow()
	dir, _ := f.repository("shop")
	second := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	f.external("shop", dir)
	f.awaitApplied("shop", second)
	mustGit(t, nil, dir, "reset", "-q", "--hard", "HEAD^")
	other := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "3"))
	f.sync("shop")
	c := f.awaitReason("shop", delivery.ReasonRewound)
	contains(t, c.Message, other[:7], second[:7], "spec.commit")
	revision := f.store.View().Revision()
	f.sync("shop")
	f.sync("shop")
	if now := f.store.View().Revision(); now != revision || f.source("shop").Status.Applied != second {
		t.Errorf("the state moved from %d to %d, at %s", revision, now, f.source("shop").Status.Applied)
	}
	f.respec("shop", func(s *api.SourceSpec) { s.Commit = other })
	f.awaitApplied("shop", other)
	f.respec("shop", func(s *api.SourceSpec) { s.Commit = "" })
	f.awaitApplied("shop", other)
}

func TestSuspendAndResume(t *testing.T) {
	f := newWorld(t).follow()
	dir, first := f.repository("shop")
	f.external("shop", dir)
	f.awaitApplied("shop", first)
	suspend := func(s *api.Suspension) {
		src := api.Clone(f.source("shop"))
		src.Status.Suspended = s
		f.mutate(api.Guarded(api.UpdateStatus, src))
	}
	suspend(&api.Suspension{By: "bob", At: metav1.Now()})
	contains(t, f.awaitReason("shop", delivery.ReasonSuspended).Message, "suspended by bob")
	fetches := f.fetcher.fetches()
	second := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	if err := f.follower.Sync("shop"); !errors.Is(err, delivery.ErrSuspended) {
		t.Errorf("sync: %v", err)
	}
	suspend(nil)
	f.awaitApplied("shop", second)

	f.respec("shop", func(s *api.SourceSpec) { s.Suspend = true })
	contains(t, f.awaitReason("shop", delivery.ReasonSuspended).Message, "its own spec")
	third := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "3"))
	f.respec("shop", func(s *api.SourceSpec) { s.Suspend = false })
	f.awaitApplied("shop", third)
	if n := f.fetcher.fetches() - fetches; n != 2 {
		t.Errorf("%d fetches, want one for each resumption", n)
	}
}

// A suspension that arrives while a poll writes its result is not overwritten.
func TestReportKeepsSuspension(t *testing.T) {
	f := newWorld(t).follow()
	dir, hash := f.repository("shop")
	var once sync.Once
	f.store.onPropose(func(txn command.Txn) error {
		if txn.Commit != nil || txn.Actor != "git/shop" {
			return nil
		}
		once.Do(func() {
			src := api.Clone(f.source("shop"))
			src.Status.Suspended = &api.Suspension{By: "bob", At: metav1.Now()}
			f.mutate(api.Guarded(api.UpdateStatus, src))
		})
		return nil
	})
	f.external("shop", dir)
	f.awaitReason("shop", delivery.ReasonSuspended)
	if src := f.source("shop"); src.Status.Suspended == nil || src.Status.Applied != hash {
		t.Errorf("%+v", src.Status)
	}
}

func TestSourceGoesAndComesBack(t *testing.T) {
	f := newWorld(t).follow()
	dir, hash := f.repository("shop")
	f.external("shop", dir, func(s *api.SourceSpec) { s.Suspend = true })
	f.awaitReason("shop", delivery.ReasonSuspended)
	f.mutate(api.Mutation{Verb: api.Delete, Key: api.KeyOf(f.source("shop"))})
	if err := f.follower.Sync("shop"); !errors.Is(err, delivery.ErrNoSource) {
		t.Errorf("%v", err)
	}
	f.external("shop", dir)
	f.awaitApplied("shop", hash)
	// The repository moves in, and out again.
	f.respec("shop", func(s *api.SourceSpec) { s.URL = "" })
	if err := f.follower.Sync("shop"); err == nil {
		t.Error("a built-in repository was polled")
	}
	next := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	f.respec("shop", func(s *api.SourceSpec) { s.URL = dir })
	f.awaitApplied("shop", next)
}

// webRepository serves a repository by git's own HTTP server to who knows the
// password or the token.
func (w *world) webRepository(dir, user, password, token string) (url string, ca []byte) {
	w.t.Helper()
	backend := &cgi.Handler{
		Path: filepath.Join(mustGit(w.t, nil, w.dir, "--exec-path"), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + filepath.Dir(dir), "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"},
	}
	h := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		u, p, basic := r.BasicAuth()
		if (basic && u == user && p == password) || r.Header.Get("Authorization") == "Bearer "+token {
			backend.ServeHTTP(rw, r)
			return
		}
		rw.Header().Set("WWW-Authenticate", "Basic realm=git")
		http.Error(rw, "who are you? not "+r.Header.Get("Authorization")+" "+u+":"+p, http.StatusUnauthorized)
	}))
	h.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	w.t.Cleanup(h.Close)
	return h.URL + "/" + filepath.Base(dir) + "/.git", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw})
}

func (w *world) secret(name string, data map[string]string) {
	w.t.Helper()
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: delivery.SystemNamespace, Name: name}, Data: map[string][]byte{}}
	for k, v := range data {
		s.Data[k] = []byte(v)
	}
	w.create(s)
}

func ref(name string) func(*api.SourceSpec) {
	return func(s *api.SourceSpec) { s.SecretRef = &corev1.LocalObjectReference{Name: name} }
}

func TestFollowHTTPSWithCredentials(t *testing.T) {
	f := newWorld(t).follow()
	const password, token = "open-sesame-1", "token-of-many-words-2"
	const wrongPassword, wrongToken = "not-the-password-3", "not-the-token-4"
	dir, hash := f.repository("shop")
	url, ca := f.webRepository(dir, "ann", password, token)
	f.secret("basic", map[string]string{"username": "ann", "password": password, "ca.crt": string(ca)})
	f.secret("token", map[string]string{"token": token, "ca.crt": string(ca)})
	f.secret("wrong-basic", map[string]string{"username": "ann", "password": wrongPassword, "ca.crt": string(ca)})
	f.secret("wrong-token", map[string]string{"token": wrongToken, "ca.crt": string(ca)})
	f.secret("no-ca", map[string]string{"token": token})

	f.external("shop", url, ref("wrong-basic"))
	contains(t, f.awaitReason("shop", delivery.ReasonFetchError).Message, "auth")
	f.respec("shop", ref("basic"))
	f.awaitApplied("shop", hash)
	for _, name := range []string{"wrong-token", "no-ca", "absent"} {
		f.respec("shop", ref(name))
		contains(t, f.awaitReason("shop", delivery.ReasonFetchError).Message, map[string]string{
			"wrong-token": "auth", "no-ca": "identity", "absent": `secret "absent" is not in namespace "decree-system"`,
		}[name])
		f.respec("shop", ref("token"))
		f.awaitApplied("shop", hash)
	}
	next := write(t, dir, "shop.cue", "package shop\n"+configMap("a", "2"))
	f.sync("shop")
	f.awaitApplied("shop", next)

	f.stop()
	var all strings.Builder
	all.WriteString(f.log.String())
	for _, resource := range []api.Resource{api.Sources, api.Revisions, api.Events} {
		for o := range f.store.View().List(resource, "") {
			data, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			all.Write(data)
		}
	}
	err := filepath.WalkDir(filepath.Join(f.dir, "mirror"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		all.Write(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{password, token, wrongPassword, wrongToken} {
		if i := strings.Index(all.String(), s); i >= 0 {
			t.Errorf("a credential was written down: …%s…", all.String()[max(0, i-80):i+len(s)])
		}
	}
}

// The normal way: the external source is itself an object of the built-in
// repository.
func TestSourceDeclaredInGit(t *testing.T) {
	w := newWorld(t)
	f := w.forge(time.Second)
	w.follow()
	dir, first := w.repository("shop")
	write(t, f.work, "base.cue", "package base\n"+configMap("base", "1"))
	write(t, f.work, "sources.cue", `package base
shop: {apiVersion: "decree.dev/v1", kind: "Source", metadata: name: "shop", spec: {url: "`+dir+`", interval: "1h"}}
`)
	f.mustPush()
	f.awaitApplied("shop", first)
	a, _ := api.Get[*corev1.ConfigMap](w.store.View(), "default", "a")
	if origin, _ := api.OriginOf(a); origin.Source != "shop" || origin.Commit != first {
		t.Errorf("origin %+v", origin)
	}
	// Its objects are in force, so it cannot go.
	mustGit(t, nil, f.work, "rm", "-q", "sources.cue")
	mustGit(t, nil, f.work, "commit", "-q", "-m", "no shop")
	out, err := f.push()
	if err == nil {
		t.Fatal("it was removed")
	}
	contains(t, out, "would be deleted while 1 of its objects are in force")
	// Its objects go first, then it.
	mustGit(t, nil, f.work, "reset", "-q", "--hard", "HEAD^")
	mustGit(t, nil, dir, "rm", "-q", "shop.cue")
	mustGit(t, nil, dir, "commit", "-q", "--allow-empty", "-m", "close the shop\n\nDecree-Allow-Deletions: 1")
	last := mustGit(t, nil, dir, "rev-parse", "HEAD")
	write(t, f.work, "sources.cue", `package base
shop: {apiVersion: "decree.dev/v1", kind: "Source", metadata: name: "shop", spec: {url: "`+dir+`", interval: "2h"}}
`)
	f.mustPush() // another spec: it is polled at once
	f.awaitApplied("shop", last)
	if w.exists(api.ConfigMaps, "a") {
		t.Error("its object is still there")
	}
	mustGit(t, nil, f.work, "rm", "-q", "sources.cue")
	mustGit(t, nil, f.work, "commit", "-q", "-m", "no shop")
	f.mustPush()
	if _, ok := api.Get[*api.Source](w.store.View(), "", "shop"); ok {
		t.Error("it was not removed")
	}
	if n := len(w.revisions("shop")); n != 2 {
		t.Errorf("%d revisions are left of it", n)
	}
}

// What another source was in the way of comes into force when that has gone.
func TestRefusedCommitIsTriedAgainWhenAsked(t *testing.T) {
	f := newWorld(t).follow()
	f.applied(commit("taken", tree(configMap("a", "mine")+configMap("b", "mine"))))
	dir, hash := f.repository("shop")
	f.external("shop", dir)
	contains(t, f.awaitReason("shop", delivery.ReasonPlanRefused).Message, `comes from source "decree"`)
	f.applied(commit("free", tree(configMap("b", "mine"))))
	f.sync("shop")
	f.awaitApplied("shop", hash)
	results := []string{}
	for _, r := range f.revisions("shop") {
		results = append(results, r.Result)
	}
	if !slices.Equal(results, []string{api.RevisionRefused, api.RevisionApplied}) {
		t.Errorf("%v", results)
	}
}

// What a Secret holds for ssh reaches the fetch as it is; gitsource's TestFetchSSH
// shows what the fetch does with it.
func TestFollowSSHCredentials(t *testing.T) {
	f := newWorld(t).follow()
	f.secret("ssh", map[string]string{"identity": "a key", "known_hosts": "a host"})
	f.fetcher.answer(func(int) (*gitsource.Fetched, error) { return nil, errors.New("no such host") })
	f.external("shop", "ssh://git@git.example.com/shop.git", ref("ssh"))
	f.awaitReason("shop", delivery.ReasonFetchError)
	f.fetcher.mu.Lock()
	defer f.fetcher.mu.Unlock()
	if a := f.fetcher.remote.Auth; string(a.SSHKey) != "a key" || string(a.KnownHosts) != "a host" {
		t.Errorf("the fetch got %q and %q", a.SSHKey, a.KnownHosts)
	}
}
