package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
)

// TestMain is two programs: the tests, and what some of them run in a machine.
func TestMain(m *testing.M) {
	if Inside() && len(os.Args) > 1 {
		switch os.Args[1] {
		case "exit":
			fmt.Println("said", os.Args[2], os.Getenv("DECREE_WORD"), os.Getpid() != 1)
			os.Exit(7)
		case "hang":
			fmt.Println("hanging")
			time.Sleep(time.Hour)
		}
	}
	os.Exit(m.Run())
}

// boot runs this binary in a machine, and calls hanging when it says that it hangs.
func boot(t *testing.T, ctx context.Context, timeout time.Duration, hanging func(), args ...string) (string, int, error) {
	t.Helper()
	console := &trigger{word: "hanging", call: hanging}
	status, err := Run(ctx, Config{Binary: binary(t), Args: args, Env: []string{inside + "=1", "DECREE_WORD=it's"}, Timeout: timeout, Console: console})
	if errors.Is(err, ErrMissing) && os.Getenv(Demand) == "" {
		t.Skipf("%v", err)
	}
	return console.String(), status, err
}

// trigger calls once its buffer contains a word.
type trigger struct {
	bytes.Buffer
	word string
	call func()
}

func (b *trigger) Write(p []byte) (int, error) {
	n, err := b.Buffer.Write(p)
	if b.call != nil && strings.Contains(b.String(), b.word) {
		b.call()
	}
	return n, err
}

func TestStatus(t *testing.T) {
	console, status, err := boot(t, t.Context(), 0, nil, "exit", "two 'words'")
	if err != nil || status != 7 || !strings.Contains(console, "said two 'words' it's true\n") {
		t.Fatalf("status %d, %v; console:\n%s", status, err, console)
	}
}

// TestStopped: a machine that hangs ends with its context, and with its time.
func TestStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	console, _, err := boot(t, ctx, 0, cancel, "hang")
	if !errors.Is(err, context.Canceled) || !strings.Contains(console, "hanging") || !strings.Contains(err.Error(), "hanging") {
		t.Fatalf("%v; console:\n%s", err, console)
	}
	if _, _, err := boot(t, t.Context(), time.Second, nil, "hang"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

// TestInside: nothing is loaded at the start, and what many ask for at the same time is
// there for each of them.
func TestInside(t *testing.T) {
	if !Inside() {
		Test(t, 0, "^TestInside$")
		return
	}
	before, err := os.ReadFile("/proc/modules")
	if err != nil || len(before) > 0 {
		t.Fatalf("loaded at the start: %v\n%s", err, before)
	}
	var calls errgroup.Group
	for i := range 16 {
		calls.Go(func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = fmt.Sprint("vxlan", i)
			return netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: i + 1, Port: 4789})
		})
		calls.Go(func() error {
			c, err := nftables.New()
			if err == nil {
				_, err = c.ListTables()
			}
			return err
		})
	}
	if err := calls.Wait(); err != nil {
		t.Fatal(err)
	}
}

// TestFollow: what the console tells, whole or not.
func TestFollow(t *testing.T) {
	for _, c := range []struct {
		console string
		status  int
		known   bool
		last    string
	}{
		{"a\r\n" + marker + "0\r\n", 0, true, "a"},
		{"a\r\n\r\nb" + marker + "3\r\n[ 1.0] reboot: Power down\r\n", 3, true, "[ 1.0] reboot: Power down"},
		{"Kernel panic - not syncing", 0, false, "Kernel panic - not syncing"},
		{marker + "x\n", 0, false, ""},
	} {
		status, known, last, err := follow(strings.NewReader(c.console), &bytes.Buffer{})
		if status != c.status || known != c.known || last != c.last || err != nil {
			t.Errorf("%q: %d %v %q %v", c.console, status, known, last, err)
		}
	}
}

func TestQuote(t *testing.T) {
	if got := quote(`a'b $c`); got != `'a'\''b $c'` {
		t.Error(got)
	}
}
