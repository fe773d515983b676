package cli

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
)

// TestCommandTree holds what every verb must have: a line that says what it does,
// an example that calls it, and a check of its arguments.
func TestCommandTree(t *testing.T) {
	var walk func(c *cobra.Command)
	seen := 0
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			walk(sub)
		}
		if c.Name() == "help" || c.Hidden && c.Example == "" {
			return
		}
		seen++
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: Short is %q: expected one line without a full stop", c.CommandPath(), c.Short)
		}
		if !strings.Contains(c.Example, c.CommandPath()) {
			t.Errorf("%s has no example that calls it", c.CommandPath())
		}
		if c.Args == nil {
			t.Errorf("%s takes any arguments", c.CommandPath())
		}
		for line := range strings.Lines(c.Example) {
			if !strings.HasPrefix(line, "  ") {
				t.Errorf("%s: example %q is not indented", c.CommandPath(), line)
			}
		}
		var out, errs bytes.Buffer
		args := append(strings.Fields(c.CommandPath())[1:], "--help")
		if code := Run(args, Streams{Out: &out, Err: &errs}); code != 0 || errs.Len() > 0 || (c.HasParent() && !strings.Contains(out.String(), "Examples:")) {
			t.Errorf("decree %s: exit status %d, standard error %q, output\n%s", strings.Join(args, " "), code, &errs, &out)
		}
	}
	walk(newRoot(Streams{}))
	if seen < 20 {
		t.Errorf("only %d commands were seen", seen)
	}
}

func TestSeparate(t *testing.T) {
	a, b, c := errors.New("a"), errors.New("b"), errors.New("c")
	for _, test := range []struct {
		err  error
		want string
	}{
		{a, "a"},
		{errors.Join(a, nil, b), "a|b"},
		{errors.Join(errors.Join(a, b), c), "a|b|c"},
		{fmt.Errorf("%w because %w", a, b), "a because b"},
		{fmt.Errorf("x: %w", errors.Join(a, b)), "x: a\nb"},
		{fmt.Errorf("%w: %w", a, errors.Join(b, c)), "a: b\nc"},
	} {
		var got []string
		for _, err := range separate(test.err) {
			got = append(got, err.Error())
		}
		if strings.Join(got, "|") != test.want {
			t.Errorf("separate(%q) = %q, want %q", test.err, got, test.want)
		}
	}
}

func TestExplain(t *testing.T) {
	addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 7443}
	err := explain(fmt.Errorf("GET https://x: %w", &net.OpError{Op: "dial", Net: "tcp", Addr: addr, Err: syscall.ECONNREFUSED}))
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "decree up starts it") || strings.Contains(err.Error(), "GET") {
		t.Errorf("explained as %q", err)
	}
	if other := errors.New("other"); explain(other) != other {
		t.Errorf("another error was changed: %v", explain(other))
	}
}
