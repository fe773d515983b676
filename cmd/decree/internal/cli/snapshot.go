package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/raftstore/backup"
)

// snapshotGit is how snapshots reach into the Git repositories that they hold.
type snapshotGit struct {
	check     backup.CheckRepository
	importing backup.ImportRepository
}

func snapshotCmd(e *env, git snapshotGit) *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshot",
		Short: "Save the whole cluster into one file, check such files, and restore from them",
		Long: `A snapshot holds everything the cluster knows at one revision, the record of commits
and the Git repositories included. It is encrypted with age (age-encryption.org) for
the recipients that are named; age-keygen makes their keys.

Where a FILE is expected, a target can be named instead: a folder, file:///FOLDER or
s3://BUCKET/PREFIX?endpoint=HOST&region=REGION. Credentials of buckets come from
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, from ~/.aws/credentials (or credentials=FILE
in the URL), or from the machine's role.`,
		Example: `  decree snapshot save cluster.decree --recipient age1...
  decree snapshot verify cluster.decree --identity key.txt
  decree snapshot restore cluster.decree --identity key.txt --data /var/lib/decree`,
	}
	c.AddCommand(snapshotSaveCmd(e), snapshotListCmd(e), snapshotInspectCmd(e), snapshotVerifyCmd(e, git), snapshotRestoreCmd(e, git))
	return c
}

func jsonFlag(c *cobra.Command, output *string) {
	c.Flags().StringVarP(output, "output", "o", "", "json for everything")
}

func snapshotSaveCmd(e *env) *cobra.Command {
	var output, passphrase string
	var recipients []string
	var plaintext bool
	c := &cobra.Command{
		Use: "save FILE|TARGET", Short: "Save the cluster into a file, or under a name of its own into a target", Args: cobra.ExactArgs(1),
		Long: `Save asks the cluster for a snapshot, encrypts it here and checks it on the way. The
file is there once it is complete; one that exists is not replaced. A target keeps it as
CLUSTERID/TIME-rREVISION.decree.`,
		Example: `  decree snapshot save cluster.decree --recipient age1...
  decree snapshot save 's3://backups/decree?region=eu-central-1' --recipient age1...`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			protection, err := protect(recipients, passphrase, plaintext)
			if err != nil {
				return err
			}
			return e.saveSnapshot(c.Context(), args[0], protection, output)
		},
	}
	c.Flags().StringSliceVar(&recipients, "recipient", nil, "public key (age1...) of who can read it; may be repeated")
	c.Flags().StringVar(&passphrase, "passphrase-file", "", "file whose first line is the passphrase to encrypt with")
	c.Flags().BoolVar(&plaintext, "plaintext", false, "do not encrypt: the file then shows all secrets to everybody")
	jsonFlag(c, &output)
	return c
}

// protect reads the flags that say who can read a snapshot.
func protect(recipients []string, passphrase string, plaintext bool) (backup.Protection, error) {
	p := backup.Protection{Plaintext: plaintext}
	var err error
	if p.Recipients, err = backup.Recipients(recipients...); err != nil {
		return p, usageError{err}
	}
	if passphrase != "" {
		if len(recipients) > 0 {
			return p, usageError{errors.New("--recipient and --passphrase-file: age takes a passphrase alone or no passphrase")}
		}
		to, _, err := backup.Passphrase(passphrase)
		if err != nil {
			return p, err
		}
		p.Recipients = append(p.Recipients, to)
	}
	if err := p.Check(); err != nil {
		return p, usageError{fmt.Errorf("%w (--recipient, --passphrase-file, --plaintext)", err)}
	}
	return p, nil
}

// savedSnapshot is what save reports.
type savedSnapshot struct {
	At   string `json:"at"`
	Size int64  `json:"size"` // bytes
	backup.Report
}

func (e *env) saveSnapshot(ctx context.Context, at string, p backup.Protection, output string) error {
	target, err := saveTarget(at)
	if err != nil {
		return err
	}
	cl, err := e.client()
	if err != nil {
		return err
	}
	defer cl.Close()
	defer e.progress("saving the cluster")()
	stream, err := cl.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer stream.Close()
	out := savedSnapshot{At: at}
	write := func(w io.Writer) (err error) {
		out.Report, err = backup.Reseal(ctx, w, stream, p)
		return err
	}
	if target != nil {
		out.Size, err = target.Put(ctx, stream.Name, write)
		out.At = backup.Locate(at, stream.Name)
	} else {
		out.Size, err = backup.WriteFile(ctx, at, write)
	}
	if err != nil {
		return err
	}
	if output == "json" {
		return e.writeJSON(out)
	}
	_, err = fmt.Fprintf(e.Out, "saved cluster %s at revision %d: %s, %d bytes\n", out.Manifest.ClusterID, out.Manifest.Revision, printable(out.At), out.Size)
	return err
}

// saveTarget returns the target at, or nil if a file is meant, which must not exist.
func saveTarget(at string) (backup.Target, error) {
	info, err := os.Stat(at)
	switch {
	case isTarget(at):
		return backup.OpenTarget(at)
	case err == nil:
		return nil, fmt.Errorf("%s exists (%s): a snapshot replaces no file", at, info.ModTime().Format(time.RFC3339))
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	return nil, nil
}

// isTarget reports whether at names many snapshots, or may: a URL, a folder.
func isTarget(at string) bool {
	if strings.Contains(at, "://") || strings.HasSuffix(at, "/") {
		return true
	}
	info, err := os.Stat(at)
	return err == nil && info.IsDir()
}

// openSnapshot opens the file or the snapshot that at names; the newest one of a
// target. It returns what it has opened.
func openSnapshot(ctx context.Context, at string) (io.ReadCloser, string, error) {
	if !isTarget(at) {
		f, err := os.Open(at)
		return f, at, err
	}
	where, name, one := backup.Split(at)
	if !one {
		where = at
	}
	target, err := backup.OpenTarget(where)
	if err != nil {
		return nil, "", err
	}
	if !one {
		if name, err = backup.Newest(ctx, target); err != nil {
			return nil, "", fmt.Errorf("%s: %w", at, err)
		}
		at = backup.Locate(where, name)
	}
	r, err := target.Get(ctx, name)
	return r, at, err
}

// keyFlags are how a snapshot is opened.
type keyFlags struct {
	identity, passphrase string
	plaintext            bool
}

func (k *keyFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&k.identity, "identity", "", "file with the private key, as age-keygen writes it")
	c.Flags().StringVar(&k.passphrase, "passphrase-file", "", "file whose first line is the passphrase")
	c.Flags().BoolVar(&k.plaintext, "plaintext", false, "the snapshot is not encrypted")
}

// keys reads the key; needed says that there has to be one, or --plaintext.
func (k *keyFlags) keys(needed bool) (backup.Keys, error) {
	var keys backup.Keys
	if k.identity != "" {
		list, err := backup.Identities(k.identity)
		if err != nil {
			return keys, err
		}
		keys.Identities = list
	}
	if k.passphrase != "" {
		_, by, err := backup.Passphrase(k.passphrase)
		if err != nil {
			return keys, err
		}
		keys.Identities = append(keys.Identities, by)
	}
	if got := len(keys.Identities) > 0; got && k.plaintext || needed && !got && !k.plaintext {
		return keys, usageError{errors.New("expected one of --identity, --passphrase-file and --plaintext")}
	}
	return keys, nil
}

func snapshotListCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use: "list TARGET", Short: "Show the snapshots in a target", Args: cobra.ExactArgs(1),
		Example: "  decree snapshot list 's3://backups/decree?region=eu-central-1'",
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			target, err := backup.OpenTarget(args[0])
			if err != nil {
				return err
			}
			list, err := target.List(c.Context(), "")
			if err != nil {
				return err
			}
			if output == "json" {
				return e.writeJSON(append([]backup.Entry{}, list...))
			}
			w := tabwriter.NewWriter(e.Out, 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "CLUSTER\tTIME\tREVISION\tBYTES\tNAME")
			for _, s := range list {
				fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\n", s.Name.ClusterID, s.Name.Time.Format(time.RFC3339), s.Name.Revision, s.Size, s.Name)
			}
			return w.Flush()
		},
	}
	jsonFlag(c, &output)
	return c
}

func snapshotInspectCmd(e *env) *cobra.Command {
	var output string
	var key keyFlags
	c := &cobra.Command{
		Use: "inspect FILE|TARGET", Short: "Say what a snapshot is of; without the key, how it is encrypted", Args: cobra.ExactArgs(1),
		Example: "  decree snapshot inspect cluster.decree --identity key.txt",
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			keys, err := key.keys(false)
			if err != nil {
				return err
			}
			r, at, err := openSnapshot(c.Context(), args[0])
			if err != nil {
				return err
			}
			defer r.Close()
			info, err := backup.Inspect(r, keys)
			if err != nil {
				return fmt.Errorf("%s: %w", at, err)
			}
			if output == "json" {
				return e.writeJSON(info)
			}
			return e.printSnapshot(at, info, nil)
		},
	}
	key.add(c)
	jsonFlag(c, &output)
	return c
}

func snapshotVerifyCmd(e *env, git snapshotGit) *cobra.Command {
	var output string
	var key keyFlags
	c := &cobra.Command{
		Use: "verify FILE|TARGET", Short: "Read all of a snapshot and check that it can be restored", Args: cobra.ExactArgs(1),
		Example: `  decree snapshot verify cluster.decree --identity key.txt
  decree snapshot verify /backups --identity key.txt    # the newest one`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			keys, err := key.keys(true)
			if err != nil {
				return err
			}
			r, at, err := openSnapshot(c.Context(), args[0])
			if err != nil {
				return err
			}
			defer r.Close()
			defer e.progress("verifying the snapshot")()
			report, err := backup.Verify(c.Context(), r, keys, git.check)
			if err != nil {
				return fmt.Errorf("%s: %w", at, err)
			}
			if output == "json" {
				return e.writeJSON(report)
			}
			return e.printSnapshot(at, report.Info, &report)
		},
	}
	key.add(c)
	jsonFlag(c, &output)
	return c
}

// printSnapshot shows a snapshot; report is nil where it was not verified.
func (e *env) printSnapshot(at string, info backup.Info, report *backup.Report) error {
	w := tabwriter.NewWriter(e.Out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s:\t%s\n", name, printable(fmt.Sprintf(format, args...)))
	}
	row("Snapshot", "%s", at)
	switch {
	case info.Passphrase:
		row("Encrypted", "with a passphrase")
	case info.Encrypted:
		row("Encrypted", "to %s", count(info.Recipients, "recipient"))
	default:
		row("Encrypted", "no")
	}
	if m := info.Manifest; m != nil {
		row("Cluster", "%s", m.ClusterID)
		row("Revision", "%d", m.Revision)
		row("Created", "%s", m.Created.Format(time.RFC3339))
		row("Version", "%s", dash(m.Version))
		row("Repositories", "%s", dash(strings.Join(m.Repositories(), ", ")))
	} else {
		row("Content", "needs the key: --identity or --passphrase-file")
	}
	if report != nil {
		row("Objects", "%d", report.Objects)
		for _, s := range report.Sums {
			row("Part", "%s, %d bytes, sha256 %s", s.Part, s.Size, s.SHA256)
		}
		row("Verified", "complete and unchanged")
	}
	return w.Flush()
}
