package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"decree.dev/decree/schemas/api"
)

// cacheVersion is the format of cache files; others are ignored.
const cacheVersion = 1

// saveEvery is the least time between two writes of the cache: what is lost in a
// crash is asked from the server again.
const saveEvery = time.Second

// cacheHeader is the first line of a cache file; one object per line follows.
type cacheHeader struct {
	Version       int          `json:"version"`
	Resource      api.Resource `json:"resource"`
	FieldSelector string       `json:"fieldSelector,omitempty"`
	Revision      uint64       `json:"revision"`
	Objects       int          `json:"objects"`
}

func cachePath(dir string, r api.Resource) string {
	return filepath.Join(dir, string(r)+".json")
}

// readCache reads what saveResource wrote. A file is complete or it is an error.
func readCache(dir string, s Selection) (uint64, []api.Object, error) {
	path := cachePath(dir, s.Resource)
	f, err := os.Open(path)
	if err != nil {
		return 0, nil, fmt.Errorf("read cache: %w", err)
	}
	defer f.Close()
	lines := bufio.NewReaderSize(f, 64<<10)
	var h cacheHeader
	line, err := lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &h)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("read cache %s: %w", path, err)
	}
	if h.Version != cacheVersion || h.Resource != s.Resource || h.FieldSelector != s.FieldSelector {
		return 0, nil, fmt.Errorf("read cache %s: it is of version %d and holds %s %s", path, h.Version, h.Resource, h.FieldSelector)
	}
	k, _ := api.KindFor(s.Resource)
	var objects []api.Object
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			break
		}
		if err != nil {
			return 0, nil, fmt.Errorf("read cache %s: %w", path, err)
		}
		o, err := k.DecodeJSON(line)
		if err != nil {
			return 0, nil, fmt.Errorf("read cache %s: %w", path, err)
		}
		objects = append(objects, o)
	}
	if len(objects) != h.Objects {
		return 0, nil, fmt.Errorf("read cache %s: it has %d of %d objects", path, len(objects), h.Objects)
	}
	return h.Revision, objects, nil
}

// keepCache writes what changed, at most once per saveEvery.
func (m *Mirror) keepCache(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.save:
		}
		m.saveDirty()
		if !sleep(ctx, saveEvery) {
			return
		}
	}
}

// saveDirty writes the resources that changed since the last call. What cannot be
// written stays dirty.
func (m *Mirror) saveDirty() {
	if m.cfg.Cache == "" {
		return
	}
	m.mu.Lock()
	view := m.view.Load()
	headers := make([]cacheHeader, 0, len(m.dirty))
	for _, s := range m.cfg.Select {
		if m.dirty[s.Resource] && m.loaded[s.Resource] {
			headers = append(headers, cacheHeader{Version: cacheVersion, Resource: s.Resource, FieldSelector: s.FieldSelector, Revision: m.revisions[s.Resource]})
			delete(m.dirty, s.Resource)
		}
	}
	m.mu.Unlock()
	for _, h := range headers {
		if err := saveResource(m.cfg.Cache, h, view); err != nil {
			m.log.Error("the copy is not on disk: a restart without a server would miss changes", "resource", h.Resource, "error", err)
			m.mu.Lock()
			m.dirty[h.Resource] = true
			m.mu.Unlock()
		}
	}
}

// saveResource replaces a cache file at once and durably.
func saveResource(dir string, h cacheHeader, view *mirrorView) error {
	path := cachePath(dir, h.Resource)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write cache: %w", err)
	}
	f, err := os.CreateTemp(dir, "."+string(h.Resource)+"-*") // 0600
	if err != nil {
		return fmt.Errorf("write cache: %w", err)
	}
	err = errors.Join(writeObjects(f, h, view), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write cache %s: %w", path, err), os.Remove(f.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("write cache %s: %w", path, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("write cache %s: %w", path, err)
	}
	return nil
}

func writeObjects(f *os.File, h cacheHeader, view *mirrorView) error {
	for range view.List(h.Resource, "") {
		h.Objects++
	}
	out := bufio.NewWriterSize(f, 64<<10)
	lines := json.NewEncoder(out)
	if err := lines.Encode(h); err != nil {
		return fmt.Errorf("encode header: %w", err)
	}
	for o := range view.List(h.Resource, "") {
		if err := lines.Encode(o); err != nil {
			return fmt.Errorf("encode %s: %w", api.KeyOf(o), err)
		}
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return f.Sync()
}
