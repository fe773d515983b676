package faultfs

import (
	"context"
	"path"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// node is a file or folder.
type node struct {
	fs.LoopbackNode
	fs *FS
}

// WrapChild implements fs.NodeWrapChilder.
func (n *node) WrapChild(context.Context, fs.InodeEmbedder) fs.InodeEmbedder {
	return &node{LoopbackNode: fs.LoopbackNode{RootData: n.RootData}, fs: n.fs}
}

func (n *node) rel() string { return n.Path(n.Root()) }

func (n *node) ino() uint64 {
	var st syscall.Stat_t
	if syscall.Stat(filepath.Join(n.fs.live, n.rel()), &st) != nil {
		return 0
	}
	return st.Ino
}

// in returns the path of a name in the folder n, relative to the root.
func (n *node) in(name string) string {
	if rel := n.rel(); rel != "" {
		return rel + "/" + name
	}
	return name
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if errno := n.fs.fault("create", n.in(name)); errno != 0 {
		return nil, nil, 0, errno
	}
	child, inner, _, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	if errno != 0 {
		return child, nil, 0, errno
	}
	n.fs.mu.Lock()
	n.fs.add(filepath.Join(n.fs.live, n.in(name)))
	n.fs.mu.Unlock()
	n.fs.named(naming{to: n.in(name), file: int(out.Ino)})
	return child, &handle{file: inner.(*fs.LoopbackFile), fs: n.fs, ino: out.Ino, name: n.in(name)}, 0, 0
}

func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	ino := n.ino()
	inner, _, errno := n.LoopbackNode.Open(ctx, flags)
	if errno != 0 {
		return nil, 0, errno
	}
	if flags&syscall.O_TRUNC != 0 {
		n.fs.changed(ino, change{})
	}
	return &handle{file: inner.(*fs.LoopbackFile), fs: n.fs, ino: ino, name: n.rel()}, 0, 0
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	child, errno := n.LoopbackNode.Mkdir(ctx, name, mode, out)
	if errno == 0 {
		n.fs.named(naming{to: n.in(name), file: folder})
	}
	return child, errno
}

func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	if errno := n.fs.fault("unlink", n.in(name)); errno != 0 {
		return errno
	}
	errno := n.LoopbackNode.Unlink(ctx, name)
	if errno == 0 {
		n.fs.named(naming{from: n.in(name)})
	}
	return errno
}

func (n *node) Rmdir(ctx context.Context, name string) syscall.Errno {
	errno := n.LoopbackNode.Rmdir(ctx, name)
	if errno == 0 {
		n.fs.named(naming{from: n.in(name)})
	}
	return errno
}

func (n *node) Rename(ctx context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	to := parent.(*node).in(newName)
	if errno := n.fs.fault("rename", to); errno != 0 {
		return errno
	}
	errno := n.LoopbackNode.Rename(ctx, name, parent, newName, flags)
	var st syscall.Stat_t
	if errno == 0 && syscall.Stat(filepath.Join(n.fs.live, to), &st) == nil {
		n.fs.named(naming{from: n.in(name), to: to, file: int(st.Ino)})
	}
	return errno
}

func (n *node) Getattr(ctx context.Context, f fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	if h, ok := f.(*handle); ok {
		return h.file.Getattr(ctx, out)
	}
	return n.LoopbackNode.Getattr(ctx, nil, out)
}

func (n *node) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	size, ok := in.GetSize()
	if ok {
		if errno := n.fs.fault("truncate", n.rel()); errno != 0 {
			return errno
		}
		n.fs.changed(n.ino(), change{size: int64(size)})
	}
	return n.LoopbackNode.Setattr(ctx, nil, in, out)
}

// OpendirHandle implements fs.NodeOpendirHandler.
func (n *node) OpendirHandle(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	inner, _, errno := n.LoopbackNode.OpendirHandle(ctx, flags)
	if errno != 0 {
		return nil, 0, errno
	}
	return &dirHandle{openDir: inner.(openDir), node: n}, 0, 0
}

// Fsync implements fs.NodeFsyncer.
func (n *node) Fsync(_ context.Context, f fs.FileHandle, _ uint32) syscall.Errno {
	h, ok := f.(*handle)
	if !ok {
		return syscall.EINVAL
	}
	if errno := n.fs.fault("fsync", h.name); errno != 0 {
		return errno
	}
	n.fs.synced(h.ino, h.name)
	return 0
}

// dirHandle is an open folder, see openDir for what it leaves alone.
type dirHandle struct {
	openDir
	node *node
}

type openDir interface {
	fs.FileReaddirenter
	fs.FileReleasedirer
	fs.FileSeekdirer
}

// Fsyncdir implements fs.FileFsyncdirer.
func (d *dirHandle) Fsyncdir(context.Context, uint32) syscall.Errno {
	if errno := d.node.fs.fault("fsyncdir", d.node.rel()); errno != 0 {
		return errno
	}
	d.node.fs.syncedDir(path.Clean(d.node.rel()))
	return 0
}

// handle is an open file.
type handle struct {
	file *fs.LoopbackFile
	fs   *FS
	ino  uint64
	name string
}

var (
	_ fs.FileReader   = (*handle)(nil)
	_ fs.FileWriter   = (*handle)(nil)
	_ fs.FileReleaser = (*handle)(nil)
	_ fs.FileFlusher  = (*handle)(nil)
	_ fs.NodeFsyncer  = (*node)(nil)
	_ fs.NodeCreater  = (*node)(nil)

	_ fs.NodeWrapChilder  = (*node)(nil)
	_ fs.FileFsyncdirer   = (*dirHandle)(nil)
	_ fs.FileReaddirenter = (*dirHandle)(nil)
)

// Read implements fs.FileReader.
func (h *handle) Read(ctx context.Context, b []byte, at int64) (fuse.ReadResult, syscall.Errno) {
	return h.file.Read(ctx, b, at)
}

// Write implements fs.FileWriter.
func (h *handle) Write(ctx context.Context, data []byte, at int64) (uint32, syscall.Errno) {
	if errno := h.fs.fault("write", h.name); errno != 0 {
		return 0, errno
	}
	n, errno := h.file.Write(ctx, data, at)
	if n > 0 {
		h.fs.changed(h.ino, change{write: true, at: at, data: slices.Clone(data[:n])})
	}
	return n, errno
}

// Release implements fs.FileReleaser.
func (h *handle) Release(ctx context.Context) syscall.Errno { return h.file.Release(ctx) }

// Flush implements fs.FileFlusher.
func (h *handle) Flush(ctx context.Context) syscall.Errno { return h.file.Flush(ctx) }
