package daemon

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// serverNice is the nice value of a server that runs no containers: its heartbeats must
// leave in time however busy the machine is with other work. Workers that evaluate
// commits have one of their own.
const serverNice = -10

// setNice gives all threads of this process a nice value; threads and processes that
// they start inherit it. Less than there was needs CAP_SYS_NICE.
func setNice(nice int) error {
	// A thread may start another one meanwhile, with the old value.
	for range 2 {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("set priority: %w", err)
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				continue
			}
			if err := syscall.Setpriority(syscall.PRIO_PROCESS, tid, nice); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("set priority %d: %w", nice, err)
			}
		}
	}
	return nil
}
