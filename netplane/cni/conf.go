package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"
)

// networkName is the name of the network that is generated.
const networkName = "decree"

// conflist is the generated network: each pod has a link of its own to the node,
// which routes between pods. So all that pods send passes the node's tables, also
// from pod to pod, with no bridge to filter on.
type conflist struct {
	CNIVersion string   `json:"cniVersion"`
	Name       string   `json:"name"`
	Plugins    []plugin `json:"plugins"`
}

type plugin struct {
	Type   string `json:"type"`
	IPMasq bool   `json:"ipMasq"`
	MTU    int    `json:"mtu,omitempty"`
	IPAM   ipam   `json:"ipam"`
}

type ipam struct {
	Type    string           `json:"type"`
	DataDir string           `json:"dataDir"`
	Ranges  [][]subnet       `json:"ranges"`
	Routes  []map[string]any `json:"routes"`
}

type subnet struct {
	Subnet netip.Prefix `json:"subnet"`
}

// generate returns the network configuration for a node's pod CIDRs.
func (c *Config) generate(cidrs []netip.Prefix, mtu int) ([]byte, error) {
	p := plugin{Type: "ptp", MTU: mtu, IPAM: ipam{Type: "host-local", DataDir: c.allocDir()}}
	for _, cidr := range cidrs {
		p.IPAM.Ranges = append(p.IPAM.Ranges, []subnet{{cidr.Masked()}})
		all := "0.0.0.0/0"
		if cidr.Addr().Is6() {
			all = "::/0"
		}
		p.IPAM.Routes = append(p.IPAM.Routes, map[string]any{"dst": all})
	}
	return json.MarshalIndent(conflist{CNIVersion: "1.0.0", Name: networkName, Plugins: []plugin{p}}, "", "  ")
}

// Own reports whether pods get the network that is generated: the user's folder has no
// configuration.
func (n *Networks) Own() (bool, error) {
	file, err := n.cfg.userConf()
	return err == nil && file == "", err
}

// Configure writes the configuration for this node's pods, unless the user's folder has
// one: where their addresses come from, and the MTU of their interfaces in bytes, the
// kernel's default when zero. It changes nothing when nothing differs, and pods that
// are attached stay as they are.
func (n *Networks) Configure(cidrs []netip.Prefix, mtu int) error {
	if len(cidrs) == 0 {
		return nil // not assigned yet; what is there stays in force
	}
	if own, err := n.Own(); err != nil || !own {
		return err
	}
	want, err := n.cfg.generate(cidrs, mtu)
	if err != nil {
		return fmt.Errorf("generate cni configuration: %w", err)
	}
	path := n.cfg.confPath()
	if have, err := os.ReadFile(path); err == nil && slices.Equal(have, want) {
		return nil
	}
	if err := writeFile(path, want); err != nil {
		return fmt.Errorf("write cni configuration: %w", err)
	}
	n.log.Info("pod network configured", "file", path, "cidrs", cidrs, "mtu", mtu)
	return nil
}

// PodCIDRs returns the pod CIDRs of the generated configuration; none when there
// is none.
func (n *Networks) PodCIDRs() ([]netip.Prefix, error) {
	b, err := os.ReadFile(n.cfg.confPath())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var list conflist
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil {
		return nil, fmt.Errorf("read cni configuration %s: %w", n.cfg.confPath(), err)
	}
	var out []netip.Prefix
	for _, p := range list.Plugins {
		for _, r := range p.IPAM.Ranges {
			for _, s := range r {
				out = append(out, s.Subnet)
			}
		}
	}
	return out, nil
}

// userConf returns the first configuration file in the user's folder, or "".
func (c *Config) userConf() (string, error) {
	if c.UserConfDir == "" {
		return "", nil
	}
	files, err := libcni.ConfFiles(c.UserConfDir, []string{".conflist", ".conf", ".json"})
	if err != nil {
		return "", fmt.Errorf("list cni configurations in %s: %w", c.UserConfDir, err)
	}
	if len(files) == 0 {
		return "", nil
	}
	slices.Sort(files)
	return files[0], nil
}

// network loads the configuration in force, for pods with limits or without.
func (n *Networks) network(limits bool) (*libcni.NetworkConfigList, error) {
	file, err := n.cfg.userConf()
	if err != nil {
		return nil, err
	}
	own := file == ""
	if own {
		file = n.cfg.confPath()
		if _, err := os.Stat(file); err != nil {
			return nil, fmt.Errorf("%w: this node has no pod CIDR yet, and %s has no configuration", ErrNotReady, n.cfg.UserConfDir)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read cni configuration: %w", err)
	}
	list, err := parseConf(b, filepath.Ext(file) == ".conflist")
	if err == nil && own && limits {
		list, err = limited(list)
	}
	if err != nil {
		return nil, fmt.Errorf("cni configuration %s: %w", file, err)
	}
	return list, nil
}

func parseConf(b []byte, isList bool) (*libcni.NetworkConfigList, error) {
	if isList {
		return libcni.NetworkConfFromBytes(b)
	}
	one, err := libcni.NetworkPluginConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	//lint:ignore SA1019 users still have single-plugin .conf files, which the CNI folder's rules let win
	return libcni.ConfListFromConf(one)
}

func writeFile(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// Plugins returns the plugins that the configuration in force needs, or would need
// once there is one, and the user's file when that is it.
func (n *Networks) Plugins() (names []string, file string, err error) {
	if file, err = n.cfg.userConf(); err != nil || file == "" {
		return []string{"ptp", "host-local", "bandwidth"}, "", err
	}
	list, err := n.network(false)
	if err != nil {
		return nil, file, err
	}
	for _, p := range list.Plugins {
		names = append(names, p.Network.Type)
		if t := p.Network.IPAM.Type; t != "" {
			names = append(names, t)
		}
	}
	return names, file, nil
}
