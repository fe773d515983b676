package containerd

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

// pumps runs one pump for every attempt whose output is not all in its log yet. Which
// these are is written on disk: every N.raw folder is one.
type pumps struct {
	cfg     Config
	log     *slog.Logger
	watcher *fsnotify.Watcher
	group   sync.WaitGroup

	mu     sync.Mutex
	active map[string]*pump // by raw folder
	closed bool
}

func newPumps(cfg Config) (*pumps, error) {
	w, err := fsnotify.NewBufferedWatcher(64)
	if err != nil {
		return nil, fmt.Errorf("watch logs (raise sysctl fs.inotify.max_user_instances if it is exhausted): %w", err)
	}
	ps := &pumps{cfg: cfg, log: cfg.Logger, watcher: w, active: map[string]*pump{}}
	ps.group.Go(ps.dispatch)
	raws, err := filepath.Glob(filepath.Join(cfg.logDir(), "*", "*", "*.raw"))
	if err != nil {
		return nil, errors.Join(err, ps.close())
	}
	for _, raw := range raws {
		paths := logPaths{dir: filepath.Dir(raw), base: strings.TrimSuffix(filepath.Base(raw), ".raw")}
		if _, err := ps.open(paths); err != nil {
			ps.log.Error("adopt log", "error", err)
		}
	}
	return ps, nil
}

// dispatch wakes the pump whose file was written.
func (ps *pumps) dispatch() {
	for {
		select {
		case ev, ok := <-ps.watcher.Events:
			if !ok {
				return
			}
			if ev.Has(fsnotify.Write) {
				ps.wake(filepath.Dir(ev.Name))
			}
		case err, ok := <-ps.watcher.Errors:
			if !ok {
				return
			}
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				ps.log.Error("watch logs", "error", err)
			}
			ps.wakeAll()
		}
	}
}

func (ps *pumps) wake(raw string) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p := ps.active[raw]; p != nil {
		p.poke()
	}
}

func (ps *pumps) wakeAll() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.active {
		p.poke()
	}
}

// open returns the pump of an attempt, started if there is none.
func (ps *pumps) open(paths logPaths) (*pump, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.closed {
		return nil, errors.New("the runtime is closed")
	}
	raw := paths.raw()
	if p := ps.active[raw]; p != nil {
		return p, nil
	}
	p, err := openPump(paths, ps.cfg)
	if err != nil {
		return nil, err
	}
	if err := ps.watcher.Add(raw); err != nil {
		p.closeFiles()
		return nil, fmt.Errorf("watch %s (raise sysctl fs.inotify.max_user_watches if it is exhausted): %w", raw, err)
	}
	ps.active[raw] = p
	p.poke() // what was written before the watch
	ps.group.Go(func() {
		p.run(func(err error) { ps.log.Error("write container log", "log", paths.log(), "error", err) })
	})
	return p, nil
}

// find returns the running pump of an attempt, nil if its log is complete.
func (ps *pumps) find(paths logPaths) *pump {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.active[paths.raw()]
}

// close ends all pumps where they are; the next Runtime goes on from there.
func (ps *pumps) close() error {
	ps.mu.Lock()
	ps.closed = true
	for _, p := range ps.active {
		p.end()
	}
	ps.mu.Unlock()
	err := ps.watcher.Close()
	ps.group.Wait()
	return err
}

// stdio are the paths that the shim is given.
type stdio struct{ stdin, stdout, stderr string }

// prepare makes the files for an attempt, marks that its start is tried, and starts
// its pump. Of earlier attempts only the last one's log is kept.
func (ps *pumps) prepare(m meta) (stdio, error) {
	paths := ps.cfg.logPaths(m)
	if err := os.MkdirAll(paths.raw(), 0o750); err != nil {
		return stdio{}, err
	}
	if err := os.WriteFile(paths.marker(), nil, 0o640); err != nil {
		return stdio{}, err
	}
	if _, err := ps.open(paths); err != nil {
		return stdio{}, err
	}
	io := stdio{stdout: paths.stdout(), stderr: paths.stderr()}
	if m.tty {
		io.stderr = ""
	}
	if m.stdin {
		// A FIFO without a writer: reading it waits, as for input that may still come.
		if err := unix.Mkfifo(paths.stdin(), 0o600); err != nil && !errors.Is(err, os.ErrExist) {
			return stdio{}, err
		}
		io.stdin = paths.stdin()
	}
	return io, ps.forgetBefore(paths.dir, m.attempt-1)
}

func (ps *pumps) forgetBefore(dir string, first int) error {
	all, err := attempts(dir)
	if err != nil {
		return err
	}
	for _, n := range all {
		if n >= first {
			continue
		}
		paths := logPaths{dir: dir, base: strconv.Itoa(n)}
		if ps.find(paths) != nil {
			continue
		}
		files, err := filepath.Glob(filepath.Join(dir, paths.base+".log*"))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// started keeps when the container's program began to run.
func (ps *pumps) started(m meta, at time.Time) error {
	return writeFileAtomic(ps.cfg.logPaths(m).marker(), strconv.AppendInt(nil, at.UnixNano(), 10), 0o640)
}

// abandon takes prepare back after a start that never ran anything.
func (ps *pumps) abandon(m meta) {
	if err := ps.finish(m); err != nil {
		ps.log.Error("remove log of failed start", "error", err)
	}
	os.Remove(ps.cfg.logPaths(m).marker())
}

// finish moves the last output into the log and ends the pump. Everything must have
// been written: the task is deleted.
func (ps *pumps) finish(m meta) error {
	paths := ps.cfg.logPaths(m)
	p := ps.find(paths)
	if p == nil {
		return nil
	}
	if err := p.move(true); err != nil {
		return fmt.Errorf("write log %s: %w", paths.log(), err)
	}
	ps.discard(p)
	return os.RemoveAll(paths.raw())
}

// abandonRaw ends the pump of an attempt and forgets what it has not moved.
func (ps *pumps) abandonRaw(m meta) {
	paths := ps.cfg.logPaths(m)
	if p := ps.find(paths); p != nil {
		ps.discard(p)
	}
	os.RemoveAll(paths.raw())
}

// discard ends a pump and its followers.
func (ps *pumps) discard(p *pump) {
	ps.mu.Lock()
	delete(ps.active, p.paths.raw())
	ps.mu.Unlock()
	_ = ps.watcher.Remove(p.paths.raw()) // gone already when the folder is
	p.mu.Lock()
	if !p.ended {
		p.ended = true
		close(p.changed)
	}
	p.mu.Unlock()
	p.end()
}

// drop ends the pumps of a pod whose logs are about to be removed.
func (ps *pumps) drop(pod types.UID) {
	prefix := filepath.Join(ps.cfg.logDir(), string(pod)) + string(filepath.Separator)
	ps.mu.Lock()
	var found []*pump
	for raw, p := range ps.active {
		if strings.HasPrefix(raw, prefix) {
			found = append(found, p)
		}
	}
	ps.mu.Unlock()
	for _, p := range found {
		ps.discard(p)
	}
}
