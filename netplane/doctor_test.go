package netplane_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"decree.dev/decree/netplane"
)

func TestDoctor(t *testing.T) {
	n := newNode(t)
	before := n.dump()
	for _, c := range netplane.Doctor(n.cfg) {
		if !c.OK || c.Mend != "" || c.Why == "" {
			t.Errorf("%+v", c)
		}
	}
	if after := n.dump(); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	n.cfg.CNIBinDirs = []string{"/nowhere"}
	missing := 0
	for _, c := range netplane.Doctor(n.cfg) {
		if strings.HasPrefix(c.Requirement, "CNI plugin") {
			missing++
			if c.OK || !strings.Contains(c.Mend, "apt-get install") {
				t.Errorf("%+v", c)
			}
		}
	}
	if missing != 3 {
		t.Errorf("%d plugins checked, want ptp, host-local and bandwidth", missing)
	}
	if err := os.MkdirAll(n.cfg.CNIConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.cfg.CNIConfDir, "10-x.conflist"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	checks := netplane.Doctor(n.cfg)
	if last := checks[len(checks)-1]; last.OK || !strings.Contains(last.Why, "10-x.conflist") {
		t.Errorf("a broken user configuration: %+v", last)
	}
}
