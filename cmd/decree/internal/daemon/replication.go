package daemon

import (
	"context"
	"fmt"
	"net/http"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/reconciler/gitreplica"
	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/reconciler/replicated"
	"decree.dev/decree/schemas/api"
)

// gitPeers is how Git repositories reach the other servers: it implements
// [gitreplica.Peers].
type gitPeers struct {
	*server
	client *http.Client
}

var _ gitreplica.Peers = (*gitPeers)(nil)

// newReplica makes the part that keeps the built-in repositories of all servers alike.
func (s *server) newReplica() (*gitreplica.Replica, error) {
	s.gitPeers = &gitPeers{server: s, client: gitsource.OriginClient(pki.RequireGroup(s.creds.keeper.ClientTLS("http/1.1"), pki.GroupServers))}
	return gitreplica.New(gitreplica.Config{
		Peers: s.gitPeers, Store: replicated.Store{Store: s.store}, Log: s.cfg.Log.With("part", "git"), Reg: s.metrics,
	})
}

// Servers implements gitreplica.Peers.
func (p *gitPeers) Servers() []gitreplica.Peer {
	var list []gitreplica.Peer
	for _, m := range p.store.Members() {
		list = append(list, gitreplica.Peer{ID: m.ID, Address: m.Address, Self: m.ID == p.id, Voter: m.Voter, Leader: m.Leader})
	}
	return list
}

// pullRequest asks a server to pull a commit from the one that asks.
type pullRequest struct {
	Repository string `json:"repository"`
	Hash       string `json:"hash"`
	ID         string `json:"id"` // of the server that has it
}

// Pull implements gitreplica.Peers.
func (p *gitPeers) Pull(ctx context.Context, to gitreplica.Peer, repository, hash string) error {
	return p.peers.Call(ctx, to.Address, callGitPull, pullRequest{repository, hash, p.id}, nil)
}

// Origin implements gitreplica.Peers.
func (p *gitPeers) Origin(address string) gitsource.Origin {
	return gitsource.Origin{URL: "https://" + address, Client: p.client}
}

// pull does what another server asks with Pull. Where to pull from says the cluster,
// not the request.
func (s *server) pull(ctx context.Context, from peer.Identity, in pullRequest) (any, error) {
	for _, m := range s.store.Members() {
		if m.ID == in.ID {
			return struct{}{}, s.replica.Pull(ctx, in.Repository, in.Hash, m.Address)
		}
	}
	return nil, fmt.Errorf("%s asks on behalf of %s, which is no server of this cluster", from.Name, in.ID)
}

// fromServer reports whether a request comes from another server of the cluster.
func (s *server) fromServer(r *http.Request) bool {
	who, ok := apiserver.IdentityFrom(r.Context())
	return ok && r.TLS != nil && len(who.Groups) == 1 && who.Groups[0] == pki.GroupServers && s.admit(peer.ProtocolRaft, *r.TLS) == nil
}

// checkTips makes sure that a repository of a snapshot holds what its state names.
func checkTips(view api.Reader, name string, tips gitsource.Tips) error {
	src, ok := api.Get[*api.Source](view, "", name)
	switch {
	case !ok:
		return fmt.Errorf("repository %s: the snapshot's state has no source of this name", name)
	case src.Status.Applied != tips.Head:
		return fmt.Errorf("repository %s: it ends with commit %.7s, the snapshot's state names %.7s", name, tips.Head, src.Status.Applied)
	case src.Status.References != tips.References:
		return fmt.Errorf("repository %s: its references are not those that the snapshot's state names", name)
	}
	return nil
}
