package ruleset_test

import (
	"encoding/binary"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/ruleset"
)

// TestGrowing: another process finds what is there, while the kernel makes the hash table of a
// set larger in the background. The rest of this package is tested by those who use it
// (netplane/enforce).
func TestGrowing(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
		t.Logf("%v: nothing keeps the kernel's workers from being quick", err)
	}
	defer unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr}, 0)
	ns := netspacetest.Namespace(t, "node")
	open := func() (k *ruleset.Kernel) {
		netspacetest.In(t, ns, func() (err error) {
			k, err = ruleset.Open(ruleset.IPv4, "growing")
			return err
		})
		return k
	}
	set := &ruleset.Set{Kind: ruleset.Addrs}
	for i := range 10000 {
		set.Elems = append(set.Elems, ruleset.Elem{Key: string(binary.BigEndian.AppendUint32(nil, 10<<24|uint32(i)))})
	}
	table := &ruleset.Table{Sets: map[string]*ruleset.Set{"addresses": set}}
	for i := range 40 {
		k, next := open(), open()
		if _, err := k.Apply(t.Context(), table); err != nil {
			t.Fatal(err)
		}
		if n, err := next.Apply(t.Context(), table); err != nil || n != 0 {
			t.Errorf("in round %d another process makes %d changes; %v", i, n, err)
		}
		if _, err := k.Apply(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		k.Close()
		next.Close()
	}
}
