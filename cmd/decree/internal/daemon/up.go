package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/join"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// Up runs a server and, unless told otherwise, an agent on this machine until ctx
// ends. It tells out, in a few lines, what runs and what to try next. Containers and
// services outlive it.
func Up(ctx context.Context, cfg Config, out io.Writer) error {
	begun := time.Now()
	if err := cfg.complete(); err != nil {
		return err
	}
	release, err := lock(cfg.Data)
	if err != nil {
		return err
	}
	defer release()
	if cfg.NoAgent {
		if err := setNice(serverNice); err != nil {
			cfg.Log.Debug("this server has no priority over other work", "error", err)
		}
	}
	s, err := newServer(ctx, &cfg)
	if err != nil {
		return err
	}
	defer s.close()
	// The lead is handed over before anything ends that this takes.
	g := newGroup(context.WithoutCancel(ctx))
	defer context.AfterFunc(ctx, func() {
		s.store.HandOver()
		g.cancel(context.Canceled)
	})()
	s.run(g.start)
	if err := s.begin(g, begun, out); err != nil {
		return errors.Join(err, g.stop())
	}
	return g.wait()
}

// begin brings up what needs a server that is ready.
func (s *server) begin(g *group, begun time.Time, out io.Writer) error {
	cfg := s.cfg
	if err := s.awaitReady(g.ctx); err != nil {
		return orCause(g.ctx, err)
	}
	if cfg.Seed != "" {
		if err := s.seed(g.ctx, cfg.Seed); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "ready in %d ms: API %s, repository decree://%s/%s\n", time.Since(begun).Milliseconds(), s.url(), s.listener.Addr(), BuiltIn)
	if cfg.NoAgent {
		return nil
	}
	keeper, err := s.nodeKeeper(g.ctx)
	if err != nil {
		return err
	}
	n, err := newNode(g.ctx, cfg, controlPlaneAt{url: "https://" + localAddress(s.listener.Addr().String()), others: s.addresses, keeper: keeper}, s.metrics)
	if err != nil {
		return err
	}
	g.atEnd(n.close)
	if err := n.importImages(g.ctx); err != nil {
		return err
	}
	s.nodes.agent.Store(n.agent)
	s.nodes.plane.Store(n.plane)
	s.front.Store(n.front)
	n.run(g.start)
	g.start("tunnel", n.tunnel(func() []string { return s.addresses()[1:] }, keeper, s))
	member := &join.Member{Keeper: keeper, Servers: s.addresses, Log: cfg.Log.With("part", "certificates"), Every: cfg.TrustEvery}
	g.start("node renew", func(ctx context.Context) error { return keeper.Run(ctx, member.Renew) })
	g.start("node follow", member.Follow)
	g.start("greeting", func(ctx context.Context) error { return s.greet(ctx, n, begun, out) })
	return nil
}

// orCause prefers why a part of the daemon ended to what another part made of it.
func orCause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// nodeKeeper opens the certificates of this machine's agent.
func nodeKeeper(cfg *Config) (*pki.Keeper, error) {
	return pki.OpenKeeper(cfg.dir("pki", "node"), cfg.Log.With("part", "certificates"))
}

// nodeKeeper gives the agent beside this server its certificate, without a token: who
// runs the server may run pods on it.
func (s *server) nodeKeeper(ctx context.Context) (*pki.Keeper, error) {
	keeper, err := nodeKeeper(s.cfg)
	if err != nil {
		return nil, err
	}
	issuer, err := s.issuer()
	if err != nil {
		return nil, err
	}
	if keeper.Ready(time.Now()) != nil || issuer.SignedBy(keeper.Leaf()) == "" {
		if err := certify(keeper, issuer, pki.Node(s.cfg.Node), time.Now()); err != nil {
			return nil, err
		}
	}
	hash, err := keyHash(keeper)
	if err != nil {
		return nil, err
	}
	return keeper, registry{s}.Admit(ctx, join.Admission{Role: api.RoleAgent, Node: s.cfg.Node, Key: hash, Replace: true})
}

// group runs the parts of the daemon. The first that fails ends all.
type group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
	last   []func()
}

func newGroup(ctx context.Context) *group {
	g := &group{}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	return g
}

func (g *group) start(name string, f func(context.Context) error) {
	g.wg.Go(func() {
		if err := f(g.ctx); err != nil && g.ctx.Err() == nil {
			g.cancel(fmt.Errorf("%s: %w", name, err))
		}
	})
}

// atEnd has f called when all parts have ended.
func (g *group) atEnd(f func()) { g.last = append(g.last, f) }

// stop ends all parts and waits for them.
func (g *group) stop() error {
	g.cancel(context.Canceled)
	return g.wait()
}

// wait returns when all parts have ended: nil if they were told to.
func (g *group) wait() error {
	g.wg.Wait()
	for _, f := range slices.Backward(g.last) {
		f()
	}
	g.last = nil
	if err := context.Cause(g.ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// greet says what to try, waits until everything in the repository is healthy, and
// says so.
func (s *server) greet(ctx context.Context, n *node, begun time.Time, out io.Writer) error {
	st := replicated.Store{Store: s.store}
	fmt.Fprintf(out, "try in another terminal:\n  decree get pods\n  git clone decree://%s/%s repo\n  decree status\n", s.listener.Addr(), BuiltIn)
	fmt.Fprintln(out, "Ctrl-C stops decree and leaves containers running; decree down stops them too")
	for {
		view := st.View()
		ready, total := 0, 0
		for d := range api.List[*appsv1.Deployment](view, "") {
			total++
			if workload.Rollout(view, d).Done {
				ready++
			}
		}
		if ready == total && n.runs(ctx, view) {
			fmt.Fprintf(out, "healthy after %d ms: %d of %d deployments\n", time.Since(begun).Milliseconds(), ready, total)
			return nil
		}
		if err := st.Await(ctx, view.Revision(), ""); err != nil {
			return err
		}
	}
}

// runs reports whether what a view says of this node is true at this moment. After a
// stop the view holds the status of before until the agent has looked at its pods.
func (n *node) runs(ctx context.Context, view api.Reader) bool {
	self, ok := api.Get[*corev1.Node](view, "", n.cfg.Node)
	if !ok || !slices.ContainsFunc(self.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	}) {
		return false
	}
	sandboxes, err := n.runtime.List(ctx)
	if err != nil {
		return false
	}
	running := map[string]bool{}
	for _, s := range sandboxes {
		for _, c := range s.Containers {
			running[c.ID] = c.State == agent.Running
		}
	}
	for p := range api.List[*corev1.Pod](view, "") {
		if p.Spec.NodeName != n.cfg.Node || !api.PodReady(p) {
			continue
		}
		for _, c := range p.Status.ContainerStatuses {
			if _, id, _ := strings.Cut(c.ContainerID, "://"); !running[id] {
				return false
			}
		}
	}
	return true
}
