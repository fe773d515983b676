package containerd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxUserFile bounds what is read of an image's /etc/passwd and /etc/group.
const maxUserFile = 1 << 20

// loadUsers reads the user database of an image, once.
func (r *Runtime) loadUsers(ctx context.Context, img *imageInfo) error {
	img.usersMu.Lock()
	defer img.usersMu.Unlock()
	if img.usersLoaded {
		return nil
	}
	name, err := r.snapshotter(ctx)
	if err != nil {
		return err
	}
	sn := r.client.SnapshotService(name)
	key := "users-" + randomID()
	mounts, err := sn.View(ctx, key, img.ChainID, snapshots.WithLabels(map[string]string{gcRoot: "users"}))
	if err != nil {
		return fmt.Errorf("read users of image %s: %w", img.Name, err)
	}
	defer func() { _ = sn.Remove(context.WithoutCancel(ctx), key) }()
	err = mount.WithTempMount(ctx, mounts, func(dir string) error {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		img.passwd, img.group = readUserFile(root, "etc/passwd"), readUserFile(root, "etc/group")
		return nil
	})
	if err != nil {
		return fmt.Errorf("read users of image %s: %w", img.Name, err)
	}
	img.usersLoaded = true
	return nil
}

// readUserFile returns a file of an image, nothing when it is absent, no regular
// file, or leads out of the image.
func readUserFile(root *os.Root, name string) []byte {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil
	}
	data, err := io.ReadAll(io.LimitReader(f, maxUserFile))
	if err != nil {
		return nil
	}
	return data
}

// lookupUser resolves "name", "uid", "name:group" or "uid:gid" in the image, and
// adds the groups that the image's database gives that user.
func (img *imageInfo) lookupUser(want string) (specs.User, error) {
	if want == "" {
		want = "0"
	}
	found, err := user.GetExecUser(want, &user.ExecUser{}, bytes.NewReader(img.passwd), bytes.NewReader(img.group))
	if err != nil {
		return specs.User{}, err
	}
	u := specs.User{UID: uint32(found.Uid), GID: uint32(found.Gid), AdditionalGids: []uint32{uint32(found.Gid)}}
	for _, gid := range found.Sgids {
		u.AdditionalGids = append(u.AdditionalGids, uint32(gid))
	}
	return u, nil
}

// memoryCapacity is the memory of the node in bytes, 0 when unknown.
var memoryCapacity = sync.OnceValue(func() int64 {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(data) {
		fields := bytes.Fields(line)
		if len(fields) >= 2 && string(fields[0]) == "MemTotal:" {
			kb, _ := strconv.ParseInt(string(fields[1]), 10, 64)
			return kb << 10
		}
	}
	return 0
})
