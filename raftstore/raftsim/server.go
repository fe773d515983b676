package raftsim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/membership"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
)

// server is one machine: its disk, and the process on it while there is one.
type server struct {
	cluster  *cluster
	id       string       // of the machine, and its address
	first    bool         // founds the cluster; the others join
	format   atomic.Int64 // the newest log format that the version of its next run knows
	nonVoter atomic.Bool  // its next run wants no vote
	wasFull  atomic.Bool  // its disk has been full
	clock    atomic.Int64 // how far its clock is off, in nanoseconds

	// mu is never held while fake time passes: in a bubble, waiting for a mutex is not
	// waiting, and time would stand still.
	mu       sync.Mutex
	disk     *disk
	run      *run // nil while it is down
	starting bool
	runs     int
	installs int    // how often the machine has got an empty disk
	dir      string // of the newest run
}

// run is one process, from start to crash.
type run struct {
	server   *server
	id       string // of the member of the cluster
	store    *raftstore.Store
	keeper   *membership.Keeper
	format   int
	nonVoter bool
	wire     *wire
	told     uint64      // up to here the recorder knows; guarded by its mutex
	dead     atomic.Bool // it crashed: nobody hears of what it still does
	ctx      context.Context
	end      context.CancelCauseFunc

	admitted atomic.Bool // the cluster knows it

	closing atomic.Bool
	closed  chan struct{}
	failed  error // of closing
}

// close closes the store, whose own Close must not be called while another one waits.
func (r *run) close() error {
	if r.closing.CompareAndSwap(false, true) {
		r.failed = r.store.Close()
		close(r.closed)
	}
	<-r.closed
	return r.failed
}

var errCrashed = errors.New("the server crashed")

func (s *server) address() raft.ServerAddress { return raft.ServerAddress(s.id) }

func (s *server) current() *run {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.run
}

// member is the id in the cluster of who is on the machine's disk: a machine that has lost
// its disk is another member.
func (s *server) member() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.memberLocked()
}

func (s *server) memberLocked() string {
	if s.installs == 0 {
		return s.id
	}
	return fmt.Sprintf("%s-%d", s.id, s.installs)
}

// hasRun reports whether the server has ever been started.
func (s *server) hasRun() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.runs > 0
}

// now is the server's own clock.
func (s *server) now() time.Time { return time.Now().Add(time.Duration(s.clock.Load())) }

// folder makes the folder of the next run, with the identity of the one before. It is a
// new one because the old run may still hold the lock of its own.
func (s *server) folder() (string, error) {
	dir := filepath.Join(s.cluster.options.Dir, fmt.Sprintf("%s-%d", s.id, s.runs))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("start %s: %w", s.id, err)
	}
	if s.dir != "" {
		const name = "identity.json"
		data, err := os.ReadFile(filepath.Join(s.dir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
		}
		if err != nil {
			return "", fmt.Errorf("start %s: %w", s.id, err)
		}
	}
	return dir, nil
}

// start starts the server if it is down.
func (s *server) start() error {
	s.mu.Lock()
	if s.run != nil || s.starting {
		s.mu.Unlock()
		return nil
	}
	s.starting = true
	s.runs++
	dir, err := s.folder()
	disk := s.disk
	r := &run{server: s, id: s.memberLocked(), format: int(s.format.Load()), nonVoter: s.nonVoter.Load(), wire: newWire(s.cluster.net, s), closed: make(chan struct{})}
	first := s.first && s.installs == 0
	s.mu.Unlock()
	if err == nil {
		r.store, err = raftstore.Open(s.config(r, dir, disk, first))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.starting = false
	if err != nil {
		return fmt.Errorf("start %s: %w", s.id, err)
	}
	c := s.cluster
	r.ctx, r.end = context.WithCancelCause(c.ctx)
	r.keeper = &membership.Keeper{Store: r.store, Peers: &peers{r}, Self: r.self, Policy: c.policy, Log: c.logger(s.id)}
	s.run, s.dir = r, dir
	c.net.plug(s.address(), r.wire)
	c.trace.add("%s started", s.id)
	c.work.Go(func() { c.recorder.follow(r) })
	c.work.Go(func() { r.announce() })
	c.work.Go(func() { r.lead() })
	return nil
}

// stopped is called when the store stops for good. That is right for a server that was
// installed anew in a version that is too old: it gets what the one before it would have
// got, before it is refused.
func (r *run) stopped(err error) {
	c := r.server.cluster
	if _, unknown := errors.AsType[*command.VersionError](err); unknown && r.format < command.Newest && !r.admitted.Load() {
		c.trace.add("%s is too old: %v", r.server.id, err)
		c.nemesis.count("refused")
		c.work.Go(func() { r.server.crashRun(r) })
		return
	}
	c.fail("%s stopped for good: %v", r.server.id, err)
}

// What is larger than wholeBytes travels in parts of partBytes.
const (
	wholeBytes = 600
	partBytes  = 400
)

func (s *server) config(r *run, dir string, d *disk, first bool) raftstore.Config {
	c := s.cluster
	cfg := raftstore.Config{
		Dir: dir, NodeID: r.id, Transport: r.wire, Peers: &peers{r}, Storage: d.storage, Logger: c.logger(s.id),
		Fatal:             r.stopped,
		SnapshotThreshold: c.snapshotThreshold, SnapshotInterval: 700 * time.Millisecond, TrailingLogs: c.trailingLogs,
		HistoryEvents: c.historyEvents, Format: r.format, WholeBytes: wholeBytes, PartBytes: partBytes,
	}
	if first {
		cfg.Bootstrap = settings()
	}
	return cfg
}

// crash ends the process at once. What is left of it can do no harm.
func (s *server) crash() { s.crashRun(nil) }

// crashRun crashes the server if it is at a run, at any if that is nil.
func (s *server) crashRun(only *run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.run
	if r == nil || only != nil && r != only {
		return
	}
	s.cluster.recorder.drain(r)
	s.run = nil
	r.dead.Store(true)
	s.cluster.net.plug(s.address(), nil)
	s.disk = s.disk.crash()
	r.end(errCrashed)
	r.wire.Close()
	s.cluster.work.Go(func() { r.close() }) // its goroutines have to end some time
}

// stopTime is how long a server may take to stop.
const stopTime = 30 * time.Second

// stop stops a server in an orderly way.
func (s *server) stop() {
	r := s.current()
	if r == nil {
		return
	}
	go func() {
		if err := r.close(); err != nil && !r.dead.Load() {
			s.cluster.fail("stop %s: %v", s.id, err)
		}
	}()
	timer := time.NewTimer(stopTime)
	defer timer.Stop()
	select {
	case <-r.closed:
		s.cluster.trace.add("%s stopped", s.id)
	case <-timer.C:
		s.cluster.fail("%s does not stop", s.id)
	}
	if s.current() == r {
		s.crash()
	}
}

// restart stops the server in an orderly way, and starts it again.
func (s *server) restart() {
	s.stop()
	if err := s.start(); err != nil {
		s.cluster.fail("%v", err)
	}
}

// reinstall gives the server an empty disk. It does nothing, and returns false, unless the
// server is down.
func (s *server) reinstall() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run != nil || s.starting {
		return false
	}
	c := s.cluster
	c.autopilot.lost(s.memberLocked())
	s.installs++
	s.dir = ""
	lies := s.disk.lies
	s.disk = c.newDisk(s.id, s.memberLocked())
	s.disk.lies = lies
	c.trace.add("%s has an empty disk, and is %s", s.id, s.memberLocked())
	return true
}

func settings() *command.Bootstrap {
	return &command.Bootstrap{
		ClusterID:   "0123456789abcdef0123456789abcdef",
		ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"),
		PodCIDR:     netip.MustParsePrefix("10.98.0.0/16"),
		NodeMask:    24,
		DNS:         netip.MustParseAddr("10.97.0.10"),
	}
}

// peers carries what stores and keepers ask each other. It implements raftstore.Peers and
// membership.Caller. These calls
// travel in a stream, so none comes twice; but one may come late, when who asked has
// given up.
type peers struct{ run *run }

// breakAfter is how long a call may take until the connection counts as broken, at most.
const breakAfter = 700 * time.Millisecond

// Propose implements raftstore.Peers.
func (p *peers) Propose(ctx context.Context, to string, txn []byte) (command.Result, error) {
	return ask(ctx, p.run, to, "propose", func(ctx context.Context, other *run, done func(command.Result, error)) {
		if err := other.store.ProposeEncoded(ctx, txn, done); err != nil {
			done(command.Result{}, err)
		}
	})
}

// ReadIndex implements raftstore.Peers.
func (p *peers) ReadIndex(ctx context.Context, to string) (uint64, error) {
	return ask(ctx, p.run, to, "read index", func(ctx context.Context, other *run, done func(uint64, error)) {
		done(other.store.ReadIndex(ctx))
	})
}

// Call implements membership.Caller.
func (p *peers) Call(ctx context.Context, to, name string, in, out any) error {
	data, err := json.Marshal(in)
	if err != nil {
		return err
	}
	from := peer.Identity{Name: pki.ServerPrefix + p.run.server.id, Groups: []string{pki.GroupServers}}
	answer, err := ask(ctx, p.run, to, name, func(ctx context.Context, other *run, done func(string, error)) {
		answer, err := other.keeper.Handlers()[name](ctx, from, data)
		if err != nil {
			done("", err)
			return
		}
		text, err := json.Marshal(answer)
		done(string(text), err)
	})
	if err != nil || out == nil {
		return err
	}
	err = json.Unmarshal([]byte(answer), out)
	if status, ok := out.(*membership.Status); ok {
		p.run.server.cluster.autopilot.answered(p.run, status.ID)
	}
	return err
}

// ask sends a question and waits for the answer, which may be lost as any message.
func ask[T any](ctx context.Context, r *run, to, what string, question func(context.Context, *run, func(T, error))) (T, error) {
	type answer struct {
		value T
		err   error
	}
	var zero T
	net, from, target := r.wire.net, r.wire.addr, raft.ServerAddress(to)
	if !r.wire.plugged() || !net.reaches(from, target) {
		select { // it takes a while to find out
		case <-time.After(breakAfter / 10):
		case <-ctx.Done():
		}
		return zero, fmt.Errorf("%w: %s %w", raftstore.ErrNotLeader, to, errCut)
	}
	answers := make(chan answer, 1)
	net.carry(from, target, what, false, func(w *wire) {
		other := w.server.current()
		if other == nil || other.wire != w {
			return
		}
		done := func(v T, err error) {
			if !other.dead.Load() {
				net.carry(target, from, fmt.Sprintf("%s answer %v %v", what, v, err), false, func(*wire) { answers <- answer{v, overTheWire(err)} })
			}
		}
		if err := membership.Out(other.store.View(), other.store.Members(), r.server.id); err != nil {
			done(zero, err) // for who is out nothing is done
			return
		}
		question(other.ctx, other, done)
	})
	timer := time.NewTimer(net.patience())
	defer timer.Stop()
	select {
	case a := <-answers:
		return a.value, a.err
	case <-timer.C:
		return zero, fmt.Errorf("%w: %s to %s: %w", raftstore.ErrLeadershipLost, what, to, errTimeout)
	case <-ctx.Done():
		return zero, fmt.Errorf("%w: %s to %s: %w", raftstore.ErrLeadershipLost, what, to, context.Cause(ctx))
	}
}

// overTheWire is what is left of an error in raftstore/peer's protocol.
func overTheWire(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raftstore.ErrNotLeader):
		return fmt.Errorf("%w (%v)", raftstore.ErrNotLeader, err)
	case errors.Is(err, raftstore.ErrLeadershipLost), errors.Is(err, raftstore.ErrClosed), errors.Is(err, raftstore.ErrFatal):
		return fmt.Errorf("%w (%v)", raftstore.ErrLeadershipLost, err)
	}
	remote := &peer.RemoteError{Text: err.Error()}
	if coded, ok := errors.AsType[interface {
		error
		ErrorCode() string
	}](err); ok {
		remote.Code = coded.ErrorCode()
	}
	return remote
}
