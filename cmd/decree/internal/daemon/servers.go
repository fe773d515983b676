package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"decree.dev/decree/raftstore/client"
)

// serversFile keeps where the servers were found last: a machine that comes back
// after a while asks there.
const serversFile = "servers.json"

// readServers returns the addresses in the data folder, none if there are none.
func readServers(data string) []string {
	b, err := os.ReadFile(filepath.Join(data, serversFile))
	if err != nil {
		return nil
	}
	var list []string
	_ = json.Unmarshal(b, &list) // a damaged file is like none: it is written anew
	return list
}

// saveServers replaces the addresses in the data folder, if they are others.
func saveServers(data string, list []string) error {
	if slices.Equal(readServers(data), list) {
		return nil
	}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	path := filepath.Join(data, serversFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(path+".new", path)
}

func (s *server) writeServers() error { return saveServers(s.cfg.Data, s.addresses()) }

// knownServers are the addresses that this machine was told of, or knew before.
func (s *server) knownServers() []string {
	return slices.Concat(s.creds.servers, s.cfg.Join, readServers(s.cfg.Data))
}

// removeFile removes a file durably; one that is not there is fine.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// knownServers is an agent's list of servers. It is safe for concurrent use.
type knownServers struct {
	data string
	mu   sync.Mutex
	list []string
}

func (k *knownServers) get() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.list
}

// set replaces the list, here and in the data folder.
func (k *knownServers) set(list []string, cfg *Config) {
	if len(list) == 0 {
		return
	}
	k.mu.Lock()
	k.list = list
	k.mu.Unlock()
	if err := saveServers(k.data, list); err != nil {
		cfg.Log.Warn("write down where the servers are", "error", err)
	}
}

// followEvery is the time between two looks at where the servers are.
const followEvery = time.Minute

// follow keeps the list up to date until ctx ends.
func (k *knownServers) follow(ctx context.Context, cfg *Config, c *client.Client) error {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		s, err := askSettings(ctx, c)
		if err != nil {
			cfg.Log.Debug("ask where the servers are", "error", err)
			continue
		}
		k.set(s.Servers, cfg)
	}
}
