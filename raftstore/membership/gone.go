package membership

import (
	"errors"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// turn is how long the next server in line waits for the one before it to be elected.
const turn = 50 * time.Millisecond

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
	if k.probing {
		return
	}
	k.probing = true
	go func() {
		defer func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.probing = false
		}()
		if refuses(address) {
			k.stand(id)
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
		if err != nil {
			return errors.Is(err, unix.ECONNREFUSED)
		}
		if holds(conn) {
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

// stand makes this server stand for election in place of the leader id, when it is its
// turn: two that stand at once may both lose.
func (k *Keeper) stand(id string) {
	var line []string
	for _, m := range k.Store.Members() {
		if m.Voter && m.ID != id {
			line = append(line, m.ID)
		}
	}
	slices.Sort(line)
	place := slices.Index(line, k.Self().ID)
	if place < 0 {
		return
	}
	if place > 0 {
		timer := time.NewTimer(time.Duration(place) * turn)
		defer timer.Stop()
		for done := false; !done; {
			changed := k.Store.LeaderChange()
			if now, _ := k.Store.Leader(); now != id && now != "" {
				return
			}
			select {
			case <-timer.C:
				done = true
			case <-changed:
			}
		}
	}
	k.Log.Info("the leader's process has ended, standing for election", "leader", id)
	k.Store.LeaderGone(id)
}
