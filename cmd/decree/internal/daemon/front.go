package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/front"
	"decree.dev/decree/schemas/api"
)

// frontRun is the folder below Run for the servers of the node.
func (c *Config) frontRun() string { return filepath.Join(c.Run, "front") }

// newFront holds on to the servers of this node.
func newFront(cfg *Config) (*front.Keeper, error) {
	to := front.Config{Stubs: cfg.DNSStubs, Level: level(cfg.Log)}
	var err error
	if cfg.ResolvConf != "" {
		if to.ResolvConf, err = filepath.Abs(cfg.ResolvConf); err != nil {
			return nil, fmt.Errorf("--resolv-conf: %w", err)
		}
	}
	if c := &cfg.Ingress; !c.Off {
		to.Ingress = &front.Ingress{
			HTTP: c.HTTP, HTTPS: c.HTTPS, ACMEDirectory: c.ACMEDirectory, ACMEEmail: c.ACMEEmail, ACMEDir: cfg.dir("acme"),
		}
		if c.AccessLog != "" {
			if to.Ingress.AccessLog, err = filepath.Abs(c.AccessLog); err != nil {
				return nil, fmt.Errorf("--ingress-access-log: %w", err)
			}
		}
		if c.ACMERoots != "" {
			pem, err := os.ReadFile(c.ACMERoots)
			if err != nil {
				return nil, fmt.Errorf("--acme-ca-file: %w", err)
			}
			to.Ingress.ACMERoots = string(pem)
		}
	}
	return front.NewKeeper(front.KeeperConfig{Dir: cfg.frontRun(), LogFile: cfg.dir("front", "front.log"), Config: to, Log: cfg.Log})
}

// level is the least level that a logger takes.
func level(log *slog.Logger) slog.Level {
	for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn} {
		if log.Enabled(context.Background(), l) {
			return l
		}
	}
	return slog.LevelError
}

// frontObjects are what a view asks this node to serve. Of secrets, they are those that
// Ingresses name.
func frontObjects(view api.Reader, d netplane.Desired) front.Objects {
	o := front.Objects{
		Desired:   d,
		Ingresses: slices.Collect(api.List[*networkingv1.Ingress](view, "")),
		Classes:   slices.Collect(api.List[*networkingv1.IngressClass](view, "")),
	}
	named := map[types.NamespacedName]bool{}
	for _, in := range o.Ingresses {
		for _, t := range in.Spec.TLS {
			named[types.NamespacedName{Namespace: in.Namespace, Name: t.SecretName}] = true
		}
	}
	if len(named) > 0 {
		for s := range api.List[*corev1.Secret](view, "") {
			if named[types.NamespacedName{Namespace: s.Namespace, Name: s.Name}] {
				o.Secrets = append(o.Secrets, s)
			}
		}
	}
	return o
}
