package membership

import (
	"cmp"
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

const (
	// turn is how long the next server in line waits for the one before it to be elected.
	turn = 50 * time.Millisecond
	// standing is how long it waits in all while that one stands, and again how long
	// before it asks anew.
	standing = 300 * time.Millisecond
	again    = 10 * time.Millisecond
	// backlog is how many entries a server may have to apply before it leads, when others
	// could lead at once. A server that has just started goes through its whole log.
	backlog = 512
)

// ConnectionEnded is told when another server has closed its connection to this one.
// If that was the leader, and its machine says that nobody listens there any more, its
// process has ended: there are no heartbeats to wait for. A machine that says nothing
// is left to the timeouts of raft.
//
// It returns at once.
func (k *Keeper) ConnectionEnded(who peer.Identity) {
	id, address := k.Store.Leader()
	leader, ok := api.Get[*api.Server](k.Store.View(), "", id)
	if !ok || who.Name != pki.ServerPrefix+leader.Spec.Node || k.Store.IsLeader() {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.probing == id {
		return
	}
	k.probing = id
	term := k.Store.Progress().Term // before another server stands
	go func() {
		defer func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			if k.probing == id {
				k.probing = ""
			}
		}()
		if refuses(address) {
			k.stand(id, term)
		}
	}()
}

const (
	// linger is how long a connection to a server has to hold for its process to count
	// as alive, tries how many may break off before.
	linger = time.Second
	tries  = 5
)

// refuses reports whether the machine at address says that nobody listens there. A
// process that ends closes its connections before its port: whoever learns of the end
// by the first still reaches the second, and is cut off with it. So only a connection
// that holds is an answer.
func refuses(address string) bool {
	for range tries {
		conn, err := net.DialTimeout("tcp", address, patience)
		switch {
		case errors.Is(err, unix.ECONNREFUSED):
			return true
		case errors.Is(err, unix.ECONNRESET): // between the two
		case err != nil || holds(conn):
			return false
		}
	}
	return false
}

// holds waits for the other end to break off a connection, and closes it. A server says
// nothing before it is spoken to.
func holds(conn net.Conn) bool {
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(linger)) // a connection that has ended shows it when it is read
	_, err := conn.Read(make([]byte, 1))
	return err == nil || errors.Is(err, os.ErrDeadlineExceeded)
}

// stand makes this server stand for election in place of the leader id of a term, when
// it is its turn: two that stand at once may both lose. A disk that is slow to write a
// vote down is no reason to stand beside its server.
func (k *Keeper) stand(id string, term uint64) {
	var line []raftstore.Member
	for _, m := range k.Store.Members() {
		if m.Voter && m.ID != id {
			line = append(line, m)
		}
	}
	now := k.Store.Progress()
	place, before, after := inLine(line, k.Self().ID, now.Commit-min(now.Applied, now.Commit) > backlog)
	if place < 0 || !k.pause(id, time.Duration(place)*turn) {
		return
	}
	ahead := func() []raftstore.Member {
		if k.Store.Progress().Term > term { // a vote was asked for: anybody may be the one that stands
			return slices.Concat(before, after)
		}
		return before
	}
	for begun := time.Now(); k.anyStands(ahead(), id, term); {
		if time.Since(begun) > standing || !k.pause(id, again) {
			return // the timeouts of raft go on from here
		}
	}
	k.Log.Info("the leader's process has ended, standing for election", "leader", id)
	k.Store.LeaderGone(id)
}

// inLine returns when it is a server's turn, counted in turns from 0, and who stands
// before and after it: in the order of ids, and last of all if it is behind. Its place is
// -1 if it is not among those that may stand. It sorts voters.
func inLine(voters []raftstore.Member, self string, behind bool) (place int, before, after []raftstore.Member) {
	slices.SortFunc(voters, func(a, b raftstore.Member) int { return cmp.Compare(a.ID, b.ID) })
	at := slices.IndexFunc(voters, func(m raftstore.Member) bool { return m.ID == self })
	switch {
	case at < 0:
		return -1, nil, nil
	case behind:
		return len(voters) + at, slices.Delete(voters, at, at+1), nil
	default:
		return at, voters[:at], voters[at+1:]
	}
}

// pause waits for d, and reports whether there is no other leader than id by then.
func (k *Keeper) pause(id string, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		changed := k.Store.LeaderChange()
		if now, _ := k.Store.Leader(); now != id && now != "" {
			return false
		}
		select {
		case <-timer.C:
			return true
		case <-changed:
		}
	}
}

// anyStands asks servers whether one of them stands in place of the leader id of a term.
func (k *Keeper) anyStands(servers []raftstore.Member, id string, term uint64) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 2*turn)
	defer cancel()
	answers := make(chan bool, len(servers))
	for _, m := range servers {
		go func() {
			var theirs Status
			err := k.Peers.Call(ctx, m.Address, callStatus, struct{}{}, &theirs)
			answers <- err == nil && stands(k.status(), theirs, id, term)
		}()
	}
	for range servers {
		if <-answers {
			return true
		}
	}
	return false
}

// stands reports whether there is reason to wait for a server, as it does not follow the
// leader id of a term any more. If its log is shorter than the own one it cannot win, but
// in its term nobody else can either, as it has given its vote to itself: it has to ask
// for votes first, which takes who is asked to that term, and then to the next.
func stands(mine, theirs Status, id string, term uint64) bool {
	return theirs.Leader != id && (theirs.LastIndex >= mine.LastIndex || mine.Term < max(theirs.Term, term+1))
}
