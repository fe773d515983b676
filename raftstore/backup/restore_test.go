package backup_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// importFile keeps what was exported as one file.
func importFile(_ context.Context, s *state.State, dir, name string, r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if s.Settings().Restored == nil {
		return errors.New("not the state that the new cluster begins with")
	}
	return os.WriteFile(filepath.Join(dir, name), data, 0o600)
}

func restoring(dir string) backup.RestoreConfig {
	return backup.RestoreConfig{
		Dir: dir, Node: "new", Address: "127.0.0.1:7443", Transform: state.Restore, Import: importFile, Now: now.Add(time.Hour),
		Finish: func(dir string) error { return os.WriteFile(filepath.Join(dir, "finished"), nil, 0o600) },
	}
}

// openRestored opens the store in a restored data folder, as a server does.
func openRestored(t *testing.T, dir string) *raftstore.Store {
	t.Helper()
	s, err := raftstore.Open(raftstore.Config{Dir: filepath.Join(dir, "raft"), NodeID: "new"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRestore(t *testing.T) {
	k := newKey(t)
	data := save(t, source(), k.Protection)
	dir := filepath.Join(t.TempDir(), "deep", "data")
	out, err := backup.Restore(t.Context(), bytes.NewReader(data), k.Keys, restoring(dir))
	if err != nil {
		t.Fatal(err)
	}
	old := cluster()
	if out.From.ClusterID != old.Settings().ClusterID || out.ClusterID == out.From.ClusterID || out.Dir != dir {
		t.Errorf("restored %+v", out)
	}
	for name, want := range map[string][]byte{"git/cluster": big(), "git/empty": nil, "git/shop": []byte("objects and refs"), "finished": nil} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d, %v", name, len(got), len(want), err)
		}
	}
	noLeftovers(t, dir)

	s := openRestored(t, dir)
	view := s.View()
	compare(t, old, view, out)
	if members := s.Members(); len(members) != 1 || members[0].ID != "new" || members[0].Address != "127.0.0.1:7443" || !members[0].Voter {
		t.Errorf("members %+v", members)
	}
	r, err := s.Propose(t.Context(), create(secret("later")))
	if err != nil || r.Err() != nil || r.Revision <= old.Revision()+backup.RevisionJump {
		t.Fatalf("the restored cluster cannot be written: %+v, %v", r, err)
	}
	// A transaction of before is known, and not applied again.
	again := create(secret("s00000"))
	again.Key = "batch0"
	if r, err := s.Propose(t.Context(), again); err != nil || r.Err() != nil {
		t.Errorf("a retry across the restore: %+v, %v", r, err)
	}
	// A client of the old cluster, ahead of the snapshot, has to list again.
	if _, err := s.Watch(t.Context(), old.Revision()+1000, raftstore.Filter{Resource: api.Secrets}); !errors.Is(err, raftstore.ErrCompacted) {
		t.Errorf("watch from a revision of the old cluster: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again2 := openRestored(t, dir)
	if _, ok := api.Get[*corev1.Secret](again2.View(), "default", "later"); !ok {
		t.Error("a change after the restore is lost")
	}
}

// compare holds that the restored state has everything, apart from what must differ.
func compare(t *testing.T, old, view *state.State, out backup.Restored) {
	t.Helper()
	dropped := []string{"jointokens", "servers", "authorities", "machines"}
	for _, kind := range api.Kinds() {
		if slices.ContainsFunc(dropped, func(s string) bool { return strings.HasPrefix(string(kind.Resource), s) }) {
			if n := view.Len(kind.Resource); n > 0 {
				t.Errorf("%d %s of the old cluster were restored", n, kind.Resource)
			}
			continue
		}
		if view.Len(kind.Resource) != old.Len(kind.Resource) {
			t.Errorf("%s: %d, were %d", kind.Resource, view.Len(kind.Resource), old.Len(kind.Resource))
		}
		for o := range old.List(kind.Resource, "") {
			restored, ok := view.Get(api.KeyOf(o))
			if !ok || !bytes.Equal(encoded(t, o), encoded(t, restored)) {
				t.Fatalf("%s was not restored as it was", api.KeyOf(o))
			}
		}
	}
	if old.Len(api.Secrets) != objects || old.Len(api.Revisions) != 1 {
		t.Fatal("the old cluster has not what this test is about")
	}
	settings := view.Settings()
	if settings.ClusterID != out.ClusterID || settings.ServiceCIDR != old.Settings().ServiceCIDR || settings.Restored == nil || settings.Restored.ClusterID != out.From.ClusterID {
		t.Errorf("settings %+v", settings)
	}
	if view.Revision() < old.Revision()+backup.RevisionJump || view.Revision() != out.Revision {
		t.Errorf("revision %d, was %d, said to be %d", view.Revision(), old.Revision(), out.Revision)
	}
}

func encoded(t *testing.T, o api.Object) []byte {
	t.Helper()
	b, err := command.AppendObject(nil, o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func noLeftovers(t *testing.T, dir string) {
	t.Helper()
	if list, _ := filepath.Glob(dir + ".restoring-*"); len(list) > 0 {
		t.Errorf("left behind: %q", list)
	}
}

func TestRestoreTwice(t *testing.T) {
	data := save(t, small(), plain)
	ids := map[string]bool{"small": true}
	for range 3 {
		out, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(filepath.Join(t.TempDir(), "data")))
		if err != nil {
			t.Fatal(err)
		}
		if ids[out.ClusterID] {
			t.Errorf("cluster %s twice", out.ClusterID)
		}
		ids[out.ClusterID] = true
	}
	// A restored cluster can be saved and restored.
	dir := filepath.Join(t.TempDir(), "data")
	if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(dir)); err != nil {
		t.Fatal(err)
	}
	view := openRestored(t, dir).View()
	data = save(t, backup.Source{State: view, Now: now}, plain)
	if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(filepath.Join(t.TempDir(), "data"))); err != nil {
		t.Errorf("restore of a restored cluster: %v", err)
	}
}

func TestRestoreRefuses(t *testing.T) {
	data := save(t, small(), plain)
	cut := data[:len(data)-1]
	flipped := bytes.Clone(data)
	flipped[len(data)/2] ^= 1
	errImport := errors.New("no space left")
	for name, c := range map[string]struct {
		data   []byte
		change func(*backup.RestoreConfig)
		want   string
	}{
		"cut off":       {cut, nil, "corrupt"},
		"flipped":       {flipped, nil, "corrupt"},
		"cut off early": {data[:50], nil, "corrupt"},
		"no importer":   {data, func(c *backup.RestoreConfig) { c.Import = nil }, "nothing to import"},
		"import fails": {data, func(c *backup.RestoreConfig) {
			c.Import = func(context.Context, *state.State, string, string, io.Reader) error { return errImport }
		}, "no space left"},
		"finish fails": {data, func(c *backup.RestoreConfig) { c.Finish = func(string) error { return errImport } }, "no space left"},
		"same cluster": {data, func(c *backup.RestoreConfig) { c.Transform = keepCluster }, "confused"},
		"storage fails": {data, func(c *backup.RestoreConfig) {
			c.Storage = func(string) (raftstore.Storage, error) { return raftstore.Storage{}, errImport }
		}, "no space left"},
		"not configured": {data, func(c *backup.RestoreConfig) { c.Node = "" }, "required"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := restoring(filepath.Join(t.TempDir(), "data"))
			if c.change != nil {
				c.change(&cfg)
			}
			_, err := backup.Restore(t.Context(), bytes.NewReader(c.data), backup.Keys{}, cfg)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want something about %q", err, c.want)
			}
			if _, err := os.Lstat(cfg.Dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is a data folder: %v", err)
			}
			noLeftovers(t, cfg.Dir)
		})
	}
}

func keepCluster(old *state.State, _ string, _ int64, _ uint64) (*state.State, error) {
	return old, nil
}

func TestRestoreFolder(t *testing.T) {
	data := save(t, small(), plain)
	dir := t.TempDir() // exists, and is empty
	if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(dir)); err != nil {
		t.Fatalf("into an empty folder: %v", err)
	}
	before, err := os.ReadFile(filepath.Join(dir, "raft", "identity.json"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(dir)); err == nil {
		t.Error("restored into a folder in use")
	}
	after, err := os.ReadFile(filepath.Join(dir, "raft", "identity.json"))
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("the folder was changed: %v", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(link)); err != nil {
		t.Errorf("into an empty folder that a link leads to: %v", err)
	}
	openRestored(t, link)
	if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring("/proc")); err == nil || !strings.Contains(err.Error(), "root of a file system") {
		t.Errorf("over a mount: %v", err)
	}
	// One that is filled while the restore runs is left alone too.
	cfg := restoring(filepath.Join(t.TempDir(), "data"))
	cfg.Finish = func(string) error { return os.MkdirAll(filepath.Join(cfg.Dir, "mine"), 0o700) }
	if _, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, cfg); err == nil {
		t.Error("replaced a folder that came meanwhile")
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir, "mine")); err != nil {
		t.Error(err)
	}
}

// TestRestoreKilled kills a restore in the middle: there is no data folder, and the next
// restore makes it.
func TestRestoreKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	data := save(t, source(), plain)
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "BACKUP_TEST_RESTORE="+dir)
	child.Stdin = bytes.NewReader(data)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "in the middle\n" {
		t.Errorf("the child says %q, %v", line, err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // it was killed
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("there is a data folder: %v", err)
	}
	again, err := backup.Restore(t.Context(), bytes.NewReader(data), backup.Keys{}, restoring(dir))
	if err != nil {
		t.Fatal(err)
	}
	if len(again.Leftovers) != 1 {
		t.Errorf("leftovers %q", again.Leftovers)
	}
	openRestored(t, dir)
}

// TestFoundRefuses holds that a cluster is founded in folders only that hold none.
func TestFoundRefuses(t *testing.T) {
	next, err := state.Restore(small().State, "other", 0, backup.RevisionJump)
	if err != nil {
		t.Fatal(err)
	}
	f := raftstore.Founding{Dir: t.TempDir(), NodeID: "new", Address: "127.0.0.1:7443", State: next}
	if err := raftstore.Found(f); err != nil {
		t.Fatal(err)
	}
	if err := raftstore.Found(f); err == nil {
		t.Error("founded a cluster where one is")
	}
	f.Dir, f.State = t.TempDir(), state.New()
	if err := raftstore.Found(f); err == nil {
		t.Error("founded a cluster without settings")
	}
}
