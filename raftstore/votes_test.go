package raftstore

import (
	"testing"

	"github.com/hashicorp/raft"
)

// granter grants all votes, under its own id.
type granter struct {
	raft.Transport
	id string
}

func (g granter) RequestVote(_ raft.ServerID, _ raft.ServerAddress, _ *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	resp.ID, resp.Granted, resp.Term = []byte(g.id), true, 7
	return nil
}

func (g granter) RequestPreVote(_ raft.ServerID, _ raft.ServerAddress, _ *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	resp.ID, resp.Granted, resp.Term = []byte(g.id), true, 7
	return nil
}

// TestNobodyVotesForAnother: a server that was reinstalled answers under its new id, and
// its votes are not those of the former one.
func TestNobodyVotesForAnother(t *testing.T) {
	for id, want := range map[string]bool{"c": true, "c-2": false, "": false} {
		transport := onlyTrueVotes(granter{id: id})
		var vote raft.RequestVoteResponse
		if err := transport.RequestVote("c", "c:1", &raft.RequestVoteRequest{}, &vote); err != nil || vote.Granted != want || vote.Term != 7 {
			t.Errorf("a vote of %q in the name of c: %+v, %v", id, vote, err)
		}
		var before raft.RequestPreVoteResponse
		if err := transport.(raft.WithPreVote).RequestPreVote("c", "c:1", &raft.RequestPreVoteRequest{}, &before); err != nil || before.Granted != want || before.Term != 7 {
			t.Errorf("a vote before the vote of %q in the name of c: %+v, %v", id, before, err)
		}
	}
}
