package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/raftstore/client"
)

// kubeconfigPath says which credentials apply: --kubeconfig, $DECREE_KUBECONFIG, or
// those that `decree up` wrote into its data folder. $KUBECONFIG is not read: it
// names other clusters.
func (e *env) kubeconfigPath() string {
	if e.kubeconfig != "" {
		return e.kubeconfig
	}
	if path := os.Getenv("DECREE_KUBECONFIG"); path != "" {
		return path
	}
	return daemon.Kubeconfig(daemon.DataFolder(""))
}

// client connects to the cluster.
func (e *env) client() (*client.Client, error) {
	path := e.kubeconfigPath()
	cfg, err := client.FromKubeconfig(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no cluster here: %s does not exist (decree up starts one; --kubeconfig names another)", path)
	}
	if err != nil {
		return nil, err
	}
	cfg.Retries = 2 // a person waits
	cfg.Stale = e.stale
	return client.New(cfg)
}

// explain adds what to do to errors that do not say it themselves.
func explain(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return fmt.Errorf("the cluster at %s does not answer: %w (decree up starts it; --kubeconfig names another)", op.Addr, op.Err)
	}
	return err
}
