package gitsource

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"
)

// Origin is another server of the cluster, to pull from.
type Origin struct {
	URL    string       // "https://10.0.0.2:7443", without /git/
	Client *http.Client // of OriginClient
}

// OriginClient returns a client for any number of Origins, which keeps connections
// open between pulls; CloseIdleConnections ends them. cfg holds the certificate of
// this server and says which ones of others to trust.
func OriginClient(cfg *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSHandshakeTimeout:   dialTimeout,
			ResponseHeaderTimeout: headerTimeout,
			IdleConnTimeout:       time.Minute,
			ForceAttemptHTTP2:     true,
			TLSClientConfig:       cfg,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("a server sends us elsewhere, which servers do not do")
		},
	}
}

// Pull brings an object, a commit or a table of references, from another server into
// a repository, with all that it stands on, and creates the repository if needed.
// What comes is checked like a push; when Pull returns nil it is synced to disk, and
// when it was stored already nothing is asked of anybody. haves are commits and tables
// that are likely to be stored here, which spares sending what they stand on.
//
// Pull may run while pushes do; pulls into one repository follow each other. It takes
// at most Limits.Time. A long history comes in parts, and those that have arrived stay
// when a later one does not.
func (s *Server) Pull(ctx context.Context, name, hash string, from Origin, haves ...string) error {
	h, err := parseHash(hash)
	if err != nil {
		return fmt.Errorf("pull into %s: %w", name, err)
	}
	if err := s.Init(ctx, name); err != nil {
		return err
	}
	repo, err := s.repository(name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.limits.Time, fmt.Errorf("the pull took longer than %s", s.limits.Time))
	defer cancel()
	if err := s.pull(ctx, repo, h, from, haves); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("pull %s of %s from %s: %w", short(h), name, from.URL, err)
	}
	return nil
}

func (s *Server) pull(ctx context.Context, repo *repository, h plumbing.Hash, from Origin, haves []string) error {
	for _, tokens := range []chan struct{}{repo.pulling, s.pulls} {
		release, err := take(ctx, tokens, tokens == s.pulls)
		if err != nil {
			return err
		}
		defer release()
	}
	if ok, err := repo.stored(h); err != nil || ok {
		return err
	}
	session, err := s.openOrigin(repo, from)
	if err != nil {
		return err
	}
	lim := s.limits
	// Servers send whole objects, and what one push holds at most may be twice what it
	// counts: a commit and its root tree are no files.
	lim.PackBytes, lim.Objects = lim.InflatedBytes+lim.InflatedBytes/64, 2*lim.Objects
	p := &pull{s: s, repo: repo, session: session, lim: lim, haves: slices.Clone(repo.partial)}
	for _, text := range haves {
		if have, err := parseHash(text); err == nil {
			p.know(have)
		}
	}
	if err := p.root(ctx, h); err != nil {
		return err
	}
	repo.partial = nil
	return nil
}

// take takes a token, from a channel that holds them, or by leaving one in a channel
// that is to have room.
func take(ctx context.Context, tokens chan struct{}, leave bool) (release func(), err error) {
	if leave {
		select {
		case tokens <- struct{}{}:
			return func() { <-tokens }, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	select {
	case <-tokens:
		return func() { tokens <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// openOrigin begins to ask another server. Its list of references is not asked for:
// what is pulled is often not in it yet.
func (s *Server) openOrigin(repo *repository, from Origin) (session, error) {
	u, err := url.Parse(strings.TrimSuffix(from.URL, "/") + "/git/" + repo.name)
	if err != nil || u.Host == "" {
		return nil, because(CauseInvalid, fmt.Errorf("%q is not the address of a server", from.URL))
	}
	ep, err := transport.NewEndpoint(u.String())
	if err != nil {
		return nil, because(CauseInvalid, err)
	}
	lim := s.limits
	lim.PackBytes = lim.InflatedBytes
	client := *from.Client
	client.Transport = &boundedTransport{base: from.Client.Transport, lim: lim}
	t, err := githttp.NewClient(&client).NewUploadPackSession(ep, nil)
	if err != nil {
		return nil, err
	}
	adv := packp.NewAdvRefs()
	if err := setCapabilities(adv.Capabilities, "side-band-64k", "ofs-delta", "no-progress"); err != nil {
		return nil, err
	}
	return &httpSession{transport: t, adv: adv, idle: func() {}}, nil
}

// pull is one pull while it is worked on.
type pull struct {
	s       *Server
	repo    *repository
	session session
	lim     Limits
	haves   []plumbing.Hash
}

// know notes what is stored here: a commit, or all that a table points to.
func (p *pull) know(h plumbing.Hash) {
	kind, data, err := p.repo.objects.read(h)
	switch {
	case err != nil:
	case kind == plumbing.CommitObject:
		p.haves = append(p.haves, h)
	case kind == plumbing.BlobObject:
		t, _ := parseTable(data) // another blob is no help
		for _, target := range t.hashes() {
			if c, err := commitOf(p.repo.objects, target); err == nil {
				p.haves = append(p.haves, c)
			}
		}
	}
	p.haves = p.haves[:min(len(p.haves), maxHaves/2)]
}

// root pulls a commit or a table.
func (p *pull) root(ctx context.Context, h plumbing.Hash) error {
	q, err := p.transfer(ctx, []plumbing.Hash{h})
	if err != nil {
		return err
	}
	defer p.drop(q)
	kind, data, err := q.read(h)
	switch {
	case errors.Is(err, plumbing.ErrObjectNotFound): // the first part of a long history
		if err := p.keep(q); err != nil {
			return err
		}
		return p.rest(ctx, []plumbing.Hash{h}, func(q *quarantine) error { return p.check(q, h) })
	case err != nil:
		return err
	case kind == plumbing.CommitObject:
		if err := p.check(q, h); err != nil {
			return err
		}
		return p.keep(q)
	case kind != plumbing.BlobObject:
		return garbagef("%s is a %s, neither a commit nor a table of references", h, kind)
	}
	t, err := parseTable(data)
	if err != nil {
		return err
	}
	if err := p.rest(ctx, t.hashes(), nil); err != nil {
		return err
	}
	return q.release() // a table that is here stands for all that it points to
}

// check looks at a commit that is to come into force like a push does.
func (p *pull) check(q *quarantine, h plumbing.Hash) error {
	n, err := readNode(q, h)
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		return nil // in a later part
	}
	if err != nil {
		return err
	}
	return checkFollowed(q, n.tree, p.s.limits)
}

// rest pulls what is still missing of wants, part by part. What arrives is checked
// before it is kept; check may be nil.
func (p *pull) rest(ctx context.Context, wants []plumbing.Hash, check func(*quarantine) error) error {
	for {
		var missing []plumbing.Hash
		for _, h := range wants {
			ok, err := p.repo.stored(h)
			if err != nil {
				return err
			}
			if !ok {
				missing = append(missing, h)
			}
		}
		if len(missing) == 0 {
			return nil
		}
		q, err := p.transfer(ctx, missing)
		if err != nil {
			return err
		}
		if check != nil {
			err = check(q)
		}
		if err == nil {
			err = p.keep(q)
		}
		p.drop(q)
		if err != nil {
			return err
		}
	}
}

// transfer takes one pack into quarantine.
func (p *pull) transfer(ctx context.Context, wants []plumbing.Hash) (*quarantine, error) {
	pack, err := p.session.pack(ctx, wants, p.haves)
	if err != nil {
		return nil, err
	}
	defer pack.Close()
	q, err := newQuarantine(p.repo.dir, p.repo.objects)
	if err != nil {
		return nil, err
	}
	if err = q.receivePack(ctx, pack, p.lim); err == nil {
		err = p.progress(q, wants)
	}
	if err != nil {
		p.drop(q)
		return nil, err
	}
	return q, nil
}

// progress refuses a pack that brings the pull no further: it would go on for ever.
// What is stored already may come again, after a restart, and shows where to go on.
func (p *pull) progress(q *quarantine, wants []plumbing.Hash) error {
	for _, h := range q.tips() {
		if c, err := commitOf(q, h); err != nil || !slices.Contains(p.haves, c) {
			return err
		}
	}
	for _, h := range wants {
		if ok, err := q.has(h); err != nil || ok {
			return err
		}
	}
	return garbagef("the pack holds nothing of what was asked for, such as %s", wants[0])
}

// keep stores what a transfer has brought.
func (p *pull) keep(q *quarantine) error {
	if err := q.release(); err != nil {
		return err
	}
	for _, h := range q.tips() {
		if c, err := commitOf(p.repo.objects, h); err == nil {
			p.haves = append(p.haves, c)
			p.repo.partial = append(p.repo.partial, c)
		}
	}
	return nil
}

func (p *pull) drop(q *quarantine) {
	if err := q.remove(); err != nil {
		p.s.log.Warn("remove quarantine", "repository", p.repo.name, "error", err)
	}
}
