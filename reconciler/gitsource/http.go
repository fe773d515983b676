package gitsource

import (
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
)

// agent is how the server names itself in the protocol.
const agent = "decree"

const (
	uploadPack  = "git-upload-pack"  // the client fetches
	receivePack = "git-receive-pack" // the client pushes
)

// writeTimeout is how long one write to a client may block before the client is
// given up.
const writeTimeout = 30 * time.Second

// ServeHTTP answers /git/NAME[.git]/{info/refs,git-upload-pack,git-receive-pack}.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name, action, ok := splitPath(r.URL.Path)
	if !ok {
		http.Error(w, "not a Git request: use /git/NAME.git", http.StatusNotFound)
		return
	}
	push := action == receivePack
	if action == "info/refs" {
		service := r.URL.Query().Get("service")
		if service != uploadPack && service != receivePack {
			http.Error(w, "only Git's smart HTTP protocol is served here; use a git client", http.StatusForbidden)
			return
		}
		push = service == receivePack
	}
	identity := "anonymous"
	if s.cfg.Identity != nil {
		if identity = s.cfg.Identity(r); identity == "" {
			http.Error(w, "who are you? present a client certificate", http.StatusUnauthorized)
			return
		}
	}
	repo, err := s.repository(name)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	fromServer := s.cfg.FromServer != nil && s.cfg.FromServer(r)
	if fromServer && push {
		http.Error(w, "servers read from each other and never push", http.StatusForbidden)
		return
	}
	if s.cfg.Authorize != nil && !fromServer {
		if err := s.cfg.Authorize(r, name, push); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
	}
	s.dispatch(&call{s: s, repo: repo, w: w, r: r, action: action, push: push, identity: identity, fromServer: fromServer})
}

// call is one HTTP request to one repository.
type call struct {
	s        *Server
	repo     *repository
	w        http.ResponseWriter
	r        *http.Request
	action   string
	push     bool
	identity string

	fromServer bool // another server of the cluster asks
}

func (s *Server) dispatch(c *call) {
	if c.action == "info/refs" {
		if c.r.Method != http.MethodGet {
			c.refuse(http.StatusMethodNotAllowed, "use GET")
			return
		}
		c.advertise()
		return
	}
	if c.r.Method != http.MethodPost {
		c.refuse(http.StatusMethodNotAllowed, "use POST")
		return
	}
	if want := "application/x-" + c.action + "-request"; c.r.Header.Get("Content-Type") != want {
		c.refuse(http.StatusUnsupportedMediaType, "the content type must be "+want)
		return
	}
	body, err := c.body()
	if err != nil {
		c.refuse(http.StatusUnsupportedMediaType, err.Error())
		return
	}
	// The wall time of the whole exchange is bounded elsewhere; a server-wide read
	// timeout would cut off large packs.
	ctl := http.NewResponseController(c.w)
	_ = ctl.SetReadDeadline(time.Now().Add(s.limits.Time))
	if c.push {
		c.receive(body)
	} else {
		c.upload(body)
	}
}

func (c *call) refuse(status int, text string) { http.Error(c.w, text, status) }

// body is the request body with gzip undone. What comes out is bounded by whoever
// reads it.
func (c *call) body() (io.Reader, error) {
	switch enc := c.r.Header.Get("Content-Encoding"); enc {
	case "", "identity":
		return c.r.Body, nil
	case "gzip", "x-gzip":
		zr, err := gzip.NewReader(c.r.Body)
		if err != nil {
			return nil, fmt.Errorf("gzip body: %w", err)
		}
		return zr, nil
	default:
		return nil, fmt.Errorf("content encoding %q is not known", enc)
	}
}

func splitPath(path string) (name, action string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/git/")
	if !ok {
		return "", "", false
	}
	name, action, ok = strings.Cut(rest, "/")
	if !ok || (action != "info/refs" && action != uploadPack && action != receivePack) {
		return "", "", false
	}
	return strings.TrimSuffix(name, ".git"), action, true
}

func noCache(h http.Header) {
	h.Set("Cache-Control", "no-cache, max-age=0, must-revalidate")
	h.Set("Expires", "Fri, 01 Jan 1980 00:00:00 GMT")
	h.Set("Pragma", "no-cache")
}

// advertise lists references and capabilities, always in protocol version 0: the
// other versions have no pushes and are not worth a second form.
func (c *call) advertise() {
	adv, err := c.advertisement()
	if err != nil {
		c.s.log.Error("git references", "repository", c.repo.name, "error", err)
		c.refuse(http.StatusInternalServerError, err.Error())
		return
	}
	service := uploadPack
	if c.push {
		service = receivePack
	}
	noCache(c.w.Header())
	c.w.Header().Set("Content-Type", "application/x-"+service+"-advertisement")
	adv.Prefix = [][]byte{[]byte("# service=" + service), {}}
	if err := adv.Encode(&clientWriter{w: c.w}); err != nil {
		c.s.log.Debug("git references not delivered", "repository", c.repo.name, "error", err)
	}
}

func (c *call) advertisement() (*packp.AdvRefs, error) {
	adv := packp.NewAdvRefs()
	refs, _, err := c.s.table(c.r.Context(), c.repo)
	if err != nil {
		return nil, err
	}
	head, lacking, err := c.s.inForce(c.r.Context(), c.repo)
	if err != nil {
		return nil, err
	}
	stored := !head.IsZero() && lacking == nil
	if stored {
		refs[FollowedRef] = head
	}
	adv.References = refs
	if c.push {
		return adv, setCapabilities(adv.Capabilities, "report-status", "delete-refs", "side-band-64k", "quiet", "atomic", "ofs-delta", "agent="+agent)
	}
	if lacking != nil {
		return nil, lacking
	}
	if stored {
		adv.Head = &head
	}
	for name, h := range refs {
		if !strings.HasPrefix(name, "refs/tags/") {
			continue
		}
		if target, ok := c.peel(h); ok {
			adv.Peeled[name] = target
		}
	}
	return adv, setCapabilities(adv.Capabilities, "multi_ack_detailed", "no-done", "side-band-64k", "ofs-delta", "shallow", "no-progress",
		"include-tag", "allow-tip-sha1-in-want", "allow-reachable-sha1-in-want", "symref=HEAD:"+FollowedRef, "agent="+agent)
}

func setCapabilities(list *capability.List, caps ...string) error {
	for _, c := range caps {
		name, value, ok := strings.Cut(c, "=")
		var err error
		if ok {
			err = list.Add(capability.Capability(name), value)
		} else {
			err = list.Set(capability.Capability(name))
		}
		if err != nil {
			return fmt.Errorf("capability %s: %w", c, err)
		}
	}
	return nil
}

// peel follows annotated tags to what they stand for.
func (c *call) peel(h plumbing.Hash) (plumbing.Hash, bool) {
	peeled := false
	for range 10 {
		kind, data, err := c.repo.objects.read(h)
		if err != nil || kind != plumbing.TagObject {
			return h, peeled && err == nil
		}
		if h, _, err = tagLinks(data); err != nil {
			return h, false
		}
		peeled = true
	}
	return h, false
}

// clientWriter gives every write to a client its own deadline, so that a slow
// client is served and a stuck one is given up.
type clientWriter struct {
	w http.ResponseWriter
}

func (c *clientWriter) Write(p []byte) (int, error) {
	_ = http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(writeTimeout))
	return c.w.Write(p)
}
