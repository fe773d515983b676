package simnet_test

import (
	"testing"
	"time"

	"decree.dev/decree/netplane/netplanetest"
)

// TestPolicies: the recipes, as the plan says.
func TestPolicies(t *testing.T) {
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			m := netplanetest.NewModel(1, time.Now)
			netplanetest.RunPolicies(t, m, m.Kernel.Policies(), n)
		})
	}
}
