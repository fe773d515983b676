// Package gitreplica keeps the built-in repositories the same on all servers of a
// cluster: what is pushed to one is on a quorum before it comes into force ([Replica.Spread]),
// and a server that lacks what the replicated state names gets it from another
// ([Replica.Run], [Replica.Obtain]).
//
// It decides who has to have what, and when that is enough. Objects are moved and
// checked by gitsource; how servers are called is the matter of [Peers]. It knows
// nothing of Raft: what is in force is what the local view says.
package gitreplica

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// Peer is one server of the cluster.
type Peer struct {
	ID      string
	Address string // host:port
	Self    bool
	Voter   bool
	Leader  bool
}

// Peers reaches the other servers. Implementations are safe for concurrent use.
type Peers interface {
	// Servers lists all servers of the cluster, this one included.
	Servers() []Peer
	// Pull asks a peer to call its own [Replica.Pull] with the repository, the hash
	// and the address of this server, and returns what that returned.
	Pull(ctx context.Context, p Peer, repository, hash string) error
	// Origin says how this server pulls from the server at an address.
	Origin(address string) gitsource.Origin
}

// Repositories are the built-in repositories of this server: *gitsource.Server.
type Repositories interface {
	Init(ctx context.Context, name string) error
	Has(name, hash string) (bool, error)
	Pull(ctx context.Context, name, hash string, from gitsource.Origin, haves ...string) error
	AdoptReferences(ctx context.Context, name string) error
}

// Store is the part of the replicated store that is needed.
type Store interface {
	// View returns the local view, which may be behind.
	View() api.Reader
	// Await blocks until the local view has a change of r that is newer than revision.
	// It may return earlier.
	Await(ctx context.Context, revision uint64, r api.Resource) error
}

// Config configures a Replica.
type Config struct {
	Peers Peers
	Store Store
	Log   *slog.Logger          // slog.Default when nil
	Reg   prometheus.Registerer // nil: no metrics
	// Quorum is how long a push waits for a majority of the voters, wall time; 1 min
	// when zero.
	Quorum time.Duration
	// Background is how long servers beyond the majority are waited for after that, and
	// how long the catch-up of one repository may take at a time; 10 min when zero.
	Background time.Duration
	// Resync is the longest time between two looks at what is missing; 30 s when zero.
	Resync time.Duration
}

// Replica is this server's part in the replication. All methods are safe for
// concurrent use. Close must be called once no more pushes are served.
type Replica struct {
	cfg     Config
	log     *slog.Logger
	metrics metrics

	ready chan struct{} // closed by Attach
	git   Repositories

	life context.Context // of what goes on after an acknowledgement
	end  context.CancelFunc
	work sync.WaitGroup

	mu     sync.Mutex
	closed bool
	behind map[string]Behind
}

var _ gitsource.Replicas = (*Replica)(nil)

// New returns a Replica, which waits for its repositories: a gitsource.Server needs
// it to be configured, and it needs that server. Call Attach.
func New(cfg Config) (*Replica, error) {
	if cfg.Peers == nil || cfg.Store == nil {
		return nil, errors.New("git replica: Peers and Store are required")
	}
	cfg.Quorum = cmp.Or(cfg.Quorum, time.Minute)
	cfg.Background = cmp.Or(cfg.Background, 10*time.Minute)
	cfg.Resync = cmp.Or(cfg.Resync, 30*time.Second)
	r := &Replica{cfg: cfg, log: cmp.Or(cfg.Log, slog.Default()), ready: make(chan struct{}), behind: map[string]Behind{}}
	r.life, r.end = context.WithCancel(context.Background())
	if err := r.metrics.register(cfg.Reg, r); err != nil {
		return nil, fmt.Errorf("git replica: %w", err)
	}
	return r, nil
}

// Attach gives the Replica the repositories of this server. It must be called once.
func (r *Replica) Attach(git Repositories) {
	r.git = git
	close(r.ready)
}

// Close ends what still goes on for pushes that were acknowledged, and waits for it.
func (r *Replica) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.end()
	r.work.Wait()
}

// begin starts work that goes on after its cause has got its answer.
func (r *Replica) begin(f func()) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errors.New("this server is stopping")
	}
	r.work.Go(f)
	return nil
}

func (r *Replica) attached(ctx context.Context) error {
	select {
	case <-r.ready:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Pull is the other end of [Peers]: it brings an object from the server at an address
// into this one. Call it for servers of this cluster only.
func (r *Replica) Pull(ctx context.Context, repository, hash, address string) error {
	if err := r.attached(ctx); err != nil {
		return err
	}
	return r.pull(ctx, repository, hash, address)
}

func (r *Replica) pull(ctx context.Context, repository, hash, address string) error {
	err := r.git.Pull(ctx, repository, hash, r.cfg.Peers.Origin(address), inForce(r.cfg.Store.View(), repository)...)
	r.metrics.pulled(err)
	return err
}

// inForce lists what the local view says is in force of a repository. It is stored
// here most of the time, and what is pulled stands on it most of the time.
func inForce(view api.Reader, repository string) []string {
	src, ok := api.Get[*api.Source](view, "", repository)
	if !ok {
		return nil
	}
	return slices.DeleteFunc([]string{src.Status.Applied, src.Status.References}, func(h string) bool { return h == "" })
}

// Obtain implements gitsource.Replicas: it asks the leader first, then the others.
func (r *Replica) Obtain(ctx context.Context, repository, hash string) error {
	if err := r.attached(ctx); err != nil {
		return err
	}
	return r.obtain(ctx, repository, hash)
}

func (r *Replica) obtain(ctx context.Context, repository, hash string) error {
	peers := slices.DeleteFunc(slices.Clone(r.cfg.Peers.Servers()), func(p Peer) bool { return p.Self })
	slices.SortStableFunc(peers, func(a, b Peer) int { return rank(a) - rank(b) })
	if len(peers) == 0 {
		return errors.New("there is no other server to get it from")
	}
	var errs []error
	for _, p := range peers {
		err := r.pull(ctx, repository, hash, p.Address)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("server %s: %w", p.ID, err))
		if ctx.Err() != nil {
			break
		}
	}
	return fmt.Errorf("no other server could send it: %w", errors.Join(errs...))
}

func rank(p Peer) int {
	switch {
	case p.Leader:
		return 0
	case p.Voter:
		return 1
	}
	return 2
}
