package gitsource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// origin is an external repository with a working tree, made by a real git.
type origin struct {
	*bench
	work string
}

func newOrigin(t *testing.T) *origin {
	t.Helper()
	o := &origin{bench: &bench{t: t, env: os.Environ(), dir: t.TempDir()}}
	o.work = filepath.Join(o.dir, "origin")
	o.mustGit(o.dir, "init", "-q", "-b", "main", "origin")
	o.commit(o.work, "app.cue", "replicas: 1\n")
	return o
}

func (o *origin) rev(name string) string {
	o.t.Helper()
	return strings.TrimSpace(o.mustGit(o.work, "rev-parse", name))
}

func newTestMirror(t *testing.T, lim Limits) *Mirror {
	t.Helper()
	m, err := NewMirror(MirrorConfig{Dir: t.TempDir(), Limits: lim, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// fetchFile fetches and reads one file of the result.
func fetchFile(t *testing.T, m *Mirror, r Remote, name string) (*Fetched, string) {
	t.Helper()
	f, err := m.Fetch(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	data, err := fs.ReadFile(f.Tree, name)
	if err != nil {
		t.Fatal(err)
	}
	return f, string(data)
}

func wantCause(t *testing.T, err error, want Cause, text ...string) {
	t.Helper()
	if err == nil && want == "" {
		return
	}
	fe, ok := errors.AsType[*FetchError](err)
	if !ok || fe.Cause != want {
		t.Fatalf("want an error of cause %q: %v", want, err)
	}
	mustContain(t, err.Error(), text...)
}

func TestFetchSelectors(t *testing.T) {
	o := newOrigin(t)
	first := o.rev("HEAD")
	o.mustGit(o.work, "tag", "-a", "v1", "-m", "one")
	o.mustGit(o.work, "tag", "light")
	o.mustGit(o.work, "checkout", "-q", "-b", "next/big")
	next := o.commit(o.work, "app.cue", "replicas: 2\n")
	o.mustGit(o.work, "checkout", "-q", "main")
	o.mustGit(o.dir, "clone", "-q", "--bare", "origin", "bare.git")
	o.mustGit(filepath.Join(o.dir, "bare.git"), "pack-refs", "--all")
	for _, address := range []string{o.work, "file://" + o.work, filepath.Join(o.dir, "bare.git")} {
		m := newTestMirror(t, Limits{})
		for _, tt := range []struct {
			r    Remote
			want string
		}{
			{Remote{}, first},
			{Remote{Branch: "main"}, first},
			{Remote{Branch: "next/big"}, next},
			{Remote{Tag: "v1"}, first},
			{Remote{Tag: "light"}, first},
			{Remote{Commit: next}, next},
			{Remote{Commit: strings.ToUpper(first)}, first},
		} {
			tt.r.URL = address
			f, err := m.Fetch(t.Context(), tt.r)
			if err != nil || f.Hash != tt.want {
				t.Errorf("%s %s: %v, %v; want %s", address, tt.r.selector(), f, err, tt.want)
			}
		}
		_, err := m.Fetch(t.Context(), Remote{URL: address, Branch: "none"})
		wantCause(t, err, CauseNotFound, "branch none")
		_, err = m.Fetch(t.Context(), Remote{URL: address, Tag: "none"})
		wantCause(t, err, CauseNotFound, "tag none")
		_, err = m.Fetch(t.Context(), Remote{URL: address, Commit: strings.Repeat("ab", 20)})
		wantCause(t, err, CauseNotFound)
	}
}

func TestFetchFollowsRewindsAndSurvives(t *testing.T) {
	o := newOrigin(t)
	m := newTestMirror(t, Limits{})
	r := Remote{URL: o.work, Branch: "main"}
	f, got := fetchFile(t, m, r, "app.cue")
	if got != "replicas: 1\n" || !f.Changed || f.Rewound {
		t.Errorf("first fetch: %q, %+v", got, f)
	}
	r.Last = f.Hash
	if f, _ = fetchFile(t, m, r, "app.cue"); f.Changed || f.Rewound {
		t.Errorf("nothing happened, but: %+v", f)
	}
	second := o.commit(o.work, "app.cue", "replicas: 2\n")
	f, got = fetchFile(t, m, r, "app.cue")
	if f.Hash != second || got != "replicas: 2\n" || f.Rewound || !f.Changed {
		t.Errorf("second fetch: %q, %+v", got, f)
	}
	r.Last = second
	o.mustGit(o.work, "commit", "-q", "--amend", "-m", "rewritten")
	if f, _ = fetchFile(t, m, r, "app.cue"); !f.Rewound || f.Hash != o.rev("HEAD") {
		t.Errorf("after a rewrite: %+v", f)
	}
	o.mustGit(o.work, "reset", "-q", "--hard", r.Last+"~1")
	if f, _ = fetchFile(t, m, r, "app.cue"); !f.Rewound {
		t.Errorf("after going back: %+v", f)
	}
	// The repository vanishes; what was fetched stays, also for a new process.
	if err := os.Rename(o.work, o.work+".away"); err != nil {
		t.Fatal(err)
	}
	_, err := m.Fetch(t.Context(), r)
	wantCause(t, err, CauseNotFound, o.work)
	again, err := NewMirror(m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	c, err := again.Commit(t.Context(), o.work, second)
	if err != nil || c.Subject != "change app.cue" {
		t.Errorf("stored commit: %+v, %v", c, err)
	}
	f, err = again.Fetch(t.Context(), Remote{URL: o.work, Commit: second})
	if err != nil || f.Hash != second {
		t.Errorf("a pinned commit needs no remote: %v, %v", f, err)
	}
}

// basic asks for user "bot" with password "s3cret/word".
func basic(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != "bot" || p != "s3cret/word" {
			if r.Header.Get("Authorization") != "Bearer t0ken-value" {
				w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
				http.Error(w, "who?", http.StatusUnauthorized)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

func TestFetchHTTPS(t *testing.T) {
	o := newOrigin(t)
	bare := filepath.Join(o.dir, "bare.git")
	o.mustGit(o.dir, "clone", "-q", "--bare", "origin", "bare.git")
	exe, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Fatal(err)
	}
	backend := &cgi.Handler{Path: filepath.Join(strings.TrimSpace(string(exe)), "git-http-backend"),
		Env: []string{"GIT_PROJECT_ROOT=" + o.dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"}}
	srv := httptest.NewTLSServer(basic(backend))
	defer srv.Close()
	ca := certPEM(srv.Certificate().Raw)
	m := newTestMirror(t, Limits{})
	address := srv.URL + "/bare.git"
	good := Auth{Username: "bot", Password: "s3cret/word", CA: ca}
	r := Remote{URL: address, Branch: "main", Auth: good}
	f, got := fetchFile(t, m, r, "app.cue")
	if got != "replicas: 1\n" {
		t.Errorf("fetched %q", got)
	}
	// An update over the wire, with a history to negotiate.
	for i := range 5 {
		o.commit(o.work, "app.cue", fmt.Sprintf("replicas: %d\n", i+2))
	}
	o.mustGit(o.work, "push", "-q", bare, "main")
	r.Last = f.Hash
	if f, got = fetchFile(t, m, r, "app.cue"); got != "replicas: 6\n" || f.Rewound {
		t.Errorf("fetched %q, %+v", got, f)
	}
	log, err := history(t.Context(), f.Tree.(*treeFS).objects, mustHash(t, f.Hash), 100)
	if err != nil || len(log) != 6 {
		t.Errorf("history has %d commits: %v", len(log), err)
	}
	// A commit that no branch names any more is handed out by no plain server.
	_, err = m.Fetch(t.Context(), Remote{URL: address, Commit: strings.Repeat("ab", 20), Auth: good})
	wantCause(t, err, CauseNotFound)
	for name, tt := range map[string]struct {
		auth Auth
		url  string
		want Cause
	}{
		"token":          {Auth{Token: "t0ken-value", CA: ca}, address, ""},
		"token as basic": {Auth{Username: "bot", Token: "s3cret/word", CA: ca}, address, ""},
		"in the URL":     {Auth{CA: ca}, strings.Replace(address, "://", "://bot:s3cret%2Fword@", 1), ""},
		"nobody":         {Auth{CA: ca}, address, CauseAuth},
		"wrong password": {Auth{Username: "bot", Password: "wrong-one", CA: ca}, address, CauseAuth},
		"wrong CA":       {Auth{Username: "bot", Password: "s3cret/word"}, address, CauseIdentity},
		"no repository":  {good, srv.URL + "/none.git", CauseNotFound},
		"no server":      {good, "https://bot:s3cret%2Fword@127.0.0.1:1/x.git", CauseUnreachable},
		"plain http":     {good, "http://bot:s3cret%2Fword@example.org/x.git", CauseInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			m := newTestMirror(t, Limits{})
			f, err := m.Fetch(t.Context(), Remote{URL: tt.url, Branch: "main", Auth: tt.auth})
			wantCause(t, err, tt.want)
			if err == nil {
				if f.Hash != o.rev("main") {
					t.Errorf("fetched %s", f.Hash)
				}
			} else {
				noSecrets(t, err.Error())
			}
			for _, file := range (&bench{t: t, dir: m.cfg.Dir}).allFiles() {
				data, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				noSecrets(t, file+string(data))
			}
		})
	}
}

func noSecrets(t *testing.T, text string) {
	t.Helper()
	for _, s := range []string{"s3cret", "t0ken", "wrong-one"} {
		if strings.Contains(text, s) {
			t.Errorf("credential %q shows in %q", s, text)
		}
	}
}

func (b *bench) allFiles() (list []string) {
	_ = filepath.WalkDir(b.dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			list = append(list, p)
		}
		return err
	})
	return list
}

// TestFetchFromServer fetches from our own server, over plain HTTP on loopback.
func TestFetchFromServer(t *testing.T) {
	b := newBench(t)
	first := b.seed(hello)
	plain := httptest.NewServer(b.server)
	defer plain.Close()
	m := newTestMirror(t, Limits{})
	f, got := fetchFile(t, m, Remote{URL: plain.URL + "/git/shop"}, "sub/dir/one")
	if f.Hash != first.Hash || got != "one\n" {
		t.Errorf("fetched %s with %q", f.Hash, got)
	}
	work := b.clone()
	hash := b.commit(work, "a", "1")
	b.mustGit(work, "push", "-q", "origin", "main")
	f, _ = fetchFile(t, m, Remote{URL: plain.URL + "/git/shop", Last: first.Hash}, "a")
	if f.Hash != hash || f.Rewound {
		t.Errorf("fetched %+v", f)
	}
	f, err := m.Fetch(t.Context(), Remote{URL: plain.URL + "/git/shop", Commit: first.Hash})
	if err != nil || f.Hash != first.Hash {
		t.Errorf("pinned: %v, %v", f, err)
	}
}

// TestFetchTrouble: servers that answer nonsense, too much, or not at all.
func TestFetchTrouble(t *testing.T) {
	b := newBench(t)
	first := b.seed(hello)
	var current atomic.Value
	current.Store("")
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mode := current.Load().(string)
		refs := strings.HasSuffix(r.URL.Path, "/info/refs")
		if mode != "" && !refs { // a server notices that its client is gone only when the body is read
			_, _ = io.Copy(io.Discard, r.Body)
		}
		switch {
		case mode == "page":
			fmt.Fprint(w, "<html>Welcome</html>")
		case mode == "500":
			http.Error(w, "boom", http.StatusInternalServerError)
		case mode == "empty":
		case mode == "endless refs" && refs:
			fmt.Fprint(w, "001e# service=git-upload-pack\n0000")
			fmt.Fprintf(w, "003a%s HEAD\x00no-done\n", first.Hash)
			line := fmt.Sprintf("%s refs/heads/%%07d\n", first.Hash)
			for i := 0; r.Context().Err() == nil; i++ {
				l := fmt.Sprintf(line, i)
				if _, err := fmt.Fprintf(w, "%04x%s", len(l)+4, l); err != nil {
					return
				}
			}
		case mode == "silent" && !refs:
			<-r.Context().Done()
		case mode == "garbage pack" && !refs:
			fmt.Fprint(w, "0008NAK\n")
			fmt.Fprint(w, "0011\x01PACKgarbage!0000")
		case mode == "raw garbage" && !refs:
			fmt.Fprint(w, strings.Repeat("x", 10_000))
		case mode == "empty pack" && !refs:
			fmt.Fprint(w, "0008NAK\n")
			fmt.Fprint(w, "0025\x01PACK\x00\x00\x00\x02\x00\x00\x00\x00\x02\x9d\x08\x82\x3b\xd8\xa8\xea\xb5\x10\xad\x6a\xc7\x5c\x82\x3c\xfd\x3e\xd3\x1e0000")
		case mode == "endless pack" && !refs:
			fmt.Fprint(w, "0008NAK\n")
			chunk := "fff0\x01PACK\x00\x00\x00\x02\x00\x00\x00\x01" + strings.Repeat("x", 0xfff0-5-12)
			for r.Context().Err() == nil {
				if _, err := fmt.Fprint(w, chunk); err != nil {
					return
				}
			}
		default:
			b.server.ServeHTTP(w, r)
		}
	}))
	defer srv.Close()
	defer srv.CloseClientConnections()
	for name, want := range map[string]Cause{
		"page": CauseGarbage, "500": CauseUnreachable, "empty": CauseGarbage, "endless refs": CauseLimit, "silent": CauseUnreachable,
		"garbage pack": CauseGarbage, "raw garbage": CauseGarbage, "empty pack": CauseNotFound, "endless pack": CauseLimit, "": "",
	} {
		t.Run(name, func(t *testing.T) {
			current.Store(name)
			lim := Limits{PackBytes: 4 << 20}
			if name == "silent" {
				lim.Time = 300 * time.Millisecond
			}
			m := newTestMirror(t, lim)
			_, err := m.Fetch(t.Context(), Remote{URL: srv.URL + "/git/shop", Branch: "main"})
			wantCause(t, err, want)
			if want == "" {
				return
			}
			for _, f := range (&bench{t: t, dir: m.cfg.Dir}).allFiles() {
				if base := filepath.Base(f); base != "HEAD" && base != "config" {
					t.Errorf("left behind: %s", f)
				}
			}
		})
	}
}

func TestFetchLimitsAndBrokenRepositories(t *testing.T) {
	o := newOrigin(t)
	for i := range 20 {
		o.commit(o.work, fmt.Sprintf("f%d", i), strings.Repeat("x", 1000))
	}
	_, err := newTestMirror(t, Limits{Objects: 30}).Fetch(t.Context(), Remote{URL: o.work})
	wantCause(t, err, CauseLimit, "more than 30")
	_, err = newTestMirror(t, Limits{ObjectBytes: 500}).Fetch(t.Context(), Remote{URL: o.work})
	wantCause(t, err, CauseLimit)
	_, err = newTestMirror(t, Limits{Files: 10}).Fetch(t.Context(), Remote{URL: o.work})
	wantCause(t, err, CauseLimit, "more than 10 files")
	// Objects are missing in the remote.
	blob := o.rev("HEAD:f3")
	if err := os.Remove(filepath.Join(o.work, ".git", "objects", blob[:2], blob[2:])); err != nil {
		t.Fatal(err)
	}
	_, err = newTestMirror(t, Limits{}).Fetch(t.Context(), Remote{URL: o.work})
	wantCause(t, err, CauseGarbage, blob)
	_, err = newTestMirror(t, Limits{}).Fetch(t.Context(), Remote{URL: t.TempDir()})
	wantCause(t, err, CauseNotFound, "no Git repository")
	o.mustGit(o.dir, "init", "-q", "nothing")
	_, err = newTestMirror(t, Limits{}).Fetch(t.Context(), Remote{URL: filepath.Join(o.dir, "nothing")})
	wantCause(t, err, CauseNotFound, "empty")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = newTestMirror(t, Limits{}).Fetch(ctx, Remote{URL: o.work})
	wantCause(t, err, CauseUnreachable)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("not a cancellation: %v", err)
	}
}

func TestParseURL(t *testing.T) {
	for in, want := range map[string]string{
		"/srv/x.git":                        "/srv/x.git",
		"file:///srv/x.git":                 "/srv/x.git",
		"git@example.org:team/x.git":        "ssh://git@example.org/team/x.git",
		"ssh://bob@example.org:2222/x.git":  "ssh://bob@example.org:2222/x.git",
		"https://u:p@example.org/x.git?a=b": "https://example.org/x.git",
		"http://127.0.0.1:80/x":             "http://127.0.0.1:80/x",
		"http://[::1]/x":                    "http://[::1]/x",
	} {
		u, err := parseURL(in)
		if err != nil || redact(u) != want {
			t.Errorf("%s: %v, %v; want %s", in, u, err, want)
		}
	}
	for _, in := range []string{"", "x.git", "./x", "../x", "git://example.org/x", "http://example.org/x", "http://127.0.0.1.example.org/x",
		"https://", "ssh://-oProxyCommand=x/y", "-oProxyCommand=x:y", "ext::sh -c x", "file://host/x", "https://u:p@%zz/"} {
		if u, err := parseURL(in); err == nil {
			t.Errorf("%q was taken as %v", in, u)
		}
	}
}

func TestRemoteValidation(t *testing.T) {
	m := newTestMirror(t, Limits{})
	for _, r := range []Remote{
		{URL: "/x", Branch: "a", Tag: "b"}, {URL: "/x", Commit: "abc"}, {URL: "/x", Branch: "../x"}, {URL: "/x", Tag: "a b"}, {URL: "x"},
	} {
		_, err := m.Fetch(t.Context(), r)
		wantCause(t, err, CauseInvalid)
	}
}

func TestJitter(t *testing.T) {
	seen := make(map[time.Duration]bool)
	for range 100 {
		d := Jitter(30 * time.Second)
		if d < 27*time.Second || d > 33*time.Second {
			t.Fatalf("%v is not within 10%%", d)
		}
		seen[d] = true
	}
	if len(seen) < 50 {
		t.Errorf("only %d different intervals", len(seen))
	}
}

func TestErrorTextHidesSecrets(t *testing.T) {
	u, err := url.Parse("https://bot:s3cret%2Fword@example.org/x")
	if err != nil {
		t.Fatal(err)
	}
	cause := fmt.Errorf("GET %s: %w", u, fs.ErrNotExist)
	e := &FetchError{Cause: CauseNotFound, URL: redact(u), Err: cause, secrets: secretsOf(u, Auth{})}
	noSecrets(t, e.Error())
	if e.Unwrap() != nil {
		t.Error("an error that shows a secret can be unwrapped")
	}
}
