package gitsource

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/go-git/go-git/v5/plumbing"
)

// FollowedRef is the branch of a built-in repository that is in force.
const FollowedRef = "refs/heads/main"

// ServerConfig configures a Server.
type ServerConfig struct {
	Dir      string   // holds NAME.git for every repository
	Receiver Receiver // decides about pushes to FollowedRef
	Limits   Limits
	Logger   *slog.Logger // slog.Default when nil
	// Identity returns who makes a request, "" for nobody, who is refused. When it is
	// nil everybody is "anonymous".
	Identity func(*http.Request) string
	// Authorize may refuse a request to read from or push to a repository; the
	// error's text is shown to the client. When it is nil every identity may do both.
	Authorize func(r *http.Request, repository string, push bool) error
	// AllowForce says whether FollowedRef of a repository may be set to a commit that
	// does not descend from the one in force. When it is nil it may not.
	AllowForce func(repository string) bool
	// References holds the tables of references in force. When it is nil, they are kept
	// in Dir, which is right for a server that is alone.
	References References
	// Replicas are the other servers. When it is nil there are none.
	Replicas Replicas
	// FromServer says whether a request comes from another server of the cluster: such
	// a one may read everything that is stored, also what no reference leads to, and
	// must not push. Authorize is not asked about it. When it is nil no request does.
	FromServer func(*http.Request) bool
}

// Server serves built-in repositories over Git's smart HTTP protocol below /git/.
// It is safe for concurrent use and holds no goroutines between requests.
type Server struct {
	cfg     ServerConfig
	limits  Limits
	log     *slog.Logger
	uploads chan struct{} // one token for each pack in flight
	// Servers have tokens of their own, one side each: otherwise clients could hold up
	// replication, and two servers that fetch from each other wait for each other.
	sends chan struct{}
	pulls chan struct{}

	mu    sync.Mutex
	repos map[string]*repository
}

// repository is one bare repository on disk.
type repository struct {
	name    string
	dir     string
	objects *objectDir
	refs    refDir
	lock    chan struct{} // holds one token; taken by whoever changes the repository
	pulling chan struct{} // holds one token; taken by whoever pulls from another server

	// partial are the newest commits of a long history of which parts have arrived. It
	// belongs to the holder of pulling.
	partial []plumbing.Hash
}

var repositoryName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// ValidName says whether a repository may have this name: lower-case letters,
// digits, "-" and ".", as in the names of objects.
func ValidName(name string) bool {
	return repositoryName.MatchString(name) && !strings.Contains(name, "..") && !strings.HasSuffix(name, ".git")
}

// NewServer opens the folder of built-in repositories, creating it if needed, and
// removes what interrupted pushes left there.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Receiver == nil {
		return nil, errors.New("git server: no Receiver")
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("git server: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	s := &Server{cfg: cfg, limits: cfg.Limits.withDefaults(), log: cfg.Logger, repos: make(map[string]*repository)}
	for _, tokens := range []*chan struct{}{&s.uploads, &s.sends, &s.pulls} {
		*tokens = make(chan struct{}, s.limits.Uploads)
	}
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("git server: %w", err)
	}
	for _, e := range entries {
		if err := tidy(filepath.Join(cfg.Dir, e.Name())); e.IsDir() && err != nil {
			return nil, fmt.Errorf("git server: %s: %w", e.Name(), err)
		}
	}
	return s, nil
}

// Init creates an empty repository. One that exists is left as it is.
func (s *Server) Init(ctx context.Context, name string) error {
	if !ValidName(name) {
		return fmt.Errorf("create repository %q: use lower-case letters, digits, '-' and '.'", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := initBare(filepath.Join(s.cfg.Dir, name+".git")); err != nil {
		return fmt.Errorf("create repository %q: %w", name, err)
	}
	return nil
}

// tidy removes what an interrupted push, pull or import has left.
func tidy(dir string) error {
	if strings.HasPrefix(filepath.Base(dir), importPrefix) {
		return os.RemoveAll(dir)
	}
	return removeQuarantines(dir)
}

// initBare lays out a bare repository that Git's own tools can read. The file that
// makes it one, HEAD, comes last, so a crash leaves none or a whole one.
func initBare(dir string) error {
	head := filepath.Join(dir, "HEAD")
	if _, err := os.Stat(head); err == nil {
		return nil
	}
	for _, sub := range []string{"objects/pack", "objects/info", "refs/heads", "refs/tags"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.FromSlash(sub)), 0o700); err != nil {
			return err
		}
	}
	config := "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n[gc]\n\tauto = 0\n"
	if err := writeDurable(filepath.Join(dir, "config"), []byte(config)); err != nil {
		return err
	}
	for _, sub := range []string{"objects", "refs"} {
		if err := syncDir(filepath.Join(dir, sub)); err != nil {
			return err
		}
	}
	if err := writeDurable(head, []byte("ref: "+FollowedRef+"\n")); err != nil {
		return err
	}
	return syncParents(dir, filepath.Dir(dir))
}

// repository finds a repository by name.
func (s *Server) repository(name string) (*repository, error) {
	if !ValidName(name) {
		return nil, fmt.Errorf("repository %q: %w", name, ErrNotFound)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.repos[name]; ok {
		return r, nil
	}
	dir := filepath.Join(s.cfg.Dir, name+".git")
	if _, err := os.Stat(filepath.Join(dir, "HEAD")); err != nil {
		return nil, fmt.Errorf("repository %q: %w", name, ErrNotFound)
	}
	r := openRepository(name, dir)
	s.repos[name] = r
	return r, nil
}

func openRepository(name, dir string) *repository {
	r := &repository{name: name, dir: dir, objects: newObjectDir(dir), refs: refDir{dir},
		lock: make(chan struct{}, 1), pulling: make(chan struct{}, 1)}
	r.lock <- struct{}{}
	r.pulling <- struct{}{}
	return r
}

// acquire takes the right to change the repository. release may be called twice.
func (r *repository) acquire(ctx context.Context) (release func(), err error) {
	select {
	case <-r.lock:
		var once sync.Once
		return func() { once.Do(func() { r.lock <- struct{}{} }) }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another push to %s: %w", r.name, context.Cause(ctx))
	}
}

// Commit opens any commit stored in a repository: after a restart, for a rollback,
// for an audit. A commit that is not stored is ErrNotFound.
func (s *Server) Commit(_ context.Context, name, hash string) (*Commit, error) {
	r, err := s.repository(name)
	if err != nil {
		return nil, err
	}
	h, err := parseHash(hash)
	if err != nil {
		return nil, err
	}
	c, err := openCommit(r.objects, h)
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", name, err)
	}
	return c, nil
}

// Log lists up to max commits reachable from a commit, newest first. With from ""
// it begins at the commit in force.
func (s *Server) Log(ctx context.Context, name, from string, max int) ([]*Commit, error) {
	r, err := s.repository(name)
	if err != nil {
		return nil, err
	}
	if from == "" {
		if from, err = s.cfg.Receiver.Head(ctx, name); err != nil || from == "" {
			return nil, err
		}
	}
	h, err := parseHash(from)
	if err != nil {
		return nil, err
	}
	list, err := history(ctx, r.objects, h, max)
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", name, err)
	}
	return list, nil
}

// head returns the followed branch, zero before the first commit.
func (s *Server) head(ctx context.Context, name string) (plumbing.Hash, error) {
	text, err := s.cfg.Receiver.Head(ctx, name)
	if err != nil {
		return plumbing.ZeroHash, fmt.Errorf("commit in force of %s: %w", name, err)
	}
	if text == "" {
		return plumbing.ZeroHash, nil
	}
	h, err := parseHash(text)
	if err != nil {
		return h, fmt.Errorf("commit in force of %s: %w", name, err)
	}
	return h, nil
}
