package backup_test

import (
	"context"
	"fmt"
	"io"
	"os"

	"decree.dev/decree/raftstore/backup"
	"decree.dev/decree/raftstore/state"
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
	cfg.Import = func(ctx context.Context, s *state.State, dir, name string, r io.Reader) error {
		if err := importFile(ctx, s, dir, name, r); err != nil || name != "empty" {
			return err
		}
		fmt.Println("in the middle")
		select {} // the parent kills this process
	}
	_, err := backup.Restore(context.Background(), os.Stdin, backup.Keys{}, cfg)
	fmt.Println("restore ended:", err)
	return true
}
