package raftstore

import "github.com/hashicorp/raft"

// trueVotes is a transport over which nobody votes for somebody else. A machine that has
// lost its disk is another server, under the address of the one that it was. As long as
// that one is in the configuration it is asked for its vote; the new one would answer,
// and vote for a candidate without what the former one has acknowledged.
type trueVotes struct{ raft.Transport }

// truePreVotes does the same for the question that comes before.
type truePreVotes struct {
	trueVotes
	inner raft.WithPreVote
}

// onlyTrueVotes wraps a transport, with all that raft may ask of it.
func onlyTrueVotes(t raft.Transport) raft.Transport {
	if inner, ok := t.(raft.WithPreVote); ok {
		return truePreVotes{trueVotes{t}, inner}
	}
	return trueVotes{t}
}

// Close implements raft.WithClose.
func (t trueVotes) Close() error {
	if c, ok := t.Transport.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}

// RequestVote implements raft.Transport.
func (t trueVotes) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	err := t.Transport.RequestVote(id, target, args, resp)
	resp.Granted = resp.Granted && isFrom(id, resp.RPCHeader)
	return err
}

// RequestPreVote implements raft.WithPreVote.
func (t truePreVotes) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	err := t.inner.RequestPreVote(id, target, args, resp)
	resp.Granted = resp.Granted && isFrom(id, resp.RPCHeader)
	return err
}

// isFrom reports whether an answer is from the server that was asked.
func isFrom(id raft.ServerID, h raft.RPCHeader) bool { return string(h.ID) == string(id) }
