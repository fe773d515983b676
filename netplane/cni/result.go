package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// ErrResult matches errors about what a plugin answered.
var ErrResult = errors.New("cni result is not usable")

// maxAddresses bounds the addresses of one pod.
const maxAddresses = 64

// ParseResult returns the addresses that the result of a CNI ADD gives to the pod,
// in order and without duplicates: at least one. b is whatever a plugin printed
// (CNI specification 0.1.0 to 1.0.0, "ADD Success").
func ParseResult(b []byte) ([]netip.Addr, error) {
	r, err := decodeResult(b)
	if err != nil {
		return nil, err
	}
	return addresses(r)
}

// decodeResult decodes what a plugin printed. A null in a list is refused here,
// because the library's conversions between versions do not expect one.
func decodeResult(b []byte) (types.Result, error) {
	if len(bytes.TrimSpace(b)) == 0 {
		return nil, fmt.Errorf("%w: the plugin printed nothing", ErrResult)
	}
	var whole any
	if err := json.Unmarshal(b, &whole); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrResult, err)
	}
	if hasNull(whole) {
		return nil, fmt.Errorf("%w: a list in it holds null", ErrResult)
	}
	r, err := create.CreateFromBytes(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrResult, err)
	}
	return r, nil
}

// hasNull reports whether any list in a JSON value holds a null.
func hasNull(v any) bool {
	switch v := v.(type) {
	case []any:
		return slices.ContainsFunc(v, func(x any) bool { return x == nil || hasNull(x) })
	case map[string]any:
		for _, x := range v {
			if hasNull(x) {
				return true
			}
		}
	}
	return false
}

func addresses(r types.Result) ([]netip.Addr, error) {
	res, err := types100.GetResult(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrResult, err)
	}
	if len(res.IPs) > maxAddresses {
		return nil, fmt.Errorf("%w: %d addresses, at most %d are allowed", ErrResult, len(res.IPs), maxAddresses)
	}
	var out []netip.Addr
	for i, ip := range res.IPs {
		if ip == nil {
			return nil, fmt.Errorf("%w: address %d is null", ErrResult, i)
		}
		if !inSandbox(res, ip.Interface) {
			continue
		}
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		a = a.Unmap()
		if !ok || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() {
			return nil, fmt.Errorf("%w: %q is no address for a pod", ErrResult, ip.Address.String())
		}
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: it gives the pod no address", ErrResult)
	}
	return out, nil
}

// inSandbox reports whether an address is on an interface of the pod: some plugins
// list the node's side too. Without an interface it is the pod's.
func inSandbox(res *types100.Result, index *int) bool {
	if index == nil {
		return true
	}
	if *index < 0 || *index >= len(res.Interfaces) || res.Interfaces[*index] == nil {
		return false
	}
	return res.Interfaces[*index].Sandbox != ""
}
