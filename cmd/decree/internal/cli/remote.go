package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/reconciler/gitsource"
)

// RunGitRemote is Git's remote helper for decree:// URLs: it hands over to Git's own
// https helper with the cluster's certificates.
func RunGitRemote(args []string, s Streams) int {
	e := &env{Streams: s}
	err := e.gitRemote(args)
	var git *exec.ExitError
	if errors.As(err, &git) && git.ExitCode() > 0 {
		return git.ExitCode() // git has said why
	}
	if err != nil {
		fmt.Fprintf(s.Err, "decree: %v\n", err)
		return 1
	}
	return 0
}

// gitRemote writes the credentials of the kubeconfig into files of a private
// folder, because git takes them from files only, and removes them afterwards.
func (e *env) gitRemote(args []string) error {
	k, err := pki.ReadKubeconfig(e.kubeconfigPath())
	if err != nil {
		return fmt.Errorf("git remote helper: %w (decree up writes it; DECREE_KUBECONFIG names another)", err)
	}
	dir, err := os.MkdirTemp("", "decree-git-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	creds := gitsource.Credentials{CAFile: filepath.Join(dir, "ca.crt"), CertFile: filepath.Join(dir, "client.crt"), KeyFile: filepath.Join(dir, "client.key")}
	for path, data := range map[string][]byte{creds.CAFile: k.CA, creds.CertFile: k.Pair.CertPEM, creds.KeyFile: k.Pair.KeyPEM} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
	}
	return gitsource.RemoteHelper(context.Background(), args, os.Environ(), gitsource.Streams{In: e.In, Out: e.Out, Err: e.Err}, creds)
}
