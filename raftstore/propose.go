package raftstore

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"decree.dev/decree/raftstore/command"
)

// proposalOverhead is what a waiting proposal counts for beside its bytes.
const proposalOverhead = 256

// batchBytes is where a log entry stops taking more transactions. One that is
// larger travels alone.
const batchBytes = 1 << 20

// partsAtOnce is how many pieces of a large transaction are under way.
const partsAtOnce = 4

// proposal is one encoded transaction and how its caller is told. done is called
// once and must not wait.
type proposal struct {
	data []byte
	done func(command.Result, error)
}

// flight is a log entry on its way, with the proposals in it.
type flight struct {
	future    raft.ApplyFuture
	proposals []*proposal
	start     time.Time
}

// Propose makes t happen, whichever server it is called on: it returns once t is
// durable on a quorum and applied here. A zero t.Time becomes now. Proposals that
// wait together share a log entry. While there is no leader, Propose waits for one.
//
// A transaction that the state machine rejects is a Result, not an error; see
// [command.Result.Err]. Errors: ErrNotLeader (nothing happened, and there is nobody
// to forward to), one matching command.ErrTooLarge (nothing happened),
// ErrLeadershipLost, ErrClosed, ErrFatal and the context's cause (unknown). With a
// t.Key, whatever is unknown is tried again until it is known or ctx ends.
func (s *Store) Propose(ctx context.Context, t command.Txn) (command.Result, error) {
	if t.Time == 0 {
		t.Time = time.Now().UnixMilli()
	}
	data, err := command.EncodeTxn(&t)
	if err != nil {
		return command.Result{}, fmt.Errorf("propose: %w", err)
	}
	start := time.Now()
	var result command.Result
	if len(data) > s.cfg.WholeBytes {
		result, err = s.deliverParts(ctx, data, &t)
	} else {
		result, err = s.deliver(ctx, data, t.Key != "")
	}
	if err == nil {
		s.metrics.proposeSeconds.Observe(time.Since(start).Seconds())
	}
	return result, err
}

// deliverParts brings a large transaction to the leader in pieces, so that no single
// entry holds up the others. The last piece to arrive has the outcome. Until then
// nobody sees anything of it.
func (s *Store) deliverParts(ctx context.Context, data []byte, t *command.Txn) (command.Result, error) {
	parts, err := command.Split(data, s.cfg.PartBytes)
	if err != nil {
		return command.Result{}, fmt.Errorf("propose: %w", err)
	}
	var mu sync.Mutex
	var outcome command.Result
	whole := false
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(partsAtOnce)
	for i := range parts {
		p := &parts[i]
		p.Time, p.Actor, p.Reason = t.Time, t.Actor, t.Reason
		g.Go(func() error {
			piece, err := command.EncodeTxn(p)
			if err != nil {
				return fmt.Errorf("propose: %w", err)
			}
			r, err := s.deliver(ctx, piece, true) // a piece that comes twice counts once
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if r.Missing == 0 {
				outcome, whole = r, true
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return command.Result{}, err
	}
	if !whole {
		return command.Result{}, fmt.Errorf("%w: pieces of the transaction were dropped because it took too long", ErrLeadershipLost)
	}
	return outcome, nil
}

// proposeHere proposes to this server's own raft, and waits.
func (s *Store) proposeHere(ctx context.Context, data []byte) (command.Result, error) {
	type outcome struct {
		result command.Result
		err    error
	}
	landed := make(chan outcome, 1)
	if err := s.ProposeEncoded(ctx, data, func(r command.Result, err error) { landed <- outcome{r, err} }); err != nil {
		return command.Result{}, err
	}
	select {
	case out := <-landed:
		return out.result, out.err
	case <-ctx.Done():
		return command.Result{}, unknown(ctx)
	}
}

// ProposeEncoded is Propose for a transaction that another server has encoded, on the
// leader only and without waiting for the outcome: done is called with it, once and
// on the store's own goroutine, and must not wait. If ProposeEncoded returns an error,
// nothing was proposed and done is not called. It waits for room in the queue.
func (s *Store) ProposeEncoded(ctx context.Context, data []byte, done func(command.Result, error)) error {
	size := int64(len(data)) + proposalOverhead
	if err := s.room.Acquire(ctx, size); err != nil {
		return fmt.Errorf("propose, waiting for room in the queue (nothing was proposed): %w", err)
	}
	p := &proposal{data: data, done: func(r command.Result, err error) {
		s.room.Release(size)
		done(r, err)
	}}
	if err := s.enqueue(p); err != nil {
		s.room.Release(size)
		return err
	}
	return nil
}

func (s *Store) enqueue(p *proposal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.waiting = append(s.waiting, p)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil
}

// take removes the proposals that go into the next entry.
func (s *Store) take() []*proposal {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, size := 0, 0
	for n < len(s.waiting) && n < command.MaxTxns && (n == 0 || size+len(s.waiting[n].data) <= batchBytes) {
		size += len(s.waiting[n].data)
		n++
	}
	batch := s.waiting[:n:n]
	s.waiting = s.waiting[n:]
	if len(s.waiting) == 0 {
		s.waiting = nil
	}
	return batch
}

// batch hands entries to raft until the store closes. While raft writes one entry
// to disk, the proposals of the next one gather.
func (s *Store) batch() {
	defer close(s.flights)
	for {
		select {
		case <-s.wake:
		case <-s.closing:
			for b := s.take(); len(b) > 0; b = s.take() {
				answer(b, ErrClosed)
			}
			return
		}
		for b := s.take(); len(b) > 0; b = s.take() {
			s.launch(b)
		}
	}
}

func (s *Store) launch(batch []*proposal) {
	// Until this leader has caught up it does not know what the servers understand: another
	// one may have let in a server that understands less.
	if err := s.caughtUp(context.Background()); err != nil {
		answer(batch, err)
		return
	}
	parts := make([][]byte, len(batch))
	for i, p := range batch {
		parts[i] = p.data
	}
	entry, err := s.formats.encode(parts...)
	if err != nil && len(batch) > 1 { // one of them is to blame, the others are not
		for _, p := range batch {
			s.launch([]*proposal{p})
		}
		return
	}
	if err != nil {
		answer(batch, fmt.Errorf("propose: %w", err))
		return
	}
	s.metrics.batchTxns.Observe(float64(len(batch)))
	start := time.Now()
	s.flights <- flight{future: s.raft.Apply(entry, 0), proposals: batch, start: start}
}

// land answers the proposals of every entry, in the order of the entries.
func (s *Store) land() {
	defer close(s.landed)
	for f := range s.flights {
		if err := s.arrival(f.future); err != nil {
			answer(f.proposals, s.raftError(err))
			continue
		}
		s.metrics.commitSeconds.Observe(time.Since(f.start).Seconds())
		switch response := f.future.Response().(type) {
		case []command.Result:
			for i, p := range f.proposals {
				p.done(response[i], nil)
			}
		case error:
			answer(f.proposals, response)
		}
	}
}

// arrival waits for an entry. Raft may stop without a word about entries that it
// was just applying; their outcome is unknown.
func (s *Store) arrival(f raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		return err
	case <-s.stopped:
		return raft.ErrRaftShutdown
	}
}

func answer(batch []*proposal, err error) {
	for _, p := range batch {
		p.done(command.Result{}, err)
	}
}
