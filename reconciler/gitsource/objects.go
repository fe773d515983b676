package gitsource

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/storage/filesystem"
)

// objectCacheBytes is how much memory one repository spends on recently read
// objects. Small, because repositories are many and reads are mostly once.
const objectCacheBytes = 4 << 20

// objectReader reads objects by hash. Implementations are safe for concurrent
// use. A missing object is an error matching plumbing.ErrObjectNotFound.
type objectReader interface {
	read(h plumbing.Hash) (plumbing.ObjectType, []byte, error)
	size(h plumbing.Hash) (int64, error)
	has(h plumbing.Hash) (bool, error)
}

// objectDir reads the objects of one bare repository folder.
//
// go-git's storage keeps its index of packs without locks, so every access is
// serialized here.
type objectDir struct {
	dir    string
	moving sync.Mutex // held while objects are moved in from a quarantine

	mu    sync.Mutex
	store *filesystem.ObjectStorage // nil until the first read, and after refresh
}

func newObjectDir(dir string) *objectDir { return &objectDir{dir: dir} }

// storage returns the open storage. The caller holds mu.
func (o *objectDir) storage() *filesystem.ObjectStorage {
	if o.store == nil {
		lru := cache.NewObjectLRU(objectCacheBytes)
		// Keeping packs open saves an open and a close for every object of a clone.
		opts := filesystem.Options{KeepDescriptors: true}
		o.store = &filesystem.NewStorageWithOptions(osfs.New(o.dir, osfs.WithBoundOS()), lru, opts).ObjectStorage
	}
	return o.store
}

// refresh closes packs and forgets their indexes, so that the next read sees new
// ones.
func (o *objectDir) refresh() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.store != nil {
		_ = o.store.Close() // files open for reading
	}
	o.store = nil
}

func (o *objectDir) read(h plumbing.Hash) (plumbing.ObjectType, []byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	obj, err := o.storage().EncodedObject(plumbing.AnyObject, h)
	if err != nil {
		return 0, nil, fmt.Errorf("read object %s: %w", h, err)
	}
	return readObject(h, obj)
}

// readObject reads all of an object.
func readObject(h plumbing.Hash, obj plumbing.EncodedObject) (plumbing.ObjectType, []byte, error) {
	r, err := obj.Reader()
	if err != nil {
		return 0, nil, fmt.Errorf("read object %s: %w", h, err)
	}
	defer r.Close()
	data := make([]byte, obj.Size())
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, nil, fmt.Errorf("read object %s: %w", h, err)
	}
	return obj.Type(), data, nil
}

func (o *objectDir) size(h plumbing.Hash) (int64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n, err := o.storage().EncodedObjectSize(h)
	if err != nil {
		return 0, fmt.Errorf("size of object %s: %w", h, err)
	}
	return n, nil
}

func (o *objectDir) has(h plumbing.Hash) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	err := o.storage().HasEncodedObject(h)
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for object %s: %w", h, err)
	}
	return true, nil
}

// readKind reads an object that must be of one kind.
func readKind(r objectReader, want plumbing.ObjectType, h plumbing.Hash) ([]byte, error) {
	kind, data, err := r.read(h)
	if err != nil {
		return nil, err
	}
	if kind != want {
		return nil, garbagef("object %s is a %s where a %s is expected", h, kind, want)
	}
	return data, nil
}
