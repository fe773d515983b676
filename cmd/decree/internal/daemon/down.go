package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/front"
	"decree.dev/decree/reconciler/containerd"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Down stops a cluster on this machine: decree itself, the containers, services and
// pod networks. With purge it also removes the data folder: everything the cluster
// ever made.
func Down(ctx context.Context, cfg Config, purge bool) error {
	if err := cfg.complete(); err != nil {
		return err
	}
	if _, err := os.Stat(cfg.Data); errors.Is(err, os.ErrNotExist) {
		return nil // nothing was ever made
	}
	// Purge removes whole folders: only those that a decree has locked before.
	if _, err := os.Stat(cfg.dir(lockFile)); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is not a data folder of decree: it has no %s; nothing was touched", cfg.Data, lockFile)
	}
	release, err := stopRunning(ctx, cfg.Data)
	if err != nil {
		return err
	}
	defer release()
	var errs []error
	errs = append(errs, stopPods(ctx, &cfg, purge), front.Stop(ctx, cfg.frontRun()), purgeNetwork(ctx, &cfg))
	if cfg.Containerd == "" {
		errs = append(errs, containerd.StopContainerd(ctx, cfg.supervision()))
	}
	if err := errors.Join(errs...); err != nil || !purge {
		return err
	}
	if cfg.Containerd == "" {
		if err := containerd.WipeContainerd(ctx, cfg.supervision()); err != nil {
			return err
		}
	}
	for _, dir := range []string{cfg.containerdRun(), cfg.sandboxRun(), cfg.frontRun(), cfg.Data} {
		if err := removeAll(dir); err != nil {
			return err
		}
	}
	_ = os.Remove(cfg.Run) // only when nothing of others lives there
	return nil
}

// stopRunning ends the decree that holds the data folder and takes its place.
func stopRunning(ctx context.Context, data string) (release func(), err error) {
	for signalled := false; ; {
		release, err := lock(data)
		if !errors.Is(err, ErrRunning) {
			return release, err
		}
		if pid := lockedBy(data); pid > 0 && !signalled {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
				return nil, fmt.Errorf("stop decree (pid %d): %w", pid, err)
			}
			signalled = true
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("stop decree: %w", context.Cause(ctx))
		case <-time.After(20 * time.Millisecond): // flock has no way to wait with a context
		}
	}
}

// stopPods stops and removes all pods of this node; with purge also their images.
func stopPods(ctx context.Context, cfg *Config, purge bool) error {
	if _, err := os.Stat(cfg.dir("runtime")); errors.Is(err, os.ErrNotExist) {
		return nil // no agent ever ran
	}
	keeper, err := nodeKeeper(cfg)
	if err != nil {
		return err
	}
	supervising, cancel := context.WithCancel(ctx)
	defer cancel()
	n, err := newNode(supervising, cfg, controlPlaneAt{url: "https://" + cfg.Address, keeper: keeper}, nil)
	if err != nil {
		return err
	}
	defer n.close()
	if err := n.agent.StopAll(ctx); err != nil {
		return err
	}
	if purge {
		return n.runtime.Purge(ctx)
	}
	return nil
}

func purgeNetwork(ctx context.Context, cfg *Config) error {
	if _, err := os.Stat(cfg.dir("network")); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	plane, err := netplane.New(cfg.network(nil))
	if err != nil {
		return err
	}
	return errors.Join(plane.Purge(ctx), plane.Close())
}

// removeAll removes a folder; whatever is still mounted below it is unmounted first.
func removeAll(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for i := len(mounts) - 1; i >= 0; i-- { // inner ones first
		if err := unix.Unmount(mounts[i], unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", mounts[i], err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", filepath.Clean(dir), err)
	}
	return nil
}

// mountsBelow lists the mount points at or below dir, outer ones first.
func mountsBelow(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	points := make([]string, len(infos))
	for i, info := range infos {
		points[i] = info.Mountpoint
	}
	slices.Sort(points)
	return points, nil
}
