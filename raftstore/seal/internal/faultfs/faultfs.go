// Package faultfs is a file system for tests, in user space, that forgets like a disk
// does when the power fails: what was not synced is lost, in part, and not in order.
//
// It is as forgetful as POSIX allows: syncing a file makes its content durable, not its
// name; syncing a folder makes the names in it durable. Besides, calls can be delayed
// or fail, and syncs can be lies. It needs root and /dev/fuse.
package faultfs

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Sector is how much a disk writes at once, in bytes.
const Sector = 512

// FS shows the files of a folder, and knows what of them would survive. Names and
// contents live in it until Crash writes down what is left.
type FS struct {
	// Fault, when not nil, is asked before each "write", "fsync", "fsyncdir",
	// "truncate", "create", "rename" and "unlink" of a path (relative to the root), and
	// may wait, or return an error. Lie, when not nil, says whether a sync of a file
	// pretends only. Both are set before Mount.
	Fault func(op, path string) syscall.Errno
	Lie   func(path string) bool

	live   string
	server *fuse.Server

	mu       sync.Mutex
	ids      map[uint64]int // which file a live inode is; inodes are used again
	contents []*content
	durable  map[string]int // names; folder is one of a folder
	pending  []naming       // names that were changed since
}

const folder = -1

// content is a file: what is durable of it, and what was changed since.
type content struct {
	durable []byte
	pending []change
}

type change struct {
	at    int64
	data  []byte // of a write
	size  int64  // of a truncation
	write bool
}

// naming is a change of names: from is gone if set, to is there if set.
type naming struct {
	from, to string
	file     int
}

// Mount shows the folder live at the folder at. All that is in live is durable.
func (f *FS) Mount(live, at string) error {
	f.live, f.ids, f.durable = live, map[uint64]int{}, map[string]int{}
	err := filepath.WalkDir(live, func(name string, d os.DirEntry, err error) error {
		if err != nil || name == live {
			return err
		}
		rel, _ := filepath.Rel(live, name)
		if d.IsDir() {
			f.durable[rel] = folder
			return nil
		}
		data, err := os.ReadFile(name)
		f.durable[rel] = f.add(name)
		f.contents[f.durable[rel]].durable = data
		return err
	})
	if err != nil {
		return fmt.Errorf("mount %s: %w", at, err)
	}
	root := &fs.LoopbackRoot{Path: live}
	var st syscall.Stat_t
	if err := syscall.Stat(live, &st); err != nil {
		return fmt.Errorf("mount %s: %w", at, err)
	}
	root.Dev = st.Dev
	root.RootNode = &node{LoopbackNode: fs.LoopbackNode{RootData: root}, fs: f}
	f.server, err = fs.Mount(at, root.RootNode, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "faultfs", MaxWrite: 128 << 10}})
	if err != nil {
		return fmt.Errorf("mount %s: %w", at, err)
	}
	return nil
}

// Unmount takes the file system away. No process may use it any more.
func (f *FS) Unmount() error { return f.server.Unmount() }

// add makes a new file of the live one.
func (f *FS) add(name string) int {
	f.contents = append(f.contents, &content{})
	id := len(f.contents) - 1
	var st syscall.Stat_t
	if syscall.Stat(name, &st) == nil {
		f.ids[st.Ino] = id
	}
	return id
}

func (f *FS) fault(op, name string) syscall.Errno {
	if f.Fault == nil {
		return 0
	}
	return f.Fault(op, name)
}

// changed notes a change of a file that is not durable yet.
func (f *FS) changed(ino uint64, c change) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if id, ok := f.ids[ino]; ok {
		f.contents[id].pending = append(f.contents[id].pending, c)
	}
}

func (f *FS) named(n naming) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n.to != "" && n.file != folder {
		id, ok := f.ids[uint64(n.file)]
		if !ok {
			return
		}
		n.file = id
	}
	f.pending = append(f.pending, n)
}

func (f *FS) synced(ino uint64, name string) {
	if f.Lie != nil && f.Lie(name) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if id, ok := f.ids[ino]; ok {
		c := f.contents[id]
		for _, p := range c.pending {
			c.apply(p)
		}
		c.pending = nil
	}
}

// syncedDir makes the names in a folder durable, in order.
func (f *FS) syncedDir(dir string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending = slices.DeleteFunc(f.pending, func(n naming) bool {
		if n.to != "" && path.Dir(n.to) != dir || n.to == "" && path.Dir(n.from) != dir {
			return false
		}
		n.apply(f.durable)
		return true
	})
}

func (n naming) apply(names map[string]int) {
	if n.from != "" {
		delete(names, n.from)
	}
	if n.to != "" {
		names[n.to] = n.file
	}
}

func (c *content) apply(p change) {
	size := p.size
	if p.write {
		size = max(int64(len(c.durable)), p.at+int64(len(p.data)))
	}
	c.durable = slices.Grow(c.durable, max(0, int(size)-len(c.durable)))
	for int64(len(c.durable)) < size {
		c.durable = append(c.durable, 0)
	}
	c.durable = c.durable[:size]
	if p.write {
		copy(c.durable[p.at:], p.data)
	}
}

// Crash writes into the folder to, which must be empty, what the disk holds when the
// power fails now: of what was not synced some of the writes, one of them torn at a
// sector, and a beginning of the changes of names.
func (f *FS) Crash(r *rand.Rand, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	names := maps.Clone(f.durable)
	for _, n := range f.pending[:r.IntN(len(f.pending)+1)] {
		n.apply(names)
	}
	for _, name := range slices.Sorted(maps.Keys(names)) { // folders come before what is in them
		at := filepath.Join(to, name)
		if id := names[name]; id == folder {
			if err := os.Mkdir(at, 0o700); err != nil && !os.IsNotExist(err) {
				return fmt.Errorf("crash: %w", err)
			}
		} else if err := os.WriteFile(at, f.contents[id].crash(r), 0o600); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("crash: %w", err)
		}
	}
	return nil
}

func (c *content) crash(r *rand.Rand) []byte {
	left := &content{durable: slices.Clone(c.durable)}
	torn := -1
	if len(c.pending) > 0 {
		torn = r.IntN(len(c.pending))
	}
	keep := r.IntN(3) // none, half or all of them
	for i, p := range c.pending {
		if i == torn && p.write {
			if sectors := len(p.data) / Sector; sectors > 0 {
				cut := r.IntN(sectors+1) * Sector
				if r.IntN(2) == 0 {
					p.data = p.data[:cut]
				} else {
					p.at, p.data = p.at+int64(cut), p.data[cut:]
				}
				left.apply(p)
				continue
			}
		}
		if keep == 2 || keep == 1 && r.IntN(2) == 0 {
			left.apply(p)
		}
	}
	return left.durable
}
