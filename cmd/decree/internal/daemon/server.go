package daemon

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane/front"
	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/join"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/raftstore/tunnel"
	"decree.dev/decree/reconciler/delivery"
	"decree.dev/decree/reconciler/gitreplica"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

// BuiltIn is the name of the source, and of the repository, that every cluster has.
const BuiltIn = "cluster"

// pushWatch is how long a push reports the progress of its rollout.
const pushWatch = 2 * time.Minute

// gcPercent trades memory for speed: a state is many small objects that live long, and
// marking them is what a busy server does most beside its work. Puts of three servers
// on two cores: 13,400/s with 100, 16,500/s with 300.
const gcPercent = 200

// server is the part of the control plane in this process.
type server struct {
	cfg      *Config
	id       string // in raft
	creds    *credentials
	mux      *peer.Mux
	httpL    net.Listener
	peerL    net.Listener
	agentL   net.Listener
	peers    *peer.Client
	tunnels  *tunnel.Server
	replica  *gitreplica.Replica
	gitPeers *gitPeers
	backups  *backup.Scheduler // nil: none are scheduled
	renewed  chan struct{}     // capacity 1: what this server says of itself has changed
	store    *raftstore.Store
	members  *membership.Keeper
	contacts *contacts
	compiler *compile.Process
	pipeline *delivery.Pipeline
	follower *delivery.Follower
	git      *gitsource.Server
	mirror   *gitsource.Mirror
	api      *apiserver.Server
	nodes    *nodes
	checking chan struct{} // has room for one check of the network
	listener net.Listener
	metrics  *prometheus.Registry
	front    atomic.Pointer[front.Keeper] // nil: no node is in this process, or it is still starting
	fatal    chan error
}

// newServer opens everything the control plane has on disk and listens. It serves
// once run is called.
func newServer(ctx context.Context, cfg *Config) (_ *server, err error) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	s := &server{cfg: cfg, metrics: newRegistry(), fatal: make(chan error, 1), renewed: make(chan struct{}, 1), checking: make(chan struct{}, 1)}
	s.contacts = &contacts{nodes: s.nodeNames}
	s.tunnels = &tunnel.Server{Node: nodeOf, Log: cfg.Log.With("part", "tunnels")}
	s.nodes = &nodes{node: cfg.Node, metrics: exposed(s, cfg.Log.With("part", "metrics")), elsewhere: s.tunnels}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.listener, err = net.Listen("tcp", cfg.Address); err != nil {
		return nil, fmt.Errorf("API: %w (another cluster? choose another --address)", err)
	}
	cfg.advertise(s.listener.Addr().String())
	if s.creds, err = serverCredentials(ctx, cfg); err != nil {
		return nil, err
	}
	if err := s.openStore(); err != nil {
		return nil, err
	}
	if s.compiler, err = NewCompiler(); err != nil {
		return nil, err
	}
	s.pipeline = &delivery.Pipeline{Compiler: s.compiler, Store: replicated.Store{Store: s.store}, Log: cfg.Log.With("part", "delivery")}
	if err := s.openGit(ctx); err != nil {
		return nil, err
	}
	if s.backups, err = s.newScheduler(); err != nil {
		return nil, err
	}
	return s, s.newAPI()
}

// openStore opens the replicated state and what connects it to other servers. A log
// that is damaged is set aside, if there are servers that have another copy: this one
// joins them again, under a new id and without a vote until it has caught up.
func (s *server) openStore() (err error) {
	cfg, keeper := s.cfg, s.creds.keeper
	s.mux = peer.NewMux(s.listener, peer.MuxConfig{TLS: keeper.ServerTLS(), Admit: s.admit, Log: cfg.Log.With("part", "listener")})
	s.httpL, s.peerL, s.agentL = s.mux.Listen("h2", "http/1.1"), s.mux.Listen(peer.ProtocolPeer), s.mux.Listen(tunnel.Protocol)
	s.peers = peer.NewClient(s.dialTLS)
	founder := s.creds.founder != nil
	if s.id, err = serverID(cfg, founder); err != nil {
		return err
	}
	err = s.openRaft(founder)
	if !errors.Is(err, raftstore.ErrCorrupt) {
		return err
	}
	if others := s.otherServers(); len(others) == 0 {
		return fmt.Errorf("%w; no other server is known that has a copy: restore a snapshot into another folder (decree snapshot restore)", err)
	}
	aside, asideErr := raftstore.Abandon(cfg.dir("raft"))
	if asideErr != nil {
		return errors.Join(err, asideErr)
	}
	cfg.Log.Error("the log of this server is damaged: it gets everything from the others again", "error", err, "damaged files", aside)
	if s.id, err = serverID(cfg, false); err != nil {
		return err
	}
	return s.openRaft(false)
}

// dialTLS is how this server shows others who it is.
func (s *server) dialTLS() *tls.Config {
	return pki.RequireGroup(s.creds.keeper.ClientTLS(), pki.GroupServers)
}

// otherServers are the addresses of servers that were known before, this one aside.
func (s *server) otherServers() []string {
	return slices.DeleteFunc(s.knownServers(), func(a string) bool { return a == s.cfg.Advertise })
}

// openRaft opens the store under s.id.
func (s *server) openRaft(founder bool) (err error) {
	cfg := s.cfg
	raftLog := cfg.Log.With("part", "raft")
	storeCfg := raftstore.Config{
		Dir: cfg.dir("raft"), NodeID: s.id, Logger: raftLog, Metrics: s.metrics, Peers: s.peers,
		HeartbeatTimeout: cfg.Heartbeat, MasterKey: cfg.MasterKey,
		Transport: peer.NewRaftTransport(peer.RaftConfig{
			Listener: s.mux.Listen(peer.ProtocolRaft), Address: cfg.Advertise, TLS: s.dialTLS, Log: raftLog,
			Ended: func(who peer.Identity) { s.members.ConnectionEnded(who) },
		}),
		Fatal: func(err error) { s.fatal <- err },
	}
	if founder {
		storeCfg.Bootstrap = cfg.birth()
	}
	// Before the store: its transport asks for it.
	s.members = &membership.Keeper{Peers: s.peers, Self: s.self, Policy: cfg.policy(), Log: cfg.Log.With("part", "servers")}
	s.store, err = raftstore.Open(storeCfg)
	s.members.Store = s.store
	if err == nil {
		s.members.Trouble = s.store.Trouble
	}
	return err
}

// serverID is this server's name in raft: the one that its folder has, or a new one.
// The first server of a cluster is called like its machine.
func serverID(cfg *Config, founder bool) (string, error) {
	id, _, err := raftstore.Identity(cfg.dir("raft"))
	if id != "" || err != nil {
		return id, err
	}
	if founder {
		return cfg.Node, nil
	}
	var b [3]byte
	rand.Read(b[:])
	return cfg.Node + "-" + hex.EncodeToString(b[:]), nil
}

// self is what this server says of itself.
func (s *server) self() membership.Self {
	return membership.Self{
		ID:         s.id,
		ServerSpec: api.ServerSpec{Node: s.cfg.Node, Address: s.cfg.Advertise, Site: s.cfg.Site, NonVoter: s.cfg.NonVoter},
		ServerStatus: api.ServerStatus{
			Version: s.cfg.Version, Format: command.Newest, Issuer: s.creds.keeper.Issuer(), KeyEpoch: s.store.KeyEpoch(),
		},
	}
}

// nodeOf is whose agent a connection is.
func nodeOf(c net.Conn) (string, bool) {
	t, ok := c.(*tls.Conn)
	if !ok || len(t.ConnectionState().VerifiedChains) == 0 {
		return "", false
	}
	role, node, ok := pki.Who(t.ConnectionState().VerifiedChains[0][0])
	return node, ok && role == api.RoleAgent
}

// changedSelf has what this server says of itself told to the cluster.
func (s *server) changedSelf() {
	select {
	case s.renewed <- struct{}{}:
	default:
	}
}

func (s *server) nodeNames() []string {
	var names []string
	for n := range api.List[*corev1.Node](s.store.View(), "") {
		names = append(names, n.Name)
	}
	return names
}

// NewCompiler returns a compiler whose children are this binary.
func NewCompiler() (*compile.Process, error) {
	return compile.NewProcess(compile.ProcessConfig{})
}

// openGit opens the built-in repositories and the mirrors of external ones.
func (s *server) openGit(ctx context.Context) (err error) {
	if s.replica, err = s.newReplica(); err != nil {
		return err
	}
	receiver := &delivery.Receiver{Pipeline: s.pipeline, Watch: pushWatch}
	s.git, err = gitsource.NewServer(gitsource.ServerConfig{
		Dir: s.cfg.dir("git"), Receiver: receiver, Logger: s.cfg.Log.With("part", "git"),
		References: receiver, Replicas: s.replica, FromServer: s.fromServer,
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
	s.replica.Attach(s.git)
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
	joining, err := join.New(join.Config{Cluster: registry{s}, Log: s.cfg.Log.With("part", "join"), Registerer: s.metrics})
	if err != nil {
		return err
	}
	s.api, err = apiserver.New(apiserver.Config{
		Store: s.store, Nodes: s.nodes, Sources: &sources{s}, Heard: s.contacts.heard, Lag: s.store.Lag,
		Version: s.cfg.Version, Log: s.cfg.Log.With("part", "api"), Registerer: s.metrics,
		Ready:   s.ready,
		Metrics: s.nodes.metrics,
		Mount: map[string]http.Handler{
			"/git/": s.git, clusterPath: s.clusterHandler(), join.RenewPath: joining.Renew(),
			backup.Path: &backup.Handler{Source: s.snapshotSource, Log: s.cfg.Log.With("part", "snapshots")},
		},
		Open: map[string]http.Handler{join.JoinPath: joining.Join()},
	})
	return err
}

// ready says why this server cannot serve yet.
func (s *server) ready(context.Context) error {
	if id, _ := s.store.Leader(); id == "" {
		return raftstore.ErrNotLeader
	}
	if s.store.View().Settings() == nil {
		return errNoState
	}
	return nil
}

// url is where the API of this server answers.
func (s *server) url() string { return "https://" + s.listener.Addr().String() }

// writeKubeconfig gives the operators of this machine their credentials, once there
// are any to give, and again when the CA changes.
func (s *server) writeKubeconfig(now time.Time) error {
	issuer, err := s.issuer()
	if err != nil {
		return err
	}
	if !slices.Contains(s.creds.keeper.Trusts(), issuer.Fingerprint()) {
		return nil // this server is still catching up: the CA of its state was given up since
	}
	path := Kubeconfig(s.cfg.Data)
	url := "https://" + localAddress(s.listener.Addr().String())
	if old, err := pki.ReadKubeconfig(path); err == nil && old.Server == url && string(old.CA) == string(issuer.Bundle()) && old.Fresh(now) && signs(issuer, old.Pair) {
		return nil
	}
	pair, err := issuer.Issue(pki.Admin("admin"), now)
	if err != nil {
		return err
	}
	return pki.Kubeconfig{Server: url, CA: issuer.Bundle(), User: "admin", Pair: pair}.Write(path)
}

// signs reports whether a certificate is of the CA that signs now.
func signs(issuer *pki.Issuer, pair pki.Pair) bool {
	cert, err := pair.TLS()
	return err == nil && issuer.SignedBy(cert.Leaf) == issuer.Fingerprint()
}

// localAddress is how this machine reaches an address that it listens on.
func localAddress(listening string) string {
	host, port, err := net.SplitHostPort(listening)
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return listening
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
func (s *server) run(start func(name string, f func(context.Context) error)) {
	rpc := &peer.Server{Store: s.store, Handlers: s.calls(), Refuse: s.refuse, Log: s.cfg.Log.With("part", "peers")}
	start("listener", s.mux.Serve)
	start("peers", func(ctx context.Context) error { return rpc.Serve(ctx, s.peerL) })
	start("api", func(ctx context.Context) error { return s.api.Serve(ctx, s.httpL) })
	start("lead", s.lead)
	start("tunnels", func(ctx context.Context) error { return s.tunnels.Serve(ctx, s.agentL) })
	start("git", s.replica.Run)
	start("keys", s.followKeys)
	start("trust", s.followTrust)
	start("contacts", s.tell)
	start("announce", s.announce)
	start("credentials", s.keepCredentials)
	start("store", func(ctx context.Context) error {
		select {
		case err := <-s.fatal:
			return err
		case <-ctx.Done():
			return nil
		}
	})
}

// awaitReady waits until this server has the cluster's state and knows who leads. If
// it leads itself, it waits until everything is there that every cluster has.
func (s *server) awaitReady(ctx context.Context) error {
	if err := s.store.WaitReady(ctx); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	for {
		view := s.store.View()
		_, source := api.Get[*api.Source](view, "", BuiltIn)
		_, authority := api.Get[*api.Authority](view, "", api.AuthorityName)
		if source && authority {
			break
		}
		if _, err := s.store.WaitChange(ctx, view.Revision()); err != nil {
			return fmt.Errorf("store: %w", err)
		}
	}
	// The ranges were settled when the cluster was born, whatever the flags say now.
	born := s.store.View().Settings()
	s.cfg.DNS = born.DNS
	s.cfg.setRanges(born.Families())
	return s.writeKubeconfig(time.Now())
}

// keepCredentials keeps what this machine shows others good for as long as it runs.
func (s *server) keepCredentials(ctx context.Context) error {
	if err := s.awaitReady(ctx); err != nil {
		return err
	}
	member := &join.Member{Keeper: s.creds.keeper, Servers: s.addresses, Log: s.cfg.Log.With("part", "certificates"), Every: s.cfg.TrustEvery}
	g := newGroup(ctx)
	g.start("renew", func(ctx context.Context) error { return s.creds.keeper.Run(ctx, member.Renew) })
	g.start("follow", member.Follow)
	g.start("operators", s.keepOperators)
	return g.wait()
}

// keepOperators keeps what the operators of this machine need in its data folder.
func (s *server) keepOperators(ctx context.Context) error {
	for {
		changed, revision := s.creds.keeper.Changed(), s.store.View().Revision()
		if err := s.writeKubeconfig(time.Now()); err != nil {
			s.cfg.Log.Warn("write the administrator's kubeconfig", "error", err)
		}
		if err := s.writeServers(); err != nil {
			s.cfg.Log.Warn("write down where the servers are", "error", err)
		}
		waiting, cancel := context.WithTimeout(ctx, time.Minute)
		err := s.awaitAny(waiting, changed, revision, api.Authorities)
		cancel()
		if err != nil || ctx.Err() != nil {
			return err
		}
	}
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
	if s.replica != nil {
		s.replica.Close()
	}
	if s.gitPeers != nil {
		s.gitPeers.client.CloseIdleConnections()
	}
	if s.peers != nil {
		s.peers.Close()
	}
	if s.listener != nil {
		s.listener.Close()
	}
}
