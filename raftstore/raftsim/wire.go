package raftsim

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// rpcTimeout is how long raft waits for an answer.
const rpcTimeout = 500 * time.Millisecond

// wire is the end of the network that one run of a server holds. It implements
// raft.Transport.
type wire struct {
	net    *network
	addr   raft.ServerAddress
	server *server
	rpcs   chan raft.RPC
	fast   atomic.Pointer[func(raft.RPC)] // for heartbeats
	closed chan struct{}
	once   sync.Once
}

var (
	_ raft.Transport   = (*wire)(nil)
	_ raft.WithPreVote = (*wire)(nil)
	_ raft.WithClose   = (*wire)(nil)
)

func newWire(n *network, s *server) *wire {
	return &wire{net: n, addr: s.address(), server: s, rpcs: make(chan raft.RPC), closed: make(chan struct{})}
}

// Consumer implements raft.Transport.
func (w *wire) Consumer() <-chan raft.RPC { return w.rpcs }

// LocalAddr implements raft.Transport.
func (w *wire) LocalAddr() raft.ServerAddress { return w.addr }

// EncodePeer implements raft.Transport.
func (w *wire) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }

// DecodePeer implements raft.Transport.
func (w *wire) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

// SetHeartbeatHandler implements raft.Transport.
func (w *wire) SetHeartbeatHandler(f func(raft.RPC)) { w.fast.Store(&f) }

// Close implements raft.WithClose.
func (w *wire) Close() error {
	w.once.Do(func() { close(w.closed) })
	return nil
}

// handle lets this end's server answer a message; ok is false if it does not.
func (w *wire) handle(command any, data []byte) (raft.RPCResponse, bool) {
	answer := make(chan raft.RPCResponse, 1)
	rpc := raft.RPC{Command: command, RespChan: answer}
	if data != nil {
		rpc.Reader = bytes.NewReader(data)
	}
	if fast := w.fast.Load(); fast != nil && *fast != nil && isHeartbeat(command) {
		(*fast)(rpc)
	} else {
		select {
		case w.rpcs <- rpc:
		case <-w.closed:
			return raft.RPCResponse{}, false
		}
	}
	select {
	case a := <-answer:
		return a, true
	case <-w.closed:
		return raft.RPCResponse{}, false
	}
}

// isHeartbeat tells heartbeats as raft's own network transport does.
func isHeartbeat(command any) bool {
	r, ok := command.(*raft.AppendEntriesRequest)
	return ok && r.Term != 0 && len(r.RPCHeader.Addr) > 0 && r.PrevLogEntry == 0 && r.PrevLogTerm == 0 && len(r.Entries) == 0 && r.LeaderCommitIndex == 0
}

// call sends a message and waits for the answer.
func (w *wire) call(to raft.ServerAddress, what string, command any, data []byte) (any, error) {
	answers := make(chan raft.RPCResponse, 2)
	timer := time.NewTimer(rpcTimeout)
	defer timer.Stop()
	if !w.plugged() {
		return nil, raft.ErrTransportShutdown
	}
	w.net.carry(w.addr, to, what, true, func(target *wire) {
		if a, ok := target.handle(command, data); ok && target.plugged() {
			w.net.carry(to, w.addr, what+" answer", false, func(*wire) {
				select {
				case answers <- a:
				default: // nobody waits for a third
				}
			})
		}
	})
	select {
	case a := <-answers:
		return a.Response, a.Error
	case <-timer.C:
		return nil, fmt.Errorf("%s to %s: %w", what, to, errTimeout)
	case <-w.closed:
		return nil, raft.ErrTransportShutdown
	}
}

// plugged reports whether this end is the one that its server has in the network: a
// server that crashed reaches nobody.
func (w *wire) plugged() bool {
	w.net.mu.Lock()
	defer w.net.mu.Unlock()
	return w.net.wires[w.addr] == w
}

// fill calls, and stores the answer in resp.
func fill[T any](w *wire, to raft.ServerAddress, what string, command any, data []byte, resp *T) error {
	a, err := w.call(to, what, command, data)
	if r, ok := a.(*T); ok && r != nil {
		*resp = *r
	}
	return err
}

// AppendEntries implements raft.Transport.
func (w *wire) AppendEntries(_ raft.ServerID, to raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	return fill(w, to, describe(args), copyOf(args), nil, resp)
}

func describe(r *raft.AppendEntriesRequest) string {
	if isHeartbeat(r) {
		return fmt.Sprintf("heartbeat %d", r.Term)
	}
	return fmt.Sprintf("append %d %d+%d commit %d", r.Term, r.PrevLogEntry, len(r.Entries), r.LeaderCommitIndex)
}

func copyOf[T any](v *T) *T {
	c := *v
	return &c
}

// RequestVote implements raft.Transport.
func (w *wire) RequestVote(_ raft.ServerID, to raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return fill(w, to, fmt.Sprintf("vote %d", args.Term), copyOf(args), nil, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (w *wire) RequestPreVote(_ raft.ServerID, to raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return fill(w, to, fmt.Sprintf("prevote %d", args.Term), copyOf(args), nil, resp)
}

// InstallSnapshot implements raft.Transport. Now and then the stream breaks off.
func (w *wire) InstallSnapshot(_ raft.ServerID, to raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	all, err := io.ReadAll(data)
	if err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	w.net.mu.Lock()
	if chance(w.net.rnd, w.net.link(w.addr, to).loss) {
		all = all[:w.net.rnd.IntN(len(all)+1)]
	}
	w.net.mu.Unlock()
	return fill(w, to, fmt.Sprintf("snapshot %d of %d bytes", args.LastLogIndex, len(all)), copyOf(args), all, resp)
}

// TimeoutNow implements raft.Transport.
func (w *wire) TimeoutNow(_ raft.ServerID, to raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	if to != w.addr {
		return fill(w, to, "stand for election", copyOf(args), nil, resp)
	}
	a, ok := w.handle(copyOf(args), nil)
	if !ok {
		return raft.ErrTransportShutdown
	}
	return a.Error
}

// AppendEntriesPipeline implements raft.Transport.
func (w *wire) AppendEntriesPipeline(_ raft.ServerID, to raft.ServerAddress) (raft.AppendPipeline, error) {
	p := &pipeline{wire: w, to: to, sent: make(chan *appendFuture, 64), ready: make(chan raft.AppendFuture, 64), closed: make(chan struct{})}
	go p.order()
	return p, nil
}

// pipeline has many messages under way at once, and gives back the answers in order.
type pipeline struct {
	wire   *wire
	to     raft.ServerAddress
	sent   chan *appendFuture
	ready  chan raft.AppendFuture
	closed chan struct{}
	once   sync.Once
}

// order passes answers on in the order of the questions.
func (p *pipeline) order() {
	for {
		select {
		case f := <-p.sent:
			<-f.done // at the latest after rpcTimeout
			select {
			case p.ready <- f:
			case <-p.closed:
				return
			}
		case <-p.closed:
			return
		}
	}
}

// AppendEntries implements raft.AppendPipeline. As raftstore/peer's, it does not wait
// for ever when nobody takes answers out of a full pipeline.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	f := &appendFuture{start: time.Now(), args: args, resp: resp, done: make(chan struct{})}
	defer time.AfterFunc(rpcTimeout, func() { p.Close() }).Stop()
	select {
	case p.sent <- f:
	case <-p.closed:
		return nil, raft.ErrPipelineShutdown
	}
	go func() {
		defer close(f.done)
		f.err = fill(p.wire, p.to, describe(args), copyOf(args), nil, resp)
	}()
	return f, nil
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.ready }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

type appendFuture struct {
	start time.Time
	args  *raft.AppendEntriesRequest
	resp  *raft.AppendEntriesResponse
	done  chan struct{}
	err   error
}

// Error implements raft.Future.
func (f *appendFuture) Error() error { <-f.done; return f.err }

// Start implements raft.AppendFuture.
func (f *appendFuture) Start() time.Time { return f.start }

// Request implements raft.AppendFuture.
func (f *appendFuture) Request() *raft.AppendEntriesRequest { return f.args }

// Response implements raft.AppendFuture.
func (f *appendFuture) Response() *raft.AppendEntriesResponse { return f.resp }
