package gitsource

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
)

// DefaultInterval is how often an external repository is asked when its source does
// not say.
const DefaultInterval = 30 * time.Second

// Jitter spreads an interval by 10% to both sides, so that sources that began
// together do not ask together for ever.
func Jitter(interval time.Duration) time.Duration {
	return interval + time.Duration((rand.Float64()*0.2-0.1)*float64(interval))
}

// MirrorConfig configures a Mirror.
type MirrorConfig struct {
	Dir    string // holds a bare repository for every address
	Limits Limits
	Logger *slog.Logger // slog.Default when nil
}

// Mirror keeps local copies of external repositories. It is safe for concurrent
// use; fetches from one address follow each other. It holds no goroutines between
// calls and writes no credentials to disk.
type Mirror struct {
	cfg    MirrorConfig
	limits Limits
	slots  chan struct{}

	mu    sync.Mutex
	repos map[string]*repository
}

// Fetched is what a Remote follows at the moment.
type Fetched struct {
	*Commit
	// Rewound says that the commit does not descend from Remote.Last: the branch was
	// rewritten, the tag moved, or it is another repository altogether. Whether to
	// follow is the caller's decision.
	Rewound bool
	// Changed says that objects were transferred or the mirror's reference moved.
	Changed bool
}

// NewMirror opens the folder of mirrors, creating it if needed, and removes what
// interrupted fetches left there.
func NewMirror(cfg MirrorConfig) (*Mirror, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("git mirror: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	m := &Mirror{cfg: cfg, limits: cfg.Limits.withDefaults(), repos: make(map[string]*repository)}
	m.slots = make(chan struct{}, m.limits.Uploads)
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("git mirror: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(cfg.Dir, e.Name())
		if e.IsDir() {
			err = removeQuarantines(path)
		} else if strings.HasPrefix(e.Name(), "known-hosts-") {
			err = os.Remove(path)
		}
		if err != nil {
			return nil, fmt.Errorf("git mirror: %w", err)
		}
	}
	return m, nil
}

// repository opens or creates the mirror of an address. Its folder is named after
// the address without credentials, so new credentials find the old mirror.
func (m *Mirror) repository(u *url.URL) (*repository, error) {
	sum := sha256.Sum256([]byte(redact(u)))
	name := hex.EncodeToString(sum[:12])
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.repos[name]; ok {
		return r, nil
	}
	dir := filepath.Join(m.cfg.Dir, name+".git")
	if err := initBare(dir); err != nil {
		return nil, fmt.Errorf("create mirror: %w", err)
	}
	r := openRepository(redact(u), dir)
	m.repos[name] = r
	return r, nil
}

// Commit opens a commit that an earlier Fetch of the address stored, without
// asking the remote: after a restart, for a rollback, for an audit.
func (m *Mirror) Commit(_ context.Context, address, hash string) (*Commit, error) {
	u, err := parseURL(address)
	if err != nil {
		return nil, err
	}
	repo, err := m.repository(u)
	if err != nil {
		return nil, err
	}
	h, err := parseHash(hash)
	if err != nil {
		return nil, err
	}
	return openCommit(repo.objects, h)
}

// Fetch brings the mirror up to date and returns the commit that the remote's
// branch, tag or commit stands for, with all of its history stored. Errors are
// *FetchError; after one the mirror is as before. It takes at most Limits.Time.
func (m *Mirror) Fetch(ctx context.Context, r Remote) (*Fetched, error) {
	u, err := parseURL(r.URL)
	if err != nil {
		return nil, &FetchError{Cause: CauseInvalid, URL: "the given URL", Err: err, secrets: secretsOf(nil, r.Auth)}
	}
	fail := func(cause Cause, err error) (*Fetched, error) {
		return nil, &FetchError{Cause: cause, URL: redact(u), Err: err, secrets: secretsOf(u, r.Auth)}
	}
	if err := r.validate(); err != nil {
		return fail(CauseInvalid, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.limits.Time, fmt.Errorf("it took longer than %s", m.limits.Time))
	defer cancel()
	repo, err := m.repository(u)
	if err != nil {
		return fail(CauseLocal, err)
	}
	release, err := repo.acquire(ctx)
	if err != nil {
		return fail(CauseUnreachable, err)
	}
	defer release()
	f, err := m.fetch(ctx, repo, u, r)
	if err != nil {
		if ctx.Err() != nil {
			return fail(CauseUnreachable, context.Cause(ctx))
		}
		return fail(classify(err), err)
	}
	return f, nil
}

func (m *Mirror) fetch(ctx context.Context, repo *repository, u *url.URL, r Remote) (*Fetched, error) {
	if r.Commit != "" { // pinned: once stored, nothing can change it
		h := plumbing.NewHash(strings.ToLower(r.Commit))
		if c, err := openCommit(repo.objects, h); err == nil {
			return m.fetched(ctx, repo, c, r, false)
		}
	}
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	s, err := open(ctx, u, r.Auth, m)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.close() }() // the conversation is over; how it ends says nothing
	adv, err := s.references(ctx)
	if err != nil {
		return nil, err
	}
	want, exact, err := resolve(adv, r)
	if err != nil {
		return nil, err
	}
	target, changed, err := m.take(ctx, repo, s, adv, want, exact, r)
	if err != nil {
		return nil, err
	}
	c, err := openCommit(repo.objects, target)
	if err != nil {
		return nil, err
	}
	return m.fetched(ctx, repo, c, r, changed)
}

// take transfers what is missing for a wanted object, in quarantine until it is
// known to be good, and returns the commit it stands for.
func (m *Mirror) take(ctx context.Context, repo *repository, s session, adv *packp.AdvRefs, want plumbing.Hash, exact bool, r Remote) (target plumbing.Hash, changed bool, err error) {
	ref := mirrorRef(r)
	at, err := repo.refs.get(ref)
	if err != nil {
		return target, false, because(CauseLocal, err)
	}
	stored, err := repo.objects.has(want)
	if err != nil {
		return target, false, because(CauseLocal, err)
	}
	if stored && at == want {
		target, err = commitOf(repo.objects, want)
		return target, false, err
	}
	q, err := newQuarantine(repo.dir, repo.objects)
	if err != nil {
		return target, false, because(CauseLocal, err)
	}
	defer func() {
		if rerr := q.remove(); rerr != nil {
			m.cfg.Logger.Warn("remove quarantine", "mirror", repo.name, "error", rerr)
		}
	}()
	if !stored {
		if err := m.transfer(ctx, repo, q, s, adv, want, exact, r); err != nil {
			return target, false, err
		}
	}
	if target, err = commitOf(q, want); err != nil {
		return target, false, err
	}
	n, err := readNode(q, target)
	if err != nil {
		return target, false, err
	}
	if err := checkFollowed(q, n.tree, m.limits); err != nil {
		return target, false, err
	}
	if err := q.release(); err != nil {
		return target, false, because(CauseLocal, err)
	}
	if err := repo.refs.set(ref, want); err != nil {
		return target, false, because(CauseLocal, err)
	}
	return target, true, nil
}

// transfer fetches a pack into quarantine.
func (m *Mirror) transfer(ctx context.Context, repo *repository, q *quarantine, s session, adv *packp.AdvRefs, want plumbing.Hash, exact bool, r Remote) error {
	wants := []plumbing.Hash{want}
	if !exact && !askable(adv) {
		// The remote hands out only what it advertises: take all branches and tags
		// and look there.
		wants = wants[:0]
		seen := make(map[plumbing.Hash]bool)
		for name, h := range adv.References {
			ours := strings.HasPrefix(name, "refs/heads/") || strings.HasPrefix(name, "refs/tags/")
			if ours && !seen[h] {
				seen[h] = true
				wants = append(wants, h)
			}
		}
		plumbing.HashesSort(wants)
	}
	haves, err := repo.tips()
	if err != nil {
		return because(CauseLocal, err)
	}
	pack, err := s.pack(ctx, wants, haves)
	if err != nil {
		if !exact {
			return because(CauseNotFound, fmt.Errorf("%s: the remote does not hand it out: %w", r.selector(), err))
		}
		return err
	}
	err = q.receivePack(ctx, pack, m.limits)
	if cerr := pack.Close(); err == nil && cerr != nil && !errors.Is(cerr, io.EOF) {
		err = cerr
	}
	if err != nil {
		return err
	}
	if ok, err := q.has(want); err != nil || !ok {
		return errors.Join(fmt.Errorf("%s: %w", r.selector(), ErrNotFound), err)
	}
	return nil
}

// tips lists the commits that the mirror has, to be spared their objects.
func (r *repository) tips() ([]plumbing.Hash, error) {
	refs, err := r.refs.list()
	if err != nil {
		return nil, err
	}
	var list []plumbing.Hash
	for _, h := range refs {
		if c, err := commitOf(r.objects, h); err == nil {
			list = append(list, c)
		}
	}
	plumbing.HashesSort(list)
	return list[:min(len(list), 256)], nil
}

// mirrorRef is where a mirror keeps what it has fetched for a selector. Branch and
// tag names are hashed: remotes may have both "a" and "a/b".
func mirrorRef(r Remote) string {
	sum := sha256.Sum256([]byte(r.selector()))
	return "refs/decree/" + hex.EncodeToString(sum[:12])
}

// commitOf follows annotated tags to a commit.
func commitOf(r objectReader, h plumbing.Hash) (plumbing.Hash, error) {
	for range 10 {
		kind, data, err := r.read(h)
		switch {
		case err != nil:
			return h, err
		case kind == plumbing.CommitObject:
			return h, nil
		case kind != plumbing.TagObject:
			return h, because(CauseNotFound, fmt.Errorf("%s is a %s, not a commit", h, kind))
		}
		if h, _, err = tagLinks(data); err != nil {
			return h, err
		}
	}
	return h, garbagef("tags of tags of tags without end")
}

// fetched compares a commit with the one applied last.
func (m *Mirror) fetched(ctx context.Context, repo *repository, c *Commit, r Remote, changed bool) (*Fetched, error) {
	f := &Fetched{Commit: c, Changed: changed}
	if r.Last == "" || r.Last == c.Hash {
		return f, nil
	}
	last, err := parseHash(r.Last)
	if err != nil {
		return nil, because(CauseInvalid, fmt.Errorf("last applied commit: %w", err))
	}
	ok, err := descends(ctx, repo.objects, plumbing.NewHash(c.Hash), last)
	if err != nil {
		return nil, because(CauseLocal, err)
	}
	f.Rewound = !ok
	return f, nil
}
