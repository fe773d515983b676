// Package netspacetest gives tests network namespaces of their own.
package netspacetest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"decree.dev/decree/netplane/netspace"
)

// Namespace makes a network namespace with loopback up that lives as long as the
// test, and returns its path.
func Namespace(t testing.TB, name string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root, for network namespaces; run: sudo go test")
	}
	path := filepath.Join(t.TempDir(), name)
	if err := netspace.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netspace.Remove(path); err != nil {
			t.Error(err)
		}
	})
	In(t, path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return path
}

// In runs fn in a network namespace and fails the test on its error.
func In(t testing.TB, path string, fn func() error) {
	t.Helper()
	if err := netspace.Do(path, fn); err != nil {
		t.Fatal(err)
	}
}
