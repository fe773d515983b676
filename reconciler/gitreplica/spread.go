package gitreplica

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// ErrNoQuorum says that too few servers have stored what was pushed.
var ErrNoQuorum = errors.New("not stored on enough servers")

// answer is what became of one peer's pull.
type answer struct {
	peer Peer
	err  error
}

// Spread implements gitsource.Replicas: it asks all other servers to pull and returns
// nil once a majority of the voters, this server included if it is one, has the
// object. The others go on in the background. As soon as no majority is possible any
// more, and after Config.Quorum in any case, the error matches ErrNoQuorum and says
// what is missing. A server that is no voter counts for nothing, but gets everything.
func (r *Replica) Spread(ctx context.Context, repository, hash string) error {
	if err := r.attached(ctx); err != nil {
		return err
	}
	v := newVote(r.cfg.Peers.Servers())
	answers := make(chan answer, len(v.others))
	// Whoever pushes may leave: the peers go on.
	work, stop := context.WithTimeout(r.life, r.cfg.Quorum+r.cfg.Background)
	err := r.begin(func() {
		defer stop()
		var asked sync.WaitGroup
		defer asked.Wait()
		for _, p := range v.others {
			asked.Go(func() {
				err := r.cfg.Peers.Pull(work, p, repository, hash)
				if err != nil && work.Err() == nil {
					r.log.Warn("server did not take a push", "server", p.ID, "repository", repository, "hash", hash, "error", err)
				}
				answers <- answer{p, err}
			})
		}
	})
	if err != nil {
		stop()
		return err
	}
	return r.await(ctx, v, answers)
}

// await counts answers until they decide.
func (r *Replica) await(ctx context.Context, v *vote, answers <-chan answer) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.cfg.Quorum, fmt.Errorf("no answer within %s", r.cfg.Quorum))
	defer cancel()
	for {
		switch {
		case v.won():
			return nil
		case v.lost():
			return v.error(nil)
		}
		select {
		case a := <-answers:
			v.count(a)
		case <-ctx.Done():
			return v.error(context.Cause(ctx))
		case <-r.life.Done():
			return v.error(errors.New("this server is stopping"))
		}
	}
}

// vote is the count of voters that have an object.
type vote struct {
	others  []Peer // all servers but this one
	voters  int
	have    int
	open    map[string]bool // voters that have not answered, by id
	reasons []string        // of those that answered no
}

func newVote(servers []Peer) *vote {
	v := &vote{open: map[string]bool{}}
	for _, p := range servers {
		if p.Voter {
			v.voters++
		}
		switch {
		case p.Self && p.Voter:
			v.have++
		case p.Self:
		default:
			v.others = append(v.others, p)
			if p.Voter {
				v.open[p.ID] = true
			}
		}
	}
	return v
}

// needed is a majority of the voters.
func (v *vote) needed() int { return v.voters/2 + 1 }

// won needs a voter to count at all: a server that does not know of any knows nothing
// of its cluster yet.
func (v *vote) won() bool { return v.voters > 0 && v.have >= v.needed() }

func (v *vote) lost() bool { return v.have+len(v.open) < v.needed() }

func (v *vote) count(a answer) {
	if !v.open[a.peer.ID] {
		return // no voter
	}
	delete(v.open, a.peer.ID)
	if a.err == nil {
		v.have++
		return
	}
	v.reasons = append(v.reasons, fmt.Sprintf("server %s: %v", a.peer.ID, a.err))
}

// error says what is missing, and why.
func (v *vote) error(cause error) error {
	reasons := v.reasons
	if cause != nil {
		for id := range v.open {
			reasons = append(reasons, fmt.Sprintf("server %s: %v", id, cause))
		}
	}
	if len(reasons) == 0 {
		reasons = []string{"this server does not know the others yet"}
	}
	return fmt.Errorf("%w: stored on %d of %d servers, %d are needed; nothing has changed: %s",
		ErrNoQuorum, v.have, v.voters, v.needed(), strings.Join(reasons, "; "))
}
