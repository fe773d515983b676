package seal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// smallDisk mounts a file system of some bytes.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		if errors.Is(err, unix.EPERM) {
			t.Skip("needs root to mount a file system")
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// TestNoSpace fills a real file system: the store says so, loses nothing, and resumes
// by itself when there is room.
func TestNoSpace(t *testing.T) {
	dir := smallDisk(t, 16<<20)
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	v, err := Open(Config{Dir: filepath.Join(dir, "data"), Disk: DiskConfig{MinFree: -1, Interval: time.Millisecond}})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	last := uint64(0)
	for ; err == nil; last += 20 {
		changed := v.Disk.Changed()
		if err = v.Log.StoreLogs(entries(last+1, last+20, 1)); err == nil {
			continue
		}
		wantIs(t, err, ErrNoSpace)
		wantIs(t, v.Disk.Healthy(), ErrNoSpace)
		<-changed
		break
	}
	if last < 100 {
		t.Fatalf("only %d entries found room", last)
	}
	wantIs(t, v.Log.StoreLogs(entries(last+1, last+20, 1)), ErrNoSpace)
	wantIs(t, v.Disk.Probe(), ErrNoSpace)
	if sink, err := v.Snapshots.Create(1, last, 1, configuration, 1, nil); err == nil {
		_, err = sink.Write(make([]byte, 4<<20))
		wantIs(t, errors.Join(err, sink.Cancel()), ErrNoSpace)
	} else {
		wantIs(t, err, ErrNoSpace)
	}
	wantEntries(t, v.Log, entries(1, last, 1))
	for term := range uint64(50) { // raft ends the process if it cannot note its term
		if err := v.Stable.SetUint64([]byte("CurrentTerm"), term); err != nil {
			t.Fatalf("no room for a term: %v", err)
		}
		wantIs(t, v.Log.StoreLogs(entries(last+1, last+20, 1)), ErrNoSpace)
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	running := make(chan error)
	go func() { running <- v.Disk.Run(ctx) }()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	for {
		changed := v.Disk.Changed()
		if v.Disk.Healthy() == nil {
			break
		}
		<-changed
	}
	cancel()
	<-running
	store(t, v.Log, entries(last+1, last+20, 1))
	v.Close()
	v = open(t, filepath.Join(dir, "data"))
	wantEntries(t, v.Log, entries(1, last+20, 1))
	verify(t, v)
	if left, _ := filepath.Glob(filepath.Join(dir, "data", "probe-*")); len(left) != 0 {
		t.Fatalf("%v are left", left)
	}
}

// TestLowSpace: the disk tells before writes fail, and not back and forth at the limit.
func TestLowSpace(t *testing.T) {
	dir := smallDisk(t, 16<<20)
	d := NewDisk(dir, DiskConfig{MinFree: 8 << 20})
	if err := d.Probe(); err != nil {
		t.Fatal(err)
	}
	use := func(size int) error {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return d.Probe()
	}
	changed := d.Changed()
	wantIs(t, use(9<<20), ErrNoSpace)
	<-changed
	wantIs(t, use(7<<20), ErrNoSpace) // 9 are free, 10 are asked
	if err := use(5 << 20); err != nil {
		t.Fatal(err)
	}
}

func TestClassify(t *testing.T) {
	write := func(op string, errno syscall.Errno) error { return &os.PathError{Op: op, Path: "x", Err: errno} }
	for _, c := range []struct {
		err, want error
	}{
		{write("write", syscall.ENOSPC), ErrNoSpace},
		{write("truncate", syscall.EDQUOT), ErrNoSpace},
		{fmt.Errorf("file resize error: %s", write("truncate", syscall.ENOSPC)), ErrNoSpace},
		{fmt.Errorf("file sync error: %s", write("sync", syscall.ENOSPC)), ErrDisk},
		{write("sync", syscall.ENOSPC), ErrDisk},
		{syscall.ENOSPC, ErrDisk}, // of fdatasync
		{syscall.EIO, ErrDisk},
		{write("write", syscall.EIO), ErrDisk},
		{errors.New("something"), ErrDisk},
	} {
		d := NewDisk(t.TempDir(), DiskConfig{})
		err := d.do("log", func() error { return c.err })
		wantIs(t, err, c.want)
		wantIs(t, d.Healthy(), c.want)
		called := false
		err = d.do("log", func() error { called = true; return nil })
		if fatal := c.want == ErrDisk; called == fatal || errors.Is(err, ErrDisk) != fatal {
			t.Fatalf("after %v the next write was tried: %v, and returned %v", c.err, called, err)
		}
	}
}

// TestSlow: the disk is slow while a write hangs, and as long as writes are slow on
// average.
func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var observed []time.Duration
		d := NewDisk(t.TempDir(), DiskConfig{SlowAfter: time.Second, Observe: func(_ string, took time.Duration) { observed = append(observed, took) }})
		wait := func(took time.Duration) {
			d.do("log", func() error { time.Sleep(took); return nil })
		}
		go wait(3 * time.Second)
		time.Sleep(500 * time.Millisecond)
		if d.Slow() {
			t.Error("slow too early")
		}
		time.Sleep(time.Second)
		if !d.Slow() {
			t.Error("a write that hangs is not slow")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if d.Slow() || len(observed) != 1 || observed[0] != 3*time.Second {
			t.Error("one slow write is no slow disk", observed)
		}
		for range 10 {
			wait(2 * time.Second)
		}
		if !d.Slow() {
			t.Error("ten slow writes are a slow disk")
		}
		for range 20 {
			wait(time.Millisecond)
		}
		if d.Slow() {
			t.Error("still slow")
		}
	})
}
