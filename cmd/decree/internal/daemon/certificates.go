package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"decree.dev/decree/raftstore/join"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// credentials are how the server of this machine shows who it is.
type credentials struct {
	keeper *pki.Keeper
	// founder is set as long as this machine holds the CA of a cluster that does not
	// hold it itself yet.
	founder *api.AuthoritySpec
	// servers are where the cluster was found, when this start has joined it.
	servers []string
}

// caKey is where the CA's key lies until the cluster has it.
func (c *Config) caKey() string { return c.dir("pki", "ca.key") }

// serverCredentials loads the certificate of this machine's server. Without one, the
// machine joins the cluster that it was told of, or founds one.
func serverCredentials(ctx context.Context, cfg *Config) (*credentials, error) {
	keeper, err := pki.OpenKeeper(cfg.dir("pki", "server"), cfg.Log.With("part", "certificates"))
	if err != nil {
		return nil, err
	}
	c := &credentials{keeper: keeper}
	now := time.Now()
	ready := keeper.Ready(now)
	_, missing := os.Stat(cfg.caKey())
	_, stored := os.Stat(cfg.dir("raft"))
	switch {
	case ready == nil && missing != nil:
		return c, nil
	case len(cfg.Join) > 0 && missing != nil:
		answer, err := joinCluster(ctx, cfg, keeper, api.RoleServer, cfg.hosts())
		if err != nil {
			return nil, err
		}
		c.servers = answer.Servers
		return c, nil
	case missing != nil && stored == nil:
		return nil, fmt.Errorf("%w; %s belongs to a cluster: join it again (decree server --join HOST:PORT --token TOKEN), or choose another --data", ready, cfg.Data)
	}
	authority, err := pki.Open(cfg.dir("pki"), now)
	if err != nil {
		return nil, err
	}
	spec, err := authority.Spec()
	if err != nil {
		return nil, err
	}
	c.founder = &spec
	if ready == nil {
		return c, nil
	}
	issuer, err := pki.NewIssuer(spec)
	if err != nil {
		return nil, err
	}
	return c, certify(keeper, issuer, pki.ServerIdentity(cfg.Node, cfg.hosts()...), now)
}

// certify gives a keeper of this machine its first certificate, signed here.
func certify(keeper *pki.Keeper, issuer *pki.Issuer, identity pki.Request, now time.Time) error {
	csr, err := keeper.JoinRequest()
	if err != nil {
		return err
	}
	chain, err := issuer.Sign(csr, identity, now)
	if err != nil {
		return err
	}
	return keeper.Install(chain, issuer.Bundle(), now)
}

// joinCluster asks the servers of a cluster, one after the other, to let this machine in.
func joinCluster(ctx context.Context, cfg *Config, keeper *pki.Keeper, role string, hosts []string) (*join.Answer, error) {
	token, err := pki.ParseToken(cfg.Token)
	if err != nil {
		return nil, fmt.Errorf("--token: %w (decree token create --role %s, on any server, makes one)", err, role)
	}
	csr, err := keeper.JoinRequest()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, address := range cfg.Join {
		answer, err := join.Request(ctx, join.Application{Address: address, Token: token, Role: role, Node: cfg.Node, Hosts: hosts, CSR: csr})
		if err != nil {
			errs = append(errs, err)
			continue
		}
		return answer, keeper.Install(answer.Chain, answer.Bundle, time.Now())
	}
	return nil, errors.Join(errs...)
}

// hosts are the names and addresses that this machine's server answers under.
func (c *Config) hosts() []string {
	hosts := []string{"localhost", "127.0.0.1", "::1", c.Node}
	if host, _, err := net.SplitHostPort(c.Advertise); err == nil {
		hosts = append(hosts, host)
	}
	for _, ip := range c.hostIPs() {
		if len(hosts) < 24 {
			hosts = append(hosts, ip.String())
		}
	}
	return hosts
}

// keyHash is what the cluster knows a keeper's machine by.
func keyHash(k *pki.Keeper) (string, error) {
	leaf := k.Leaf()
	if leaf == nil {
		return "", pki.ErrNoCertificate
	}
	return pki.KeyHash(leaf.PublicKey)
}
