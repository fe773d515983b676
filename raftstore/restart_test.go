package raftstore_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/seal"
	"decree.dev/decree/schemas/api"
)

func TestRestartFindsEverything(t *testing.T) {
	for name, snapshot := range map[string]bool{"from the log": false, "from a snapshot": true} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, config(dir))
			keyed := create(configMap("a", "1"))
			keyed.Key = "k"
			must(t, s, keyed)
			for i := range 20 {
				must(t, s, create(configMap("c"+strconv.Itoa(i), "x")))
			}
			if snapshot {
				if err := s.Snapshot(); err != nil {
					t.Fatal(err)
				}
				must(t, s, remove(configMap("c3", "")))
			}
			hash, cluster, revision := s.View().Hash(), s.ClusterID(), s.View().Revision()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, config(dir))
			if s.View().Hash() != hash || s.ClusterID() != cluster {
				t.Fatal("another state after the restart")
			}
			watch(t, s, revision, raftstore.Filter{})
			if _, err := s.Watch(timeout(t), 1, raftstore.Filter{}); snapshot && !errors.Is(err, raftstore.ErrCompacted) {
				t.Fatalf("watch from before the snapshot: %v", err)
			}
			if r := must(t, s, keyed); r.Revision != 2 {
				t.Fatalf("the key of an applied transaction was forgotten: %+v", r)
			}
			must(t, s, create(configMap("b", "1")))
		})
	}
}

func TestSnapshotsAreTakenAndLogIsCut(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.SnapshotThreshold, cfg.SnapshotInterval, cfg.TrailingLogs = 10, 5e6, 5
	s := open(t, cfg)
	for i := range 100 {
		must(t, s, create(configMap("c"+strconv.Itoa(i), "x")))
	}
	if err := s.Snapshot(); err != nil {
		t.Fatal(err)
	}
	hash := s.View().Hash()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	bolt := openLog(t, cfg.Dir)
	first, _ := bolt.Log.FirstIndex()
	last, _ := bolt.Log.LastIndex()
	bolt.Close()
	if last-first > 50 {
		t.Fatalf("the log holds entries %d to %d", first, last)
	}
	if s = open(t, cfg); s.View().Hash() != hash {
		t.Fatal("another state after the restart")
	}
}

func openLog(t *testing.T, dir string) *seal.Vault {
	v, err := seal.Open(seal.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestUndecodableEntryStopsTheStore puts an entry of a future version into the log.
func TestUndecodableEntryStopsTheStore(t *testing.T) {
	dir := t.TempDir()
	s := open(t, config(dir))
	must(t, s, create(configMap("a", "1")))
	hash := s.View().Hash()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	vault := openLog(t, dir)
	last, _ := vault.Log.LastIndex()
	var entry raft.Log
	if err := vault.Log.GetLog(last, &entry); err != nil {
		t.Fatal(err)
	}
	bad := &raft.Log{Index: last + 1, Term: entry.Term, Type: raft.LogCommand, Data: []byte{command.Newest + 1, 0}}
	if err := errors.Join(vault.Log.StoreLog(bad), vault.Close()); err != nil {
		t.Fatal(err)
	}

	for range 2 { // it is not skipped the second time either
		fatal := make(chan error, 1)
		cfg := config(dir)
		cfg.Fatal = func(err error) { fatal <- err }
		s, err := raftstore.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		var version *command.VersionError
		if err := <-fatal; !errors.Is(err, raftstore.ErrFatal) || !errors.As(err, &version) || !strings.Contains(err.Error(), "must not be skipped") {
			t.Errorf("fatal: %v", err)
		}
		if err := s.WaitReady(timeout(t)); !errors.Is(err, raftstore.ErrFatal) {
			t.Errorf("ready: %v", err)
		}
		if _, err := s.Propose(timeout(t), create(configMap("b", "1"))); !errors.Is(err, raftstore.ErrFatal) {
			t.Errorf("propose: %v", err)
		}
		if _, err := s.Read(timeout(t)); !errors.Is(err, raftstore.ErrFatal) {
			t.Errorf("read: %v", err)
		}
		if s.View().Hash() != hash {
			t.Error("the state went on")
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestFolderIsGuarded(t *testing.T) {
	dir := t.TempDir()
	s := open(t, config(dir))
	refuse := func(words string, edit func(*raftstore.Config)) {
		t.Helper()
		cfg := config(dir)
		edit(&cfg)
		s, err := raftstore.Open(cfg)
		if err == nil {
			s.Close()
			t.Fatalf("opened, want %q", words)
		}
		if !strings.Contains(err.Error(), words) || !strings.Contains(err.Error(), cfg.Dir) {
			t.Fatalf("got %q, want %q", err, words)
		}
	}
	refuse("another process uses this data folder", func(*raftstore.Config) {})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	refuse(`belongs to node "one", this is node "two"`, func(c *raftstore.Config) { c.NodeID = "two" })
	refuse("belongs to cluster", func(c *raftstore.Config) { c.Bootstrap.ClusterID = "other" })

	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "raft.db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refuse("not made by decree", func(c *raftstore.Config) { c.Dir = foreign })
	if err := os.WriteFile(filepath.Join(dir, "identity.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	refuse("identity.json", func(*raftstore.Config) {})
}

func TestOpenRefusesBadSettings(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.Bootstrap.NodeMask = 8
	if _, err := raftstore.Open(cfg); err == nil || !strings.Contains(err.Error(), "/8") {
		t.Fatalf("got %v", err)
	}
	if _, err := raftstore.Open(raftstore.Config{}); err == nil {
		t.Fatal("opened nothing")
	}
	if n := len(api.Kinds()); n == 0 {
		t.Fatal("no kinds")
	}
}
