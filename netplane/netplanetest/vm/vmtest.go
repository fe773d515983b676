package vm

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Demand names the variable of the environment that turns a missing machine from a
// reason to skip into a failure. CI sets it.
const Demand = "DECREE_TEST_VM"

// Memory names the variable that says how many MiB a machine has; without it, as many as
// Config has by default.
const Memory = "DECREE_VM_MEMORY"

// inside names the variable that test binaries see inside a machine.
const inside = "DECREE_INSIDE_VM"

// Inside reports whether this process runs in a machine that Test booted.
func Inside() bool { return os.Getenv(inside) != "" }

// Modules are those that the network of a node needs on a stock kernel.
var Modules = []string{
	"ip_vs", "ip_vs_rr", "ip_vs_wrr", "ip_vs_lc", "ip_vs_wlc", "ip_vs_sh", "ip_vs_mh",
	"nf_conntrack_netlink", "nf_tables", "nft_chain_nat", "nft_ct", "nft_masq", "nft_nat", "nft_numgen", "nft_redir",
	"nft_reject", "nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6", "nft_hash", "nft_limit", "nft_log", "nft_fib", "nft_fib_inet",
	"veth", "dummy", "bridge", "vxlan", "wireguard", "sctp", "crc32c_intel", "sch_netem",
}

// Test runs tests of the calling test's own package inside a machine, those that
// match the pattern run (as of go test -run), and fails t when they fail. Further
// arguments go to the test binary. The console is in t's log.
//
// Where there is no qemu or no kernel, t is skipped, or fails if Demand is set.
func Test(t *testing.T, timeout time.Duration, run string, args ...string) {
	t.Helper()
	TestWith(t, timeout, run, nil, args...)
}

// TestWith is Test for tests that run other programs: files are executables of this
// machine.
func TestWith(t *testing.T, timeout time.Duration, run string, files []string, args ...string) {
	t.Helper()
	var seen watch
	memory, err := strconv.Atoi(cmp.Or(os.Getenv(Memory), "0"))
	if err != nil {
		t.Fatalf("%s: %v", Memory, err)
	}
	// Most tests wait for something, and few of them for a processor.
	status, err := Run(t.Context(), Config{
		Binary: binary(t), Args: append([]string{"-test.run", run, "-test.v", "-test.parallel=8"}, args...), Env: environment(), Files: files,
		Modules: Modules, Memory: memory, Timeout: timeout, Console: io.MultiWriter(t.Output(), &seen),
	})
	if errors.Is(err, ErrMissing) && os.Getenv(Demand) == "" {
		t.Skipf("%v (set %s=1 to make this a failure)", err, Demand)
	}
	if err != nil {
		t.Fatal(err)
	}
	if status != 0 {
		t.Fatalf("exit status %d in the machine", status)
	}
	if !seen.passed {
		t.Fatalf("no test matches %s in the machine", run)
	}
}

// environment passes on what configures the tests themselves.
func environment() []string {
	mine := func(e string) bool { return !strings.HasPrefix(e, "DECREE_") && !strings.HasPrefix(e, "RAPID_") }
	return append(slices.DeleteFunc(os.Environ(), mine), inside+"=1")
}

// binary is this test binary if it needs no libraries, or else one that does not.
func binary(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if static, err := isStatic(self); err != nil {
		t.Fatal(err)
	} else if static {
		return self
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	path := filepath.Join(t.TempDir(), "main.test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build a static test binary: %v\n%s", err, out)
	}
	return path
}

// isStatic reports whether an executable asks for no dynamic linker.
func isStatic(path string) (bool, error) {
	f, err := elf.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }), nil
}

// watch finds out whether any test passed.
type watch struct {
	pending string
	passed  bool
}

func (w *watch) Write(b []byte) (int, error) {
	w.pending += string(b)
	for {
		line, rest, ok := strings.Cut(w.pending, "\n")
		if !ok {
			return len(b), nil
		}
		w.passed = w.passed || strings.HasPrefix(line, "--- PASS")
		w.pending = rest
	}
}
