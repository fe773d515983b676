package gitsource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path"
	"path/filepath"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/sideband"
)

// Remote is an external repository and what to follow in it: a branch, a tag or a
// commit. With none of the three it is the repository's own default branch.
type Remote struct {
	// URL is an absolute path, file://, https://, ssh:// or user@host:path. http:// is
	// for loopback only.
	URL    string
	Branch string // "main"
	Tag    string // "v1.2"; annotated tags give their commit
	Commit string // full hash; the commit is fetched once and never again
	Auth   Auth
	// Last is the commit that was applied last, "" for none. A fetched commit that
	// does not descend from it is reported as rewound.
	Last string
}

// Auth holds the credentials of a Remote, as they come from a Secret. They are kept
// in memory only.
type Auth struct {
	Username   string // for https with Password, and for ssh; "git" for ssh when empty
	Password   string // https basic, ssh password, or passphrase of SSHKey
	Token      string // https bearer token; with Username it is sent as basic password instead
	CA         []byte // PEM certificates that https servers are checked against instead of the system's
	SSHKey     []byte // private key, PEM or OpenSSH
	KnownHosts []byte // known_hosts lines; ssh servers that are not in there are refused
}

// selector says what a Remote follows, for people and for the name of the
// mirror's own reference.
func (r Remote) selector() string {
	switch {
	case r.Commit != "":
		return "commit " + r.Commit
	case r.Tag != "":
		return "tag " + r.Tag
	case r.Branch != "":
		return "branch " + r.Branch
	}
	return "default branch"
}

// validate checks everything that can be said without a connection.
func (r Remote) validate() error {
	n := 0
	for _, s := range []string{r.Branch, r.Tag, r.Commit} {
		if s != "" {
			n++
		}
	}
	if n > 1 {
		return errors.New("give one of branch, tag and commit")
	}
	if r.Commit != "" {
		if _, err := parseHash(strings.ToLower(r.Commit)); err != nil {
			return err
		}
	}
	for _, ref := range []string{"refs/heads/" + r.Branch, "refs/tags/" + r.Tag} {
		if strings.HasSuffix(ref, "/") {
			continue
		}
		if err := plumbing.ReferenceName(ref).Validate(); err != nil {
			return fmt.Errorf("%s is not a reference name", ref)
		}
	}
	return nil
}

// parseURL understands the addresses that git does and this package serves. A path
// comes back with scheme "file".
func parseURL(s string) (*url.URL, error) {
	if filepath.IsAbs(s) {
		return &url.URL{Scheme: "file", Path: filepath.Clean(s)}, nil
	}
	if u, ok := scpURL(s); ok {
		return u, nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("the URL does not parse") // url.Error repeats it, with credentials
	}
	switch u.Scheme {
	case "file":
		if (u.Host != "" && u.Host != "localhost") || !path.IsAbs(u.Path) {
			return nil, errors.New("file:// needs an absolute path, as in file:///srv/shop.git")
		}
	case "https", "ssh":
		if u.Hostname() == "" || u.Path == "" {
			return nil, errors.New("the URL needs a host and a path")
		}
	case "http":
		if !loopbackName(u.Hostname()) {
			return nil, errors.New("http:// is for loopback only, because it neither proves nor hides anything; use https:// or ssh://")
		}
	default:
		return nil, errors.New("use an absolute path, file://, https://, ssh:// or user@host:path")
	}
	if strings.HasPrefix(u.Hostname(), "-") || strings.HasPrefix(u.Path, "-") {
		return nil, errors.New("host and path must not begin with a dash")
	}
	u.RawQuery, u.Fragment = "", ""
	return u, nil
}

// scpURL reads user@host:path.
func scpURL(s string) (*url.URL, bool) {
	if strings.Contains(s, "://") {
		return nil, false
	}
	host, p, ok := strings.Cut(s, ":")
	if !ok || p == "" || p[0] == ':' || strings.Contains(host, "/") {
		return nil, false
	}
	u := &url.URL{Scheme: "ssh", Host: host, Path: p}
	if user, h, ok := strings.Cut(host, "@"); ok {
		u.User, u.Host = url.User(user), h
	}
	if u.Host == "" || strings.HasPrefix(u.Host, "-") {
		return nil, false
	}
	return u, true
}

func loopbackName(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || (ip != nil && ip.IsLoopback())
}

// redact is the address without credentials. Names of users stay for ssh, where
// they are part of the address, and go for https, where a token may be one.
func redact(u *url.URL) string {
	c := *u
	if c.Scheme == "ssh" && c.User != nil {
		c.User = url.User(c.User.Username())
	} else {
		c.User = nil
	}
	if c.Scheme == "file" {
		return c.Path
	}
	return c.String()
}

// session is an open conversation with a remote repository.
type session interface {
	// references lists what the remote offers.
	references(ctx context.Context) (*packp.AdvRefs, error)
	// pack asks for commits and returns the pack that holds what is missing.
	pack(ctx context.Context, wants, haves []plumbing.Hash) (io.ReadCloser, error)
	close() error
}

// open begins a conversation. No byte has been exchanged when it returns, except
// for ssh.
func open(ctx context.Context, u *url.URL, a Auth, m *Mirror) (session, error) {
	switch u.Scheme {
	case "file":
		return openLocal(u.Path, m.limits)
	case "ssh":
		return openSSH(ctx, u, a, m)
	}
	return openHTTP(u, a, m.limits)
}

// resolve finds the commit that a Remote follows among what is offered. exact says
// that the hash is advertised and so can be asked for by any client.
func resolve(adv *packp.AdvRefs, r Remote) (want plumbing.Hash, exact bool, err error) {
	refs := adv.References
	switch {
	case r.Commit != "":
		h := plumbing.NewHash(strings.ToLower(r.Commit))
		for _, o := range refs {
			exact = exact || o == h
		}
		return h, exact, nil
	case r.Tag != "":
		name := "refs/tags/" + r.Tag
		if h, ok := refs[name]; ok {
			return h, true, nil
		}
		return want, false, fmt.Errorf("tag %s: %w", r.Tag, ErrNotFound)
	case r.Branch != "":
		if h, ok := refs["refs/heads/"+r.Branch]; ok {
			return h, true, nil
		}
		return want, false, fmt.Errorf("branch %s: %w", r.Branch, ErrNotFound)
	}
	if adv.Head != nil {
		return *adv.Head, true, nil
	}
	return want, false, fmt.Errorf("default branch: %w", ErrNotFound)
}

// askable says whether the remote hands out commits that it does not advertise.
func askable(adv *packp.AdvRefs) bool {
	return adv.Capabilities.Supports(capability.AllowReachableSHA1InWant) ||
		adv.Capabilities.Supports(capability.Capability("allow-any-sha1-in-want"))
}

// fetchRequestFor builds what is sent to get a pack.
func fetchRequestFor(adv *packp.AdvRefs, wants, haves []plumbing.Hash) *packp.UploadPackRequest {
	req := packp.NewUploadPackRequest()
	for _, c := range []capability.Capability{capability.OFSDelta, capability.NoProgress, capability.Sideband64k} {
		if adv.Capabilities.Supports(c) {
			_ = req.Capabilities.Set(c) // these take no argument, so it cannot fail
		}
	}
	req.Wants = wants
	req.Haves = haves
	return req
}

// packReader undoes the side band of an answer.
func packReader(req *packp.UploadPackRequest, r io.ReadCloser) io.ReadCloser {
	if !req.Capabilities.Supports(capability.Sideband64k) {
		return r
	}
	return readCloser{sideband.NewDemuxer(sideband.Sideband64k, r), r}
}

type readCloser struct {
	io.Reader
	io.Closer
}
