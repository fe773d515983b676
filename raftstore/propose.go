package raftstore

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/command"
)

// proposalOverhead is what a waiting proposal counts for beside its bytes.
const proposalOverhead = 256

// batchBytes is where a log entry stops taking more transactions. One that is
// larger travels alone.
const batchBytes = 1 << 20

// proposal is one encoded transaction and the caller who waits for it.
type proposal struct {
	data []byte
	done chan outcome // capacity 1
}

type outcome struct {
	result command.Result
	err    error
}

// flight is a log entry on its way, with the proposals in it.
type flight struct {
	future    raft.ApplyFuture
	proposals []*proposal
	start     time.Time
}

// Propose makes t happen: it returns once t is durable on a quorum and applied
// here. A zero t.Time becomes now. Proposals that wait together share a log entry.
//
// A transaction that the state machine rejects is a Result, not an error; see
// [command.Result.Err]. Errors: ErrNotLeader (nothing happened), one matching
// command.ErrTooLarge (nothing happened), ErrLeadershipLost, ErrClosed, ErrFatal
// and the context's cause (unknown: retry with the same t.Key).
func (s *Store) Propose(ctx context.Context, t command.Txn) (command.Result, error) {
	if t.Time == 0 {
		t.Time = time.Now().UnixMilli()
	}
	data, err := command.EncodeTxn(&t)
	if err != nil {
		return command.Result{}, fmt.Errorf("propose: %w", err)
	}
	p := &proposal{data: data, done: make(chan outcome, 1)}
	size := int64(len(data)) + proposalOverhead
	if err := s.room.Acquire(ctx, size); err != nil {
		return command.Result{}, fmt.Errorf("propose, waiting for room in the queue (nothing was proposed): %w", err)
	}
	defer s.room.Release(size)
	if err := s.enqueue(p); err != nil {
		return command.Result{}, err
	}
	start := time.Now()
	select {
	case out := <-p.done:
		s.metrics.proposeSeconds.Observe(time.Since(start).Seconds())
		return out.result, out.err
	case <-ctx.Done():
		return command.Result{}, unknown(ctx)
	}
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
				answer(b, outcome{err: ErrClosed})
			}
			return
		}
		for b := s.take(); len(b) > 0; b = s.take() {
			s.launch(b)
		}
	}
}

func (s *Store) launch(batch []*proposal) {
	parts := make([][]byte, len(batch))
	for i, p := range batch {
		parts[i] = p.data
	}
	entry, err := command.EncodeEntry(parts...)
	if err != nil {
		answer(batch, outcome{err: fmt.Errorf("propose: %w", err)})
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
			answer(f.proposals, outcome{err: s.raftError(err)})
			continue
		}
		s.metrics.commitSeconds.Observe(time.Since(f.start).Seconds())
		switch response := f.future.Response().(type) {
		case []command.Result:
			for i, p := range f.proposals {
				p.done <- outcome{result: response[i]}
			}
		case error:
			answer(f.proposals, outcome{err: response})
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

func answer(batch []*proposal, out outcome) {
	for _, p := range batch {
		p.done <- out
	}
}
