package cli

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/raftstore/state"
)

func snapshotRestoreCmd(e *env, git snapshotGit) *cobra.Command {
	var output, data, node, address string
	var key keyFlags
	c := &cobra.Command{
		Use: "restore FILE|TARGET", Short: "Found a new cluster in an empty data folder from a snapshot", Args: cobra.ExactArgs(1),
		Long: `Restore makes a data folder, complete or not at all, from which decree server starts a
cluster of one server with all that the snapshot holds. It is another cluster: it has
a new id and a new certificate authority, and its revisions begin far behind those of
the old one. Servers and agents join it with new tokens; certificates, kubeconfigs and
tokens of the old cluster are worth nothing here.`,
		Example: `  decree snapshot restore cluster.decree --identity key.txt --data /var/lib/decree
  decree snapshot restore 's3://backups/decree?region=eu-central-1' --identity key.txt    # the newest one`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			keys, err := key.keys(true)
			if err != nil {
				return err
			}
			cfg, err := restoreConfig(data, node, address)
			if err != nil {
				return err
			}
			cfg.Import = git.importing
			r, at, err := openSnapshot(c.Context(), args[0])
			if err != nil {
				return err
			}
			defer r.Close()
			defer e.progress("restoring the cluster")()
			out, err := backup.Restore(c.Context(), r, keys, cfg)
			if err != nil {
				return fmt.Errorf("%s: %w", at, err)
			}
			if output == "json" {
				return e.writeJSON(out)
			}
			return e.printRestored(at, out)
		},
	}
	key.add(c)
	c.Flags().StringVar(&data, "data", "", "data folder to make (default: $DECREE_DATA, else "+daemon.DefaultData+")")
	c.Flags().StringVar(&node, "node", "", "name of this node (default: the host's name)")
	c.Flags().StringVar(&address, "address", "127.0.0.1:7443", "host:port that other servers will reach this one at")
	jsonFlag(c, &output)
	return c
}

// restoreConfig reads the flags that say which server the restored cluster begins with.
func restoreConfig(data, node, address string) (backup.RestoreConfig, error) {
	cfg := backup.RestoreConfig{
		Dir: daemon.DataFolder(data), Node: node, Address: address, Transform: state.Restore, Now: time.Now(),
		// The cluster's authority was not restored: the first start needs a new one.
		Finish: func(dir string) error {
			_, err := pki.Open(filepath.Join(dir, "pki"), time.Now())
			return err
		},
	}
	if node == "" {
		host, err := os.Hostname()
		if err != nil {
			return cfg, err
		}
		cfg.Node = strings.ToLower(host)
	}
	if err := pki.ValidNode(cfg.Node); err != nil {
		return cfg, usageError{fmt.Errorf("--node: %w", err)}
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		return cfg, usageError{fmt.Errorf("--address %s: %w (expected host:port)", address, err)}
	}
	return cfg, nil
}

func (e *env) printRestored(at string, r backup.Restored) error {
	for _, dir := range r.Leftovers {
		fmt.Fprintf(e.Err, "decree: %s is left over from a restore that was interrupted, and can be removed\n", dir)
	}
	_, err := fmt.Fprintf(e.Out, `restored %s
cluster %s of %s (revision %d) is now cluster %s (revision %d) in %s
start it: decree server --data %s
`, printable(at), r.From.ClusterID, r.From.Created.Format(time.RFC3339), r.From.Revision, r.ClusterID, r.Revision, r.Dir, r.Dir)
	return err
}
