package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/reconciler/control"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

// BuiltIn is the name of the source, and of the repository, that every cluster has.
const BuiltIn = "cluster"

// pushWatch is how long a push reports the progress of its rollout.
const pushWatch = 2 * time.Minute

// server is the control plane in this process.
type server struct {
	cfg       *Config
	authority *pki.Authority
	store     *raftstore.Store
	compiler  *compile.Process
	pipeline  *delivery.Pipeline
	follower  *delivery.Follower
	git       *gitsource.Server
	mirror    *gitsource.Mirror
	api       *apiserver.Server
	nodes     *nodes
	listener  net.Listener
	metrics   *prometheus.Registry
	fatal     chan error
}

// newServer opens everything the control plane has on disk and listens. It is
// ready to serve when it returns.
func newServer(ctx context.Context, cfg *Config) (_ *server, err error) {
	s := &server{cfg: cfg, metrics: prometheus.NewRegistry(), nodes: &nodes{}, fatal: make(chan error, 1)}
	s.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.listener, err = net.Listen("tcp", cfg.Address); err != nil {
		return nil, fmt.Errorf("API: %w (another cluster? choose another --address)", err)
	}
	if s.authority, err = pki.Open(cfg.dir("pki"), time.Now()); err != nil {
		return nil, err
	}
	s.store, err = raftstore.Open(raftstore.Config{
		Dir: cfg.dir("raft"), NodeID: cfg.Node, Logger: cfg.Log.With("part", "raft"), Metrics: s.metrics,
		Bootstrap: &command.Bootstrap{ServiceCIDR: cfg.ServiceCIDR, PodCIDR: cfg.PodCIDR, NodeMask: 24, DNS: cfg.DNS},
		Fatal:     func(err error) { s.fatal <- err },
	})
	if err != nil {
		return nil, err
	}
	readyCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := s.store.WaitReady(readyCtx); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	// The ranges were settled when the cluster was born, whatever the flags say now.
	born := s.store.View().Settings()
	cfg.ServiceCIDR, cfg.PodCIDR, cfg.DNS = born.ServiceCIDR, born.PodCIDR, born.DNS
	if err := s.bootstrap(ctx); err != nil {
		return nil, err
	}
	if s.compiler, err = NewCompiler(); err != nil {
		return nil, err
	}
	s.pipeline = &delivery.Pipeline{Compiler: s.compiler, Store: replicated.Store{Store: s.store}, Log: cfg.Log.With("part", "delivery")}
	if err := s.openGit(ctx); err != nil {
		return nil, err
	}
	return s, s.newAPI()
}

// NewCompiler returns a compiler whose children are this binary.
func NewCompiler() (*compile.Process, error) {
	return compile.NewProcess(compile.ProcessConfig{})
}

// openGit opens the built-in repositories and the mirrors of external ones.
func (s *server) openGit(ctx context.Context) (err error) {
	receiver := &delivery.Receiver{Pipeline: s.pipeline, Watch: pushWatch}
	s.git, err = gitsource.NewServer(gitsource.ServerConfig{
		Dir: s.cfg.dir("git"), Receiver: receiver, Logger: s.cfg.Log.With("part", "git"),
		Identity: func(r *http.Request) string {
			who, _ := apiserver.IdentityFrom(r.Context())
			return who.Name
		},
		Authorize: func(r *http.Request, repository string, _ bool) error {
			if who, ok := apiserver.IdentityFrom(r.Context()); !ok || !who.Admin() {
				return fmt.Errorf("repository %q: only administrators may use it: who pushes decides what runs", repository)
			}
			return nil
		},
	})
	if err != nil {
		return err
	}
	if err := s.git.Init(ctx, BuiltIn); err != nil {
		return err
	}
	if s.mirror, err = gitsource.NewMirror(gitsource.MirrorConfig{Dir: s.cfg.dir("mirror"), Logger: s.cfg.Log.With("part", "mirror")}); err != nil {
		return err
	}
	s.follower = &delivery.Follower{Pipeline: s.pipeline, Fetcher: s.mirror, Log: s.cfg.Log.With("part", "sources")}
	return nil
}

// newAPI assembles the API server.
func (s *server) newAPI() error {
	host, _, err := net.SplitHostPort(s.cfg.Address)
	if err != nil {
		return err
	}
	pair, err := s.authority.Ensure(s.cfg.dir("pki"), "server", pki.Server(host, "localhost", "127.0.0.1"), time.Now())
	if err != nil {
		return err
	}
	cert, err := pair.TLS()
	if err != nil {
		return err
	}
	admin, err := s.authority.Ensure(s.cfg.dir("pki"), "admin", pki.Admin("admin"), time.Now())
	if err != nil {
		return err
	}
	err = pki.Kubeconfig{Server: s.url(), CA: s.authority.CertPEM(), User: "admin", Pair: admin}.Write(Kubeconfig(s.cfg.Data))
	if err != nil {
		return err
	}
	s.api, err = apiserver.New(apiserver.Config{
		Store: s.store, Nodes: s.nodes, Sources: &sources{s},
		TLS:     &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: s.authority.Pool()},
		Version: s.cfg.Version, Log: s.cfg.Log.With("part", "api"), Registerer: s.metrics,
		Metrics: promhttp.HandlerFor(s.metrics, promhttp.HandlerOpts{}),
		Mount:   map[string]http.Handler{"/git/": s.git},
	})
	return err
}

// url is where the API answers.
func (s *server) url() string { return "https://" + s.listener.Addr().String() }

// bootstrap makes what every cluster has before its first commit.
func (s *server) bootstrap(ctx context.Context) error {
	view := s.store.View()
	var ms []api.Mutation
	for _, o := range []api.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: delivery.SystemNamespace}},
		&api.Source{ObjectMeta: metav1.ObjectMeta{Name: BuiltIn}},
	} {
		if _, ok := view.Get(api.KeyOf(o)); ok {
			continue
		}
		if d := api.KindOf(o).Default; d != nil {
			d(o)
		}
		ms = append(ms, api.Mutation{Verb: api.Create, Key: api.KeyOf(o), Object: o})
	}
	if len(ms) == 0 {
		return nil
	}
	res, err := s.store.Propose(ctx, command.Txn{Time: time.Now().UnixMilli(), Actor: "system", Reason: "bootstrap", Mutations: ms})
	if err != nil {
		return fmt.Errorf("bootstrap: %w", err)
	}
	return res.Err()
}

// seed makes the first commit of the built-in repository from a folder, if it has
// none yet, and brings it into force.
func (s *server) seed(ctx context.Context, folder string) error {
	src, ok := api.Get[*api.Source](s.store.View(), "", BuiltIn)
	if !ok || src.Status.Applied != "" {
		return nil
	}
	if info, err := os.Stat(folder); err != nil {
		return fmt.Errorf("--repo: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("--repo: %s is not a folder", folder)
	}
	commit, err := s.git.Seed(ctx, BuiltIn, os.DirFS(folder), "decree <decree@localhost>", "Import "+filepath.Base(folder))
	if err != nil {
		return fmt.Errorf("--repo %s: %w", folder, err)
	}
	out, err := s.pipeline.Deliver(ctx, delivery.Request{Source: BuiltIn, Commit: commit, Pusher: "system"})
	if err != nil {
		return fmt.Errorf("--repo %s: %w", folder, err)
	}
	var errs []error
	for _, d := range out.Diagnostics {
		errs = append(errs, d)
	}
	return errors.Join(errs...)
}

// run serves until ctx ends or a part fails for good.
func (s *server) run(ctx context.Context, start func(name string, f func(context.Context) error)) {
	start("api", func(ctx context.Context) error { return s.api.Serve(ctx, s.listener) })
	controllers := &control.Controllers{Store: replicated.Store{Store: s.store}, Contacts: contacts{s}, Log: s.cfg.Log.With("part", "control")}
	start("controllers", controllers.Run)
	start("sources", s.follower.Run)
	start("store", func(ctx context.Context) error {
		select {
		case err := <-s.fatal:
			return err
		case <-ctx.Done():
			return nil
		}
	})
}

func (s *server) close() {
	if s.compiler != nil {
		s.compiler.Close()
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.cfg.Log.Error("close store", "err", err)
		}
	}
	if s.listener != nil {
		s.listener.Close()
	}
}

// contacts tells the node controller when nodes were last heard of. A node that
// has not reported since this server started is given its time from then on.
type contacts struct{ *server }

func (c contacts) LastContacts() map[string]time.Time {
	m := map[string]time.Time{}
	for n := range api.List[*corev1.Node](c.store.View(), "") {
		if t := c.api.LastContact(n.Name); !t.IsZero() {
			m[n.Name] = t
		} else {
			m[n.Name] = started
		}
	}
	return m
}

// started is when this process began.
var started = time.Now()

// sources carries out what operators ask of sources.
type sources struct{ *server }

func (s *sources) Sync(_ context.Context, source, _ string) error {
	if src, ok := api.Get[*api.Source](s.store.View(), "", source); ok && src.Spec.URL == "" {
		return apierrors.NewBadRequest(fmt.Sprintf("source %q is a repository of this cluster: a push to it is applied at once, there is nothing to fetch", source))
	}
	err := s.follower.Sync(source)
	if errors.Is(err, delivery.ErrSuspended) {
		return apierrors.NewBadRequest(err.Error())
	}
	return err
}

func (s *sources) Suspend(ctx context.Context, source, user, reason string) error {
	return s.suspension(ctx, source, user, &api.Suspension{By: user, At: metav1.NewTime(time.Now().UTC().Truncate(time.Second)), Reason: reason})
}

func (s *sources) Resume(ctx context.Context, source, user string) error {
	return s.suspension(ctx, source, user, nil)
}

func (s *sources) suspension(ctx context.Context, source, user string, to *api.Suspension) error {
	return known(s.pipeline.Suspend(ctx, source, user, to))
}

// known tells the API in its own words that there is no such source.
func known(err error) error {
	if errors.Is(err, delivery.ErrNoSource) {
		return fmt.Errorf("%w: %w", apiserver.ErrNotFound, err)
	}
	return err
}

func (s *sources) Plan(ctx context.Context, source string, tree fs.FS) (*apiserver.Plan, error) {
	out, err := s.pipeline.DryRun(ctx, source, tree)
	if err != nil {
		return nil, known(err)
	}
	return &apiserver.Plan{Changes: out.Plan.Changes, Unchanged: out.Plan.Unchanged, Refusals: out.Diagnostics}, nil
}
