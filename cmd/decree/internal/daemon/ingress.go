package daemon

import (
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/ingress"
	"decree.dev/decree/netplane/ingress/route"
	"decree.dev/decree/schemas/api"
)

// ingressServer is the proxy of a node, with what it holds open.
type ingressServer struct {
	*ingress.Server
	accessLog io.Closer // nil: there is none
}

// newIngress returns nil if the node shall not serve Ingresses.
func newIngress(cfg *Config, metrics prometheus.Registerer) (*ingressServer, error) {
	c := &cfg.Ingress
	if c.Off {
		return nil, nil
	}
	out := &ingressServer{}
	server := ingress.Config{HTTP: c.HTTP, HTTPS: c.HTTPS, Registerer: metrics, Log: cfg.Log.With("part", "ingress")}
	if c.ACMEDirectory != "" || c.ACMEEmail != "" {
		server.ACME = &ingress.ACME{Directory: c.ACMEDirectory, Email: c.ACMEEmail, Dir: cfg.dir("acme")}
		if c.ACMERoots != "" {
			pem, err := os.ReadFile(c.ACMERoots)
			if err != nil {
				return nil, fmt.Errorf("--acme-ca-file: %w", err)
			}
			server.ACME.Roots = x509.NewCertPool()
			if !server.ACME.Roots.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("--acme-ca-file %s: there is no certificate in it", c.ACMERoots)
			}
		}
	}
	if c.AccessLog != "" {
		f, err := os.OpenFile(c.AccessLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			return nil, fmt.Errorf("--ingress-access-log: %w", err)
		}
		server.AccessLog, out.accessLog = f, f
	}
	var err error
	if out.Server, err = ingress.New(server); err != nil {
		out.close()
		return nil, err
	}
	return out, nil
}

func (s *ingressServer) close() {
	if s.accessLog != nil {
		s.accessLog.Close()
	}
}

// ingressObjects is what a view asks a node's proxy to serve.
func ingressObjects(view api.Reader, d netplane.Desired) route.Objects {
	return route.Objects{
		Desired:   d,
		Ingresses: slices.Collect(api.List[*networkingv1.Ingress](view, "")),
		Classes:   slices.Collect(api.List[*networkingv1.IngressClass](view, "")),
		Secrets:   slices.Collect(api.List[*corev1.Secret](view, "")),
	}
}
