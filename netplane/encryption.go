package netplane

import (
	"errors"
	"fmt"
	"path/filepath"

	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/overlay"
)

// Encryption says which packets between the pods of different nodes are encrypted, by
// WireGuard.
type Encryption string

// The kinds of Encryption.
const (
	EncryptNothing  Encryption = "off"      // the same as empty
	EncryptPossible Encryption = "on"       // those to nodes that encrypt too; none if the kernel cannot
	EncryptAll      Encryption = "required" // all; nodes that do not encrypt are not reached
)

// Validate says what is wrong with e; empty is as good as EncryptNothing.
func (e Encryption) Validate() error {
	switch e {
	case "", EncryptNothing, EncryptPossible, EncryptAll:
		return nil
	}
	return fmt.Errorf("encryption %q: expected %s, %s or %s", string(e), EncryptNothing, EncryptPossible, EncryptAll)
}

// errOwnNetwork is why nothing is encrypted where a user's CNI configuration leads to
// other nodes.
var errOwnNetwork = errors.New("the pod network is one of the user's own CNI configuration, which has to encrypt by itself")

// wireguard gives the overlay a key if there is to be encryption, and says why there is
// none although there should be.
func (c *Config) wireguard() (w overlay.WireGuard, why, err error) {
	w = c.Overlay.WireGuard
	if err := c.Encryption.Validate(); err != nil || c.Encryption == "" || c.Encryption == EncryptNothing {
		return w, nil, err
	}
	w.Required = c.Encryption == EncryptAll
	own, err := c.networks().Own()
	switch {
	case err != nil:
		return w, nil, err
	case !own:
		err = errOwnNetwork
	default:
		err = netspace.Do(c.NetNS, overlay.Encrypts)
	}
	switch {
	case err != nil && w.Required:
		return w, nil, fmt.Errorf("encryption of pod traffic is required: %w", err)
	case err != nil:
		return w, err, nil
	}
	w.Key, err = overlay.LoadKey(filepath.Join(c.DataDir, "wireguard.key"))
	return w, nil, err
}

// PublicKey is what other nodes have to know so that packets between their pods and those
// of this node are encrypted: the value of api.AnnotationWireGuard of its Node. Empty:
// they are not.
func (p *Plane) PublicKey() string { return p.key }
