package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agelib "filippo.io/age"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
)

type oneRepository struct{}

func (oneRepository) Names() ([]string, error) { return []string{"cluster"}, nil }

func (oneRepository) Export(_ context.Context, _ string, w io.Writer) error {
	_, err := io.WriteString(w, "all of it")
	return err
}

// snapshots are two archives of one cluster in a folder, a file, and the key to them.
func snapshots(t *testing.T) (folder, file, identity string) {
	t.Helper()
	dir := t.TempDir()
	folder, file, identity = filepath.Join(dir, "backups"), filepath.Join(dir, "one.decree"), filepath.Join(dir, "key.txt")
	id, err := agelib.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(identity, []byte("# a key\n"+id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, r, _ := state.Reduce(state.New(), 1, command.Txn{Time: 1, Bootstrap: &command.Bootstrap{
		ClusterID: "old", ServiceCIDR: netip.MustParsePrefix("10.97.0.0/16"), PodCIDR: netip.MustParsePrefix("10.98.0.0/16"),
		NodeMask: 24, DNS: netip.MustParseAddr("10.97.0.10"),
	}})
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 26, 16, 0, 0, 0, time.UTC)
	write := func(src backup.Source) func(io.Writer) error {
		return func(w io.Writer) error {
			_, err := backup.Save(t.Context(), w, src, backup.Protection{Recipients: []agelib.Recipient{id.Recipient()}})
			return err
		}
	}
	for range 2 {
		src := backup.Source{State: s, Repositories: oneRepository{}, Now: at}
		if _, err := backup.Folder(folder).Put(t.Context(), backup.Name{ClusterID: "old", Time: at, Revision: 1}, write(src)); err != nil {
			t.Fatal(err)
		}
		if _, err := backup.WriteFile(t.Context(), file, write(src)); err != nil {
			t.Fatal(err)
		}
		at = at.Add(time.Hour)
	}
	return folder, file, identity
}

// snapshot runs a verb and returns what it prints.
func snapshot(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	e := &env{Streams: Streams{Out: &out, Err: io.Discard}, kubeconfig: filepath.Join(t.TempDir(), "none")}
	c := snapshotCmd(e, snapshotGit{
		check: func(_ context.Context, _ *state.State, _ string, r io.Reader) error {
			b, err := io.ReadAll(r)
			if err == nil && string(b) != "all of it" {
				err = errors.New("objects are missing")
			}
			return err
		},
		importing: func(_ context.Context, _ *state.State, dir, name string, r io.Reader) error {
			b, err := io.ReadAll(r)
			return errors.Join(err, os.WriteFile(filepath.Join(dir, name), b, 0o600))
		},
	})
	strict(c)
	c.SilenceErrors, c.SilenceUsage = true, true
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	return out.String(), err
}

func TestSnapshotLook(t *testing.T) {
	folder, file, identity := snapshots(t)
	newest := filepath.Join(folder, "old", "2026-11-26T17-00-00Z-r1.decree")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"inspect", file}, "to 1 recipient"},
		{[]string{"inspect", file}, "needs the key"},
		{[]string{"inspect", file, "--identity", identity}, "2026-11-26T17:00:00Z"},
		{[]string{"inspect", file, "--identity", identity, "-o", "json"}, `"clusterID": "old"`},
		{[]string{"verify", file, "--identity", identity}, "complete and unchanged"},
		{[]string{"verify", folder, "--identity", identity}, newest},
		{[]string{"verify", "file://" + folder, "--identity", identity}, "2026-11-26T17-00-00Z-r1.decree"},
		{[]string{"verify", "file://" + filepath.Join(folder, "old", "2026-11-26T16-00-00Z-r1.decree"), "--identity", identity}, "2026-11-26T16:00:00Z"},
		{[]string{"list", folder}, "old/2026-11-26T16-00-00Z-r1.decree"},
		{[]string{"list", t.TempDir(), "-o", "json"}, "[]"},
	} {
		if out, err := snapshot(t, c.args...); err != nil || !strings.Contains(out, c.want) {
			t.Errorf("%q: %v, printed\n%swant %q", c.args, err, out, c.want)
		}
	}
}

func TestSnapshotRefuses(t *testing.T) {
	_, file, identity := snapshots(t)
	none := filepath.Join(t.TempDir(), "none")
	for _, c := range []struct {
		args  []string
		usage bool
		want  string
	}{
		{[]string{"save", none}, true, "--recipient"},
		{[]string{"save", none, "--plaintext", "--recipient", "age1x"}, true, "recipient"},
		{[]string{"save", none, "--passphrase-file", none}, false, "passphrase"},
		{[]string{"save", file, "--plaintext"}, false, "replaces no file"},
		{[]string{"save", none, "--plaintext"}, false, "no cluster here"},
		{[]string{"verify", file}, true, "--identity"},
		{[]string{"verify", file, "--plaintext"}, false, "encrypted"},
		{[]string{"verify", none, "--plaintext"}, false, "no such file"},
		{[]string{"verify", "s3://", "--plaintext"}, false, "bucket is missing"},
		{[]string{"restore", file, "--plaintext", "--identity", identity}, true, "one of"},
		{[]string{"restore", file, "--identity", identity, "--data", none, "--node", "no good name"}, true, "--node"},
		{[]string{"restore", file, "--identity", identity, "--data", none, "--address", "here"}, true, "host:port"},
		{[]string{"restore", file, "--identity", identity, "--data", filepath.Dir(file)}, false, "not empty"},
		{[]string{"inspect", identity}, false, "corrupt"},
	} {
		_, err := snapshot(t, c.args...)
		var usage usageError
		if err == nil || !strings.Contains(err.Error(), c.want) || errors.As(err, &usage) != c.usage {
			t.Errorf("%q: %v (usage %v), want something about %q", c.args, err, errors.As(err, &usage), c.want)
		}
	}
	if _, err := os.Stat(none); err == nil {
		t.Error("a refused command made a file or a folder")
	}
}

func TestSnapshotRestore(t *testing.T) {
	folder, _, identity := snapshots(t)
	data := filepath.Join(t.TempDir(), "data")
	out, err := snapshot(t, "restore", folder, "--identity", identity, "--data", data, "--node", "two", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var restored backup.Restored
	if err := json.Unmarshal([]byte(out), &restored); err != nil {
		t.Fatal(err)
	}
	node, cluster, err := raftstore.Identity(filepath.Join(data, "raft"))
	if err != nil || node != "two" || cluster != restored.ClusterID || restored.From.ClusterID != "old" || cluster == "old" {
		t.Errorf("the folder is of %s in %s, %v; said was %+v", node, cluster, err, restored)
	}
	for _, name := range []string{"pki/ca.key", "git/cluster"} {
		if _, err := os.Stat(filepath.Join(data, name)); err != nil {
			t.Error(err)
		}
	}
}
