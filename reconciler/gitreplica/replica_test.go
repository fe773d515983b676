package gitreplica_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/reconciler/gitreplica"
	"decree.dev/decree/reconciler/gitsource"
)

func TestPushIsOnAllServers(t *testing.T) {
	c := newCluster(t, 3)
	work := c.work("one")
	first := c.commit(work, "web", "1")
	c.mustGit(work, "push", "a", "main")
	c.mustGit(work, "tag", "-a", "v1", "-m", "version 1")
	c.mustGit(work, "push", "b", "main:refs/heads/topic", "v1")
	second := c.commit(work, "web", "2")
	c.mustGit(work, "push", "c", "main") // another server than before
	if got := c.applied(); got != second {
		t.Fatalf("%s is in force, want %s", got, second)
	}
	table := c.source().Status.References
	for _, s := range c.servers {
		await(t, "server "+s.id+" has it", func() bool { return s.has(second) })
		await(t, "server "+s.id+" has the references", func() bool { ok, err := s.git.Has(repo, table); return ok && err == nil })
		clone := filepath.Join(c.dir, "clone-"+s.id)
		c.mustGit(c.dir, "clone", "-q", s.url(), clone)
		for rev, want := range map[string]string{"HEAD": second, "origin/topic": first, "v1^{commit}": first} {
			if got := c.mustGit(clone, "rev-parse", rev); got != want {
				t.Errorf("server %s: %s is %s, want %s", s.id, rev, got, want)
			}
		}
		c.mustGit(clone, "fsck", "--strict")
	}
}

func TestOneServerAsksNobody(t *testing.T) {
	c := newCluster(t, 1)
	c.servers[0].onPull(func(context.Context, gitreplica.Peer) error { return errors.New("must not be asked") })
	work := c.work("one")
	hash := c.commit(work, "web", "1")
	c.mustGit(work, "push", "a", "main", "main:topic")
	if c.applied() != hash || c.servers[0].asked != 0 {
		t.Errorf("%q is in force, asked %d times", c.applied(), c.servers[0].asked)
	}
}

// TestMinorityIsDead loses one server of three, and that server its disk.
func TestMinorityIsDead(t *testing.T) {
	c := newCluster(t, 3)
	a, b, dead := c.servers[0], c.servers[1], c.servers[2]
	work := c.work("one")
	c.commit(work, "web", "0")
	c.mustGit(work, "push", "a", "main")
	dead.kill()
	var hash string
	for i := range 3 {
		hash = c.commit(work, "web", fmt.Sprint(i+1))
		c.mustGit(work, "push", "a", "main", fmt.Sprintf("main:refs/heads/topic-%d", i))
	}
	if c.applied() != hash || !a.has(hash) || !b.has(hash) {
		t.Fatalf("%q is in force; a has it: %v, b: %v", c.applied(), a.has(hash), b.has(hash))
	}
	if err := os.RemoveAll(filepath.Join(c.dir, "c")); err != nil {
		t.Fatal(err)
	}
	again := c.start("c")
	c.servers[2] = again
	again.run()
	await(t, "server c has caught up", func() bool {
		ok, err := again.git.Has(repo, c.source().Status.References)
		return err == nil && ok && again.has(hash) && len(again.replica.Behind()) == 0
	})
	a.kill()
	b.kill()
	refs := c.mustGit(work, "ls-remote", again.url())
	contains(t, refs, hash+"\trefs/heads/main", "topic-0", "topic-1", hash+"\trefs/heads/topic-2")
	log := c.mustGit(filepath.Join(c.dir, "c", repo+".git"), "rev-list", "--count", hash)
	if log != "4" {
		t.Errorf("the history has %s commits, want 4", log)
	}
}

func TestNoQuorumChangesNothing(t *testing.T) {
	c := newCluster(t, 3)
	work := c.work("one")
	first := c.commit(work, "web", "1")
	c.mustGit(work, "push", "a", "main", "main:topic")
	table, revision := c.source().Status.References, c.source().ResourceVersion
	refuse := func(_ context.Context, p gitreplica.Peer) error {
		return fmt.Errorf("dial tcp %s: connection refused", p.Address)
	}
	c.servers[1].onPull(refuse)
	c.servers[2].onPull(refuse)
	second := c.commit(work, "web", "2")
	for _, refs := range [][]string{{"main"}, {"main:topic"}, {":topic"}, {"main:other", "HEAD:refs/tags/v1"}} {
		out, err := c.git(work, append([]string{"push", "a"}, refs...)...)
		if err == nil {
			t.Errorf("push of %v succeeded:\n%s", refs, out)
		}
		contains(t, out, "stored on 1 of 3 servers, 2 are needed; nothing has changed", "connection refused")
	}
	if src := c.source(); src.Status.Applied != first || src.Status.References != table || src.ResourceVersion != revision {
		t.Errorf("something has changed: %+v", src.Status)
	}
	refs := c.mustGit(work, "ls-remote", "a")
	if strings.Contains(refs, second) {
		t.Errorf("a refused commit is shown:\n%s", refs)
	}
	// One server more is enough, and the same push succeeds.
	c.servers[2].onPull(nil)
	c.mustGit(work, "push", "a", "main", "main:topic")
	if c.applied() != second {
		t.Errorf("%s is in force, want %s", c.applied(), second)
	}
}

func TestSilentServersDoNotHoldUpForEver(t *testing.T) {
	c := newCluster(t, 3, func(c *cluster) { c.quorum = 200 * time.Millisecond })
	work := c.work("one")
	c.commit(work, "web", "1")
	silent := func(ctx context.Context, _ gitreplica.Peer) error { <-ctx.Done(); return context.Cause(ctx) }
	c.servers[1].onPull(silent)
	c.servers[2].onPull(silent)
	out, err := c.git(work, "push", "a", "main")
	if err == nil || c.applied() != "" {
		t.Errorf("the push succeeded:\n%s", out)
	}
	contains(t, out, "no answer within 200ms", "stored on 1 of 3 servers")
}

// TestAcknowledgedBeforeTheLast: a push does not wait for a server that is slow, and
// that server goes on.
func TestAcknowledgedBeforeTheLast(t *testing.T) {
	c := newCluster(t, 3)
	work := c.work("one")
	hash := c.commit(work, "web", "1")
	slow, proceed := c.servers[2], make(chan struct{})
	slow.onPull(func(ctx context.Context, _ gitreplica.Peer) error {
		<-proceed
		return slow.replica.Pull(ctx, repo, hash, c.servers[0].address)
	})
	c.mustGit(work, "push", "a", "main")
	if slow.has(hash) {
		t.Error("the slow server has it already")
	}
	close(proceed)
	await(t, "the slow server has it", func() bool { return slow.has(hash) })
}

// TestEmptyServerGetsLongHistory in many parts, and breaks off in the middle twice:
// once the connection, once the server.
func TestEmptyServerGetsLongHistory(t *testing.T) {
	c := newCluster(t, 1, func(c *cluster) { c.limits.Objects = 40 })
	work := c.work("one")
	var hash string
	for i := range 40 {
		hash = c.commit(work, fmt.Sprintf("web-%02d", i%7), fmt.Sprint(i))
		if i%5 == 4 {
			c.mustGit(work, "push", "-q", "a", "main", fmt.Sprintf("main:refs/heads/topic-%d", i))
		}
	}
	b := c.start("b")
	c.servers = append(c.servers, b)
	packs := 0
	b.onBody(func(path string, body io.ReadCloser) io.ReadCloser {
		if packs++; packs == 3 {
			return cut{io.LimitReader(body, 500), body}
		}
		return body
	})
	err := b.replica.Obtain(c.ctx(), repo, hash)
	if err == nil || b.has(hash) {
		t.Fatalf("a pull that was cut off: %v", err)
	}
	reached := make(chan struct{})
	packs = 0
	ctx, cancel := context.WithCancel(c.ctx())
	b.onBody(func(path string, body io.ReadCloser) io.ReadCloser {
		if packs++; packs == 2 {
			stop := readerFunc(func([]byte) (int, error) {
				close(reached)
				<-ctx.Done()
				return 0, ctx.Err()
			})
			return cut{io.MultiReader(io.LimitReader(body, 800), stop), body}
		}
		return body
	})
	failed := make(chan error, 1)
	go func() { failed <- b.replica.Obtain(ctx, repo, hash) }()
	select {
	case <-reached:
	case err := <-failed:
		t.Fatalf("the pull ended early: %v", err)
	}
	leftovers := snapshot(t, filepath.Join(c.dir, "b"), filepath.Join(c.dir, "crashed"))
	if leftovers == 0 {
		t.Error("nothing was under way when the server stopped")
	}
	cancel()
	if err := <-failed; err == nil {
		t.Error("the pull succeeded")
	}
	b.close()
	crashed := c.start("crashed")
	c.servers[1] = crashed
	crashed.run()
	await(t, "the server has caught up", func() bool {
		ok, err := crashed.git.Has(repo, c.source().Status.References)
		return err == nil && ok && crashed.has(hash)
	})
	if got := c.mustGit(filepath.Join(c.dir, "crashed", repo+".git"), "rev-list", "--count", hash); got != "40" {
		t.Errorf("the history has %s commits, want 40", got)
	}
	contains(t, c.mustGit(work, "ls-remote", crashed.url()), "topic-4", "topic-39")
	left, _ := filepath.Glob(filepath.Join(c.dir, "crashed", repo+".git", "decree-incoming", "*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// snapshot copies a folder as a crash would leave it, and counts its quarantines.
func snapshot(t *testing.T, from, to string) int {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(to, "*.git", "decree-incoming", "*"))
	return len(left)
}

type cut struct {
	io.Reader
	io.Closer
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestDamagedPackIsRefused flips every part of what another server sends.
func TestDamagedPackIsRefused(t *testing.T) {
	c := newCluster(t, 1)
	work := c.work("one")
	hash := c.commit(work, "web", "1")
	c.mustGit(work, "push", "-q", "a", "main")
	b := c.start("b")
	c.servers = append(c.servers, b)
	var sent []byte
	b.onBody(func(_ string, body io.ReadCloser) io.ReadCloser {
		data, err := io.ReadAll(body)
		if err != nil {
			t.Error(err)
		}
		sent = data
		return cut{bytes.NewReader(nil), body}
	})
	if err := b.replica.Obtain(c.ctx(), repo, hash); err == nil {
		t.Fatal("an empty answer was taken")
	}
	pack := bytes.Index(sent, []byte("PACK"))
	if pack < 0 {
		t.Fatalf("no pack in %q", sent)
	}
	for at := pack; at < len(sent)-4; at += 7 {
		b.onBody(func(_ string, body io.ReadCloser) io.ReadCloser {
			data := slices.Clone(sent)
			data[at] ^= 0x20
			return cut{bytes.NewReader(data), body}
		})
		if err := b.replica.Obtain(c.ctx(), repo, hash); err == nil {
			t.Fatalf("byte %d of %d was flipped and the pack taken", at, len(sent))
		}
		if ok, err := b.git.Has(repo, hash); ok || err != nil {
			t.Fatalf("byte %d was flipped and the commit is there (%v)", at, err)
		}
	}
	b.onBody(nil)
	if err := b.replica.Obtain(c.ctx(), repo, hash); err != nil || !b.has(hash) {
		t.Errorf("the sound pack was not taken: %v", err)
	}
}

// TestUnreachableCommitsAreForServers: users get what references lead to.
func TestUnreachableCommitsAreForServers(t *testing.T) {
	c := newCluster(t, 3)
	work := c.work("one")
	first := c.commit(work, "web", "1")
	c.mustGit(work, "push", "-q", "a", "main")
	refuse := func(context.Context, gitreplica.Peer) error { return errors.New("no") }
	c.servers[1].onPull(refuse)
	c.servers[2].onPull(refuse)
	secret := c.commit(work, "web", "2")
	if out, err := c.git(work, "push", "a", "main"); err == nil {
		t.Fatalf("pushed without a quorum:\n%s", out)
	}
	if !c.servers[0].has(secret) {
		t.Fatal("the commit is not stored, so the test shows nothing")
	}
	other := c.work("two")
	for _, want := range []string{secret, c.mustGit(work, "rev-parse", secret+":web.cue"), c.mustGit(work, "rev-parse", secret+"^{tree}")} {
		out, err := c.git(other, "fetch", "a", want)
		if err == nil {
			t.Errorf("a user fetched %s, which no reference leads to", want)
		}
		contains(t, out, "not our ref")
	}
	c.mustGit(other, "fetch", "-q", "a", first)
	if err := c.servers[1].replica.Pull(c.ctx(), repo, secret, c.servers[0].address); err != nil {
		t.Errorf("a server could not fetch it: %v", err)
	}
	// Servers read and never push.
	pair := c.issue("system:server:a", "system:servers")
	for name, data := range map[string][]byte{"ann.pem": pair.CertPEM, "ann.key": pair.KeyPEM} {
		if err := os.WriteFile(filepath.Join(c.dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := c.git(work, "push", "a", "main:other")
	if err == nil {
		t.Error("a server's certificate may push")
	}
	contains(t, out, "403")
}

func TestConcurrentPushesToDifferentServers(t *testing.T) {
	c := newCluster(t, 3)
	base := c.work("base")
	c.commit(base, "web", "0")
	c.mustGit(base, "push", "-q", "a", "main", "main:topic")
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := map[string][]string{}
	racers := make([]string, 6)
	for i := range racers {
		racers[i] = filepath.Join(c.dir, fmt.Sprintf("racer-%d", i))
		c.mustGit(c.dir, "clone", "-q", c.servers[0].url(), racers[i])
		c.commit(racers[i], "web", fmt.Sprint(i+1))
	}
	for i, work := range racers {
		s, hash := c.servers[i%3], c.mustGit(work, "rev-parse", "HEAD")
		for _, ref := range []string{"main", "topic", fmt.Sprintf("own-%d", i)} {
			wg.Go(func() {
				out, err := c.git(work, "push", s.url(), "main:"+ref)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won[ref] = append(won[ref], hash)
				} else if strings.HasPrefix(ref, "own") {
					t.Errorf("push of %s failed:\n%s", ref, out)
				}
			})
		}
	}
	wg.Wait()
	if len(won["main"]) != 1 || len(won["topic"]) != 1 {
		t.Fatalf("won: %v", won)
	}
	for _, s := range c.servers {
		refs := c.mustGit(base, "ls-remote", s.url())
		for ref, hashes := range won {
			contains(t, refs, hashes[0]+"\trefs/heads/"+ref)
		}
		if !s.has(won["main"][0]) {
			t.Errorf("server %s lacks what is in force", s.id)
		}
	}
}

// TestLaggingServerServesNothingWrong: it gets what it lacks while the client waits,
// or says that it lacks it.
func TestLaggingServerServesNothingWrong(t *testing.T) {
	c := newCluster(t, 3)
	work := c.work("one")
	c.commit(work, "web", "1")
	c.mustGit(work, "push", "-q", "a", "main")
	lagging := c.servers[2]
	lagging.onPull(func(context.Context, gitreplica.Peer) error { return errors.New("not now") })
	hash := c.commit(work, "web", "2")
	c.mustGit(work, "push", "-q", "a", "main")
	if lagging.has(hash) {
		t.Fatal("the server does not lag")
	}
	lagging.onBody(func(_ string, body io.ReadCloser) io.ReadCloser { return cut{strings.NewReader("oops"), body} })
	out, err := c.git(c.dir, "clone", lagging.url(), "clone-1")
	if err == nil {
		t.Errorf("cloned what is not there:\n%s", out)
	}
	lagging.onBody(nil)
	c.mustGit(c.dir, "clone", "-q", lagging.url(), "clone-2")
	if got := c.mustGit(filepath.Join(c.dir, "clone-2"), "rev-parse", "HEAD"); got != hash {
		t.Errorf("cloned %s, want %s", got, hash)
	}
	// A push on top of what it lacked works as well.
	next := c.commit(work, "web", "3")
	c.mustGit(work, "push", "-q", "a", "main")
	last := c.commit(work, "web", "4")
	c.mustGit(work, "push", "-q", "c", "main")
	if c.applied() != last {
		t.Errorf("%s is in force, want %s on %s", c.applied(), last, next)
	}
}

func TestExportAndImport(t *testing.T) {
	c := newCluster(t, 1, func(c *cluster) { c.limits.Objects = 40 })
	a := c.servers[0]
	work := c.work("one")
	var hash string
	for i := range 30 {
		hash = c.commit(work, fmt.Sprintf("web-%02d", i%7), fmt.Sprint(i))
		if i%5 == 4 {
			c.mustGit(work, "push", "-q", "a", "main")
		}
	}
	c.mustGit(work, "tag", "-a", "v1", "-m", "version 1")
	c.mustGit(work, "push", "-q", "a", "v1", "HEAD~3:refs/heads/topic")
	tips := gitsource.Tips{Head: hash, References: c.source().Status.References}
	var backup bytes.Buffer
	if err := a.git.Export(c.ctx(), repo, tips, &backup); err != nil {
		t.Fatal(err)
	}
	b := c.start("b")
	got, err := b.git.Import(c.ctx(), repo, bytes.NewReader(backup.Bytes()))
	if err != nil || got != tips {
		t.Fatalf("import: %+v, %v; want %+v", got, err, tips)
	}
	if !b.has(hash) {
		t.Error("the commit in force is not there")
	}
	refs := c.mustGit(work, "ls-remote", b.url())
	contains(t, refs, hash+"\trefs/heads/main", "refs/tags/v1^{}", "refs/heads/topic")
	if names, err := b.git.Names(); err != nil || !slices.Equal(names, []string{repo}) {
		t.Errorf("names: %v, %v", names, err)
	}
	if _, err := b.git.Import(c.ctx(), repo, bytes.NewReader(backup.Bytes())); !errors.Is(err, gitsource.ErrExists) {
		t.Errorf("import over a repository: %v", err)
	}
	b.close()
	for at := 0; at < backup.Len(); at += 1 + backup.Len()/11 {
		for what, data := range map[string][]byte{"flipped": flip(backup.Bytes(), at), "cut off": backup.Bytes()[:at]} {
			if _, err := a.git.Import(c.ctx(), "restored", bytes.NewReader(data)); err == nil {
				t.Fatalf("an export %s at byte %d of %d was imported", what, at, backup.Len())
			}
		}
	}
	if names, err := a.git.Names(); err != nil || !slices.Equal(names, []string{repo}) {
		t.Errorf("a refused import left a repository: %v, %v", names, err)
	}
	left, _ := filepath.Glob(filepath.Join(c.dir, "a", ".importing-*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func flip(data []byte, at int) []byte {
	out := slices.Clone(data)
	out[at] ^= 0x04
	return out
}
