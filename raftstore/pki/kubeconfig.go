package pki

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	clientcmd "k8s.io/client-go/tools/clientcmd/api/v1"
	"sigs.k8s.io/yaml"
)

// Kubeconfig is what a client needs to reach one cluster as one user.
type Kubeconfig struct {
	Server string // "https://127.0.0.1:7443"
	CA     []byte // PEM
	User   string // the name of the user entry, "admin"
	Pair   Pair
}

const clusterName = "decree"

// Write stores k at path, readable by its owner only, with all certificates
// embedded, so that the file can be copied to another machine.
func (k Kubeconfig) Write(path string) error {
	data, err := k.Marshal()
	if err != nil {
		return fmt.Errorf("write kubeconfig %s: %w", path, err)
	}
	return writeFile(path, data, 0o600)
}

// Fresh reports whether the certificate is one that needs no renewal yet.
func (k Kubeconfig) Fresh(now time.Time) bool {
	pair, err := k.Pair.TLS()
	return err == nil && now.Before(renewAt(pair.Leaf))
}

// Marshal returns k as YAML.
func (k Kubeconfig) Marshal() ([]byte, error) {
	c := clientcmd.Config{
		Kind:           "Config",
		APIVersion:     "v1",
		Clusters:       []clientcmd.NamedCluster{{Name: clusterName, Cluster: clientcmd.Cluster{Server: k.Server, CertificateAuthorityData: k.CA}}},
		AuthInfos:      []clientcmd.NamedAuthInfo{{Name: k.User, AuthInfo: clientcmd.AuthInfo{ClientCertificateData: k.Pair.CertPEM, ClientKeyData: k.Pair.KeyPEM}}},
		Contexts:       []clientcmd.NamedContext{{Name: clusterName, Context: clientcmd.Context{Cluster: clusterName, AuthInfo: k.User}}},
		CurrentContext: clusterName,
	}
	data, err := yaml.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode kubeconfig: %w", err)
	}
	return data, nil
}

// ReadKubeconfig loads the current context of a kubeconfig file. Certificates may be
// embedded or named by path; users without a client certificate are refused.
func ReadKubeconfig(path string) (Kubeconfig, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Kubeconfig{}, fmt.Errorf("read kubeconfig: %w", err)
	}
	var c clientcmd.Config
	if err := yaml.Unmarshal(data, &c); err != nil {
		return Kubeconfig{}, fmt.Errorf("parse kubeconfig %s: %w", path, err)
	}
	k, err := current(&c, filepath.Dir(path))
	if err != nil {
		return Kubeconfig{}, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	return k, nil
}

func current(c *clientcmd.Config, dir string) (Kubeconfig, error) {
	var k Kubeconfig
	var cluster, user string
	for _, x := range c.Contexts {
		if x.Name == c.CurrentContext {
			cluster, user = x.Context.Cluster, x.Context.AuthInfo
		}
	}
	var err error
	for _, x := range c.Clusters {
		if x.Name == cluster {
			k.Server = x.Cluster.Server
			if k.CA, err = embedded(x.Cluster.CertificateAuthorityData, x.Cluster.CertificateAuthority, dir); err != nil {
				return k, err
			}
		}
	}
	for _, x := range c.AuthInfos {
		if x.Name == user {
			k.User = user
			if k.Pair.CertPEM, err = embedded(x.AuthInfo.ClientCertificateData, x.AuthInfo.ClientCertificate, dir); err != nil {
				return k, err
			}
			if k.Pair.KeyPEM, err = embedded(x.AuthInfo.ClientKeyData, x.AuthInfo.ClientKey, dir); err != nil {
				return k, err
			}
		}
	}
	switch {
	case k.Server == "":
		return k, fmt.Errorf("context %q names no known cluster", c.CurrentContext)
	case len(k.Pair.CertPEM) == 0 || len(k.Pair.KeyPEM) == 0:
		return k, fmt.Errorf("context %q has no client certificate", c.CurrentContext)
	}
	return k, nil
}

func embedded(data []byte, path, dir string) ([]byte, error) {
	if len(data) > 0 || path == "" {
		return data, nil
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	return data, nil
}
