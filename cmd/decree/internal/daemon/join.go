package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/raftstore/join"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/schemas/api"
)

// settingsFile keeps what an agent knows of its cluster, for a start without a server.
const settingsFile = "cluster.json"

// Agent runs the agent of this machine, for servers elsewhere, until ctx ends.
// Containers and services outlive it.
func Agent(ctx context.Context, cfg Config, out io.Writer) error {
	begun := time.Now()
	if err := cfg.complete(); err != nil {
		return err
	}
	release, err := lock(cfg.Data)
	if err != nil {
		return err
	}
	defer release()
	keeper, servers, err := agentCredentials(ctx, &cfg)
	if err != nil {
		return err
	}
	known := &knownServers{data: cfg.Data, list: servers}
	c, err := client.New(client.Config{Server: "https://" + servers[0], Others: known.get, TLS: keeper.ClientTLS(), Log: cfg.Log})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := learnSettings(ctx, &cfg, c, known); err != nil {
		return err
	}
	metrics := newRegistry()
	g := newGroup(ctx)
	n, err := newNode(g.ctx, &cfg, controlPlaneAt{url: "https://" + servers[0], others: known.get, keeper: keeper}, metrics)
	if err != nil {
		return errors.Join(err, g.stop())
	}
	g.atEnd(n.close)
	if err := n.importImages(g.ctx); err != nil {
		return errors.Join(err, g.stop())
	}
	n.run(g.start)
	g.start("tunnel", n.tunnel(known.get, keeper, prometheus.Gatherers{metrics, n.front}))
	member := &join.Member{Keeper: keeper, Servers: known.get, Log: cfg.Log.With("part", "certificates"), Every: cfg.TrustEvery}
	g.start("renew", func(ctx context.Context) error { return keeper.Run(ctx, member.Renew) })
	g.start("follow", member.Follow)
	g.start("servers", func(ctx context.Context) error { return known.follow(ctx, &cfg, c) })
	fmt.Fprintf(out, "agent %s runs after %d ms, servers %v\n", cfg.Node, time.Since(begun).Milliseconds(), known.get())
	return g.wait()
}

// agentCredentials returns the certificates of this machine's agent, joining the
// cluster for them if need be, and where the servers are.
func agentCredentials(ctx context.Context, cfg *Config) (*pki.Keeper, []string, error) {
	keeper, err := nodeKeeper(cfg)
	if err != nil {
		return nil, nil, err
	}
	servers := readServers(cfg.Data)
	if ready := keeper.Ready(time.Now()); ready != nil {
		if len(cfg.Join) == 0 {
			return nil, nil, fmt.Errorf("%w: decree agent --join HOST:PORT --token TOKEN (decree token create --role agent, on a server, makes one)", ready)
		}
		answer, err := joinCluster(ctx, cfg, keeper, api.RoleAgent, nil)
		if err != nil {
			return nil, nil, err
		}
		servers = answer.Servers
		if err := saveServers(cfg.Data, servers); err != nil {
			return nil, nil, err
		}
	}
	servers = append(servers, cfg.Join...)
	if len(servers) == 0 {
		return nil, nil, errors.New("no server is known: --join HOST:PORT names one")
	}
	return keeper, servers, nil
}

// askSettings asks a server for the settings.
func askSettings(ctx context.Context, c *client.Client) (*Settings, error) {
	data, err := c.Raw(ctx, http.MethodGet, clusterPath+"settings", nil, "", nil)
	if err != nil {
		return nil, err
	}
	var s Settings
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("read the cluster's settings: %w", err)
	}
	return &s, nil
}

// learnSettings fills in what the cluster was born with: from a server, or from the
// last time that one answered.
func learnSettings(ctx context.Context, cfg *Config, c *client.Client, known *knownServers) error {
	s, err := askSettings(ctx, c)
	path := cfg.dir(settingsFile)
	if err != nil {
		data, readErr := os.ReadFile(path)
		if readErr != nil {
			return err
		}
		s = &Settings{}
		if err := json.Unmarshal(data, s); err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		cfg.Log.Warn("no server answers, starting with what is known", "error", err)
	} else {
		data, err := json.Marshal(s)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return fmt.Errorf("write down the cluster's settings: %w", err)
		}
		known.set(s.Servers, cfg)
	}
	cfg.DNS, cfg.Domain = s.DNS, s.Domain
	cfg.setRanges(s.families())
	return nil
}
