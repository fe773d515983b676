package netplane_test

import (
	"testing"

	"decree.dev/decree/netplane/netplanetest/vm"
)

// TestKernelFleet is TestFleet and TestFleetFaults where IPVS balances, on three nodes. Nothing
// else runs beside it: in an emulated machine requests would wait too long.
func TestKernelFleet(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	f := newFleet(t, 3)
	testPairs(t, f)
	testServices(t, f)
	testNames(t, f)
	f.services, f.slices = nil, nil
	f.load(20)
	testSentAgain(t, f)
	testPlanned(t, f)
	testCut(t, f)
	testDeath(t, f)
}
