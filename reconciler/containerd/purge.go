package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"k8s.io/apimachinery/pkg/types"
)

// runcRoot is where the shim has runc keep the state of containers.
const runcRoot = "/run/containerd/runc"

// Purge removes everything this Runtime made: containers, snapshots, images and
// content of its containerd namespace and the namespace itself, sandboxes, cgroups,
// mounts, logs and its folders. It goes on after an error and may be repeated. The
// Runtime is of no use afterwards and should be closed.
func (r *Runtime) Purge(ctx context.Context) error {
	ctx = r.ns(ctx)
	var errs []error
	add := func(what string, err error) {
		if err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("purge %s: %w", what, err))
		}
	}
	add("containers", r.purgeContainers(ctx))
	add("shims", r.purgeShims(ctx))
	add("mounts", r.awaitUnmounts(ctx))
	add("sandboxes", r.purgeSandboxes())
	add("images", r.purgeImages(ctx))
	add("snapshots", r.purgeSnapshots(ctx))
	add("leases", r.purgeLeases(ctx))
	add("content", r.purgeContent(ctx))
	if len(errs) == 0 {
		add("containerd namespace", r.client.NamespaceService().Delete(ctx, r.cfg.Namespace))
	}
	add("cgroups", removeCgroup(r.cfg.CgroupParent))
	for _, dir := range []string{r.cfg.RunDir, r.cfg.Dir} {
		add("folders", unmountBelow(dir))
	}
	for _, dir := range []string{r.cfg.nsDir(), r.cfg.fifoDir(), r.cfg.sandboxDir(), r.cfg.logDir()} {
		add("folders", os.RemoveAll(dir))
	}
	// Only when empty: runc's folder of this namespace, and those that may be shared.
	for _, dir := range []string{filepath.Join(runcRoot, r.cfg.Namespace), r.cfg.RunDir, filepath.Dir(r.cfg.RunDir), r.cfg.Dir} {
		_ = os.Remove(dir)
	}
	return errors.Join(errs...)
}

func (r *Runtime) purgeContainers(ctx context.Context) error {
	all, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range all {
		m := metaOf(c.Labels)
		unlock := r.locks.lock(string(m.pod))
		errs = append(errs, r.removeContainer(ctx, c, m))
		unlock()
	}
	return errors.Join(errs...)
}

// awaitUnmounts waits until containerd has unmounted the containers of a shim that
// died: it does so in the background. Other containerds of this machine, which may
// have a namespace of the same name, keep their folders beside their sockets.
func (r *Runtime) awaitUnmounts(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
			ours := strings.HasPrefix(m.Mountpoint, filepath.Dir(r.cfg.Address)+"/") && strings.HasSuffix(m.Mountpoint, "/rootfs") &&
				strings.Contains(m.Mountpoint, "/io.containerd.runtime.v2.task/"+r.cfg.Namespace+"/")
			return !ours, false
		})
		if err != nil || len(mounts) == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s stays mounted: %w", mounts[0].Mountpoint, ctx.Err())
		case <-tick.C:
		}
	}
}

// purgeSandboxes removes sandboxes with a record, and namespaces without one.
func (r *Runtime) purgeSandboxes() error {
	recs, err := r.readRecords()
	if err != nil {
		return err
	}
	var errs []error
	for _, rec := range recs {
		errs = append(errs, r.dropSandbox(rec.UID))
	}
	entries, err := os.ReadDir(r.cfg.nsDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		errs = append(errs, removeNamespaces(filepath.Join(r.cfg.nsDir(), e.Name())))
	}
	return errors.Join(errs...)
}

func (r *Runtime) purgeImages(ctx context.Context) error {
	store := r.client.ImageService()
	all, err := store.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for i, img := range all {
		var opts []images.DeleteOpt
		if i == len(all)-1 {
			opts = append(opts, images.SynchronousDelete()) // collects the garbage of all
		}
		if err := store.Delete(ctx, img.Name, opts...); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// purgeSnapshots removes snapshots, children before parents.
func (r *Runtime) purgeSnapshots(ctx context.Context) error {
	name, err := r.snapshotter(ctx)
	if err != nil {
		return err
	}
	sn := r.client.SnapshotService(name)
	for {
		var keys []string
		err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			keys = append(keys, info.Name)
			return nil
		})
		if err != nil || len(keys) == 0 {
			return err
		}
		removed := 0
		var last error
		for _, key := range keys {
			if last = sn.Remove(ctx, key); last == nil || errdefs.IsNotFound(last) {
				removed++
			}
		}
		if removed == 0 {
			return last
		}
	}
}

func (r *Runtime) purgeLeases(ctx context.Context) error {
	store := r.client.LeasesService()
	all, err := store.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range all {
		errs = append(errs, store.Delete(ctx, l, leases.SynchronousDelete))
	}
	return errors.Join(errs...)
}

func (r *Runtime) purgeContent(ctx context.Context) error {
	store := r.client.ContentStore()
	var found []digest.Digest
	err := store.Walk(ctx, func(info content.Info) error {
		found = append(found, info.Digest)
		return nil
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range found {
		if err := store.Delete(ctx, d); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// dropRecordless removes namespaces that no sandbox record knows: left by a crash in
// the middle of a removal.
func (r *Runtime) dropRecordless() error {
	entries, err := os.ReadDir(r.cfg.nsDir())
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		uid := types.UID(e.Name())
		if _, err := os.Stat(r.recordPath(uid)); errors.Is(err, os.ErrNotExist) {
			errs = append(errs, removeNamespaces(filepath.Join(r.cfg.nsDir(), e.Name())), removeCgroup(r.podCgroup(uid)))
		}
	}
	return errors.Join(errs...)
}
