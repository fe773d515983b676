package containerd

import (
	"fmt"
	"testing"

	"decree.dev/decree/reconciler/agent/runtimetest"
)

func TestConformance(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Setup {
		return runtimetest.Setup{
			Runtime: newRuntime(t), Image: testImage,
			Exit:    func(code int) []string { return []string{"sh", "-c", fmt.Sprintf("exit %d", code)} },
			Print:   func(line string) []string { return []string{"echo", line} },
			Forever: []string{"sleep", "100000"},
			TermOK:  []string{"sh", "-c", `trap "exit 0" TERM; echo ready; while true; do sleep 0.05; done`},
		}
	})
}
