package backup_test

import (
	"context"
	"fmt"
	"io"
	"os"

	"decree.dev/decree/raftstore/backup"
)

// childMain restores the archive on standard input into the folder that the environment
// names, and stands still in the middle, to be killed. It reports whether this
// process is such a child.
func childMain() bool {
	dir := os.Getenv("BACKUP_TEST_RESTORE")
	if dir == "" {
		return false
	}
	cfg := restoring(dir)
	cfg.Import = func(_ context.Context, dir, name string, r io.Reader) error {
		if err := importFile(nil, dir, name, r); err != nil || name != "empty" {
			return err
		}
		fmt.Println("in the middle")
		select {} // the parent kills this process
	}
	_, err := backup.Restore(context.Background(), os.Stdin, backup.Keys{}, cfg)
	fmt.Println("restore ended:", err)
	return true
}
