package daemon

import (
	"os"
	"strconv"
	"syscall"
	"testing"
)

// TestSetNice: every thread gets the value, and so does what they start.
func TestSetNice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root, to have its priority back; run: sudo go test")
	}
	defer func() {
		if err := setNice(0); err != nil {
			t.Error(err)
		}
	}()
	if err := setNice(serverNice); err != nil {
		t.Fatal(err)
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil || len(tasks) < 2 {
		t.Fatalf("%d threads, %v", len(tasks), err)
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		got, err := syscall.Getpriority(syscall.PRIO_PROCESS, tid)
		if err == nil && 20-got != serverNice { // the kernel counts from 20 down
			t.Errorf("thread %d has %d", tid, 20-got)
		}
	}
}
