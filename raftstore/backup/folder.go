package backup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Folder is a target in the file system; it and the folders of clusters in it are made
// when the first snapshot comes.
type Folder string

var _ Target = Folder("")

func (f Folder) path(name Name) string {
	return filepath.Join(string(f), filepath.FromSlash(name.String()))
}

// Put implements [Target].
func (f Folder) Put(ctx context.Context, name Name, write func(io.Writer) error) (int64, error) {
	if !validCluster(name.ClusterID) {
		return 0, fmt.Errorf("put snapshot: %q is no cluster's id", name.ClusterID)
	}
	path := f.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return 0, fmt.Errorf("put snapshot: %w", err)
	}
	size, err := WriteFile(ctx, path, write)
	if err != nil {
		return 0, fmt.Errorf("put snapshot: %w", err)
	}
	sweep(filepath.Dir(path))
	return size, syncDir(string(f)) // the cluster's folder may be new
}

// WriteFile makes the file path durably from what write writes: complete or not at all.
// It replaces one that exists. It returns the size in bytes.
func WriteFile(ctx context.Context, path string, write func(io.Writer) error) (_ int64, err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), partialPrefix+"*")
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tmp.Close(), os.Remove(tmp.Name()))
		}
	}()
	w := bufio.NewWriterSize(tmp, 256<<10)
	count := &countWriter{w: w}
	if err := write(count); err != nil {
		return 0, err
	}
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	if err := errors.Join(w.Flush(), tmp.Sync()); err != nil {
		return 0, err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return 0, err
	}
	return count.n, errors.Join(tmp.Close(), syncDir(filepath.Dir(path)))
}

const (
	partialPrefix = ".partial-"
	// partialAge is how long nobody has written to what nobody writes any more.
	partialAge = 24 * time.Hour
)

// sweep removes what processes that were killed left behind. What cannot be removed
// stays: the next snapshot tries again.
func sweep(dir string) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, file := range files {
		if !strings.HasPrefix(file.Name(), partialPrefix) {
			continue
		}
		if info, err := file.Info(); err == nil && time.Since(info.ModTime()) > partialAge {
			_ = os.Remove(filepath.Join(dir, file.Name()))
		}
	}
}

// List implements [Target].
func (f Folder) List(_ context.Context, clusterID string) ([]Entry, error) {
	clusters := []string{clusterID}
	if clusterID == "" {
		folders, err := os.ReadDir(string(f))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list snapshots: %w", err)
		}
		clusters = nil
		for _, d := range folders {
			clusters = append(clusters, d.Name())
		}
	}
	var list []Entry
	for _, cluster := range clusters {
		if !validCluster(cluster) {
			continue
		}
		found, err := f.list(cluster)
		if err != nil {
			return nil, fmt.Errorf("list snapshots: %w", err)
		}
		list = append(list, found...)
	}
	sortEntries(list)
	return list, nil
}

func (f Folder) list(cluster string) ([]Entry, error) {
	dir := filepath.Join(string(f), cluster)
	if info, err := os.Stat(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	} else if err != nil || !info.IsDir() {
		return nil, nil
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []Entry
	for _, file := range files {
		name, ok := ParseName(cluster + "/" + file.Name())
		if !ok || !file.Type().IsRegular() {
			continue
		}
		info, err := file.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		list = append(list, Entry{Name: name, Size: info.Size()})
	}
	return list, nil
}

// Get implements [Target].
func (f Folder) Get(_ context.Context, name Name) (io.ReadCloser, error) {
	file, err := os.Open(f.path(name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("get snapshot %s: %w", name, ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("get snapshot: %w", err)
	}
	return file, nil
}

// Delete implements [Target].
func (f Folder) Delete(_ context.Context, name Name) error {
	if err := os.Remove(f.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete snapshot: %w", err)
	}
	return nil
}

// String is for logs.
func (f Folder) String() string { return strings.TrimSuffix(string(f), "/") }
