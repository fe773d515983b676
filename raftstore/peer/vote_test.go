package peer_test

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"testing"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
)

// voter starts a server on l that grants every vote.
func (c *cluster) voter(l net.Listener) (stop func()) {
	config := c.config(pki.ServerIdentity("s1"))
	mux := peer.NewMux(l, peer.MuxConfig{TLS: config})
	transport := peer.NewRaftTransport(peer.RaftConfig{Listener: mux.Listen(peer.ProtocolRaft), Address: l.Addr().String(), TLS: func() *tls.Config { return config }})
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { mux.Serve(ctx) })
	parts.Go(func() {
		for {
			select {
			case rpc := <-transport.Consumer():
				switch rpc.Command.(type) {
				case *raft.RequestVoteRequest:
					rpc.Respond(&raft.RequestVoteResponse{Granted: true}, nil)
				case *raft.RequestPreVoteRequest:
					rpc.Respond(&raft.RequestPreVoteResponse{Granted: true}, nil)
				}
			case <-ctx.Done():
				return
			}
		}
	})
	return func() {
		cancel()
		parts.Wait()
		if err := transport.Close(); err != nil {
			c.t.Error(err)
		}
	}
}

// TestVoteAfterRestart asks a server for its vote that was asked before it was started
// anew: all connections that are left are those of its former process.
func TestVoteAfterRestart(t *testing.T) {
	c := newCluster(t, peer.Limits{})
	listen := func(address string) net.Listener {
		t.Helper()
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	own := listen("127.0.0.1:0")
	defer own.Close()
	config := c.config(pki.ServerIdentity("s2"))
	candidate := peer.NewRaftTransport(peer.RaftConfig{
		Listener: peer.NewMux(own, peer.MuxConfig{TLS: config}).Listen(peer.ProtocolRaft), Address: own.Addr().String(), TLS: func() *tls.Config { return config },
	})
	defer candidate.Close()

	l := listen("127.0.0.1:0")
	address := l.Addr().String()
	vote := func(ask func() (bool, error)) {
		t.Helper()
		var asked sync.WaitGroup
		for range 5 { // at once, so that more than one connection is left
			asked.Go(func() {
				if granted, err := ask(); err != nil || !granted {
					t.Errorf("vote: %v, %v", granted, err)
				}
			})
		}
		asked.Wait()
	}
	for _, kind := range []struct {
		name string
		ask  func() (bool, error)
	}{
		{"vote", func() (bool, error) {
			var r raft.RequestVoteResponse
			err := candidate.RequestVote("s1", raft.ServerAddress(address), &raft.RequestVoteRequest{Term: 2}, &r)
			return r.Granted, err
		}},
		{"pre-vote", func() (bool, error) {
			var r raft.RequestPreVoteResponse
			err := candidate.RequestPreVote("s1", raft.ServerAddress(address), &raft.RequestPreVoteRequest{Term: 2}, &r)
			return r.Granted, err
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			stop := c.voter(l)
			vote(kind.ask)
			stop()
			l = listen(address)
			stop = c.voter(l)
			vote(kind.ask)
			stop()
			l = listen(address)
			l.Close()
			if granted, err := kind.ask(); err == nil || granted {
				t.Errorf("vote of a server that is not there: %v, %v", granted, err)
			}
			l = listen(address)
		})
	}
	l.Close()
}
