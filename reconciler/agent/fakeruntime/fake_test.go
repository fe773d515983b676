package fakeruntime_test

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"decree.dev/decree/reconciler/agent"
	"decree.dev/decree/reconciler/agent/fakeruntime"
	"decree.dev/decree/reconciler/agent/runtimetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// program understands the command lines of the suite.
func program(c agent.ContainerConfig) fakeruntime.Program {
	p := fakeruntime.Program{Exec: execute}
	switch c.Args[0] {
	case "exit":
		p.Runs = time.Microsecond
		n, _ := strconv.Atoi(c.Args[1])
		p.Exit = int32(n)
	case "print":
		p.Runs, p.Output = time.Microsecond, c.Args[1]+"\n"
	case "forever":
		p.OnTerm = -1
	case "term":
		p.Output = "ready\n"
	}
	return p
}

func execute(ctx context.Context, cmd []string, out io.Writer) (int, error) {
	switch cmd[0] {
	case "exit":
		return strconv.Atoi(cmd[1])
	case "print":
		_, err := fmt.Fprintln(out, cmd[1])
		return 0, err
	}
	<-ctx.Done()
	return 0, ctx.Err()
}

func TestConformance(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Setup {
		r := fakeruntime.New()
		r.Program = program
		r.Images["app:1"] = "app@sha256:1"
		return runtimetest.Setup{
			Runtime: r, Image: "app:1",
			Exit:    func(code int) []string { return []string{"exit", strconv.Itoa(code)} },
			Print:   func(line string) []string { return []string{"print", line} },
			Forever: []string{"forever"},
			TermOK:  []string{"term"},
		}
	})
}
