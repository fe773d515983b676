package containerd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/agent"
)

// Logs implements agent.Runtime. With Follow it ends when the container has ended
// and all of its output was copied.
func (r *Runtime) Logs(ctx context.Context, pod types.UID, container string, opts agent.LogOptions, w io.Writer) error {
	if err := checkUID(pod); err != nil {
		return err
	}
	dir := r.cfg.containerLogDir(pod, container)
	paths, err := chooseLog(dir, opts.Previous)
	if err != nil {
		return fmt.Errorf("logs of container %s of pod %s: %w", container, pod, err)
	}
	lr := &logReader{paths: paths, pump: r.pumps.find(paths)}
	defer lr.close()
	err = lr.copy(ctx, opts, &lineWriter{w: w, opts: opts, left: opts.LimitBytes})
	if errors.Is(err, errLimit) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("logs of container %s of pod %s: %w", container, pod, err)
	}
	return nil
}

// chooseLog returns the newest attempt that has a log, or the one before.
func chooseLog(dir string, previous bool) (logPaths, error) {
	all, err := attempts(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return logPaths{}, err
	}
	slices.Sort(all)
	i := len(all) - 1
	if previous {
		i--
	}
	if i < 0 && previous {
		return logPaths{}, fmt.Errorf("it was not restarted, there is no previous log: %w", agent.ErrNotFound)
	}
	if i < 0 {
		return logPaths{}, fmt.Errorf("it has not started, there is no log: %w", agent.ErrNotFound)
	}
	return logPaths{dir: dir, base: strconv.Itoa(all[i])}, nil
}

// logReader reads the files of one attempt, oldest first, across rotation.
type logReader struct {
	paths logPaths
	pump  *pump // nil: the log is complete
	files []*os.File
}

func (lr *logReader) close() {
	for _, f := range lr.files {
		f.Close()
	}
}

func (lr *logReader) copy(ctx context.Context, opts agent.LogOptions, out *lineWriter) error {
	if lr.pump != nil {
		if err := lr.pump.move(false); err != nil {
			return err
		}
	}
	changed, ended, err := lr.refresh()
	if err != nil {
		return err
	}
	if opts.TailLines >= 0 {
		if err := lr.seekTail(opts.TailLines); err != nil {
			return err
		}
	}
	for {
		for len(lr.files) > 0 {
			if err := out.copyLines(ctx, lr.files[0]); err != nil {
				return err
			}
			if len(lr.files) == 1 {
				break // the newest: more may come
			}
			lr.files[0].Close()
			lr.files = lr.files[1:]
		}
		if !opts.Follow || ended {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
		if changed, ended, err = lr.refresh(); err != nil {
			return err
		}
	}
}

// refresh opens the files that are newer than the newest open one. Afterwards
// changed is closed by the next append; ended says that none will follow.
func (lr *logReader) refresh() (changed chan struct{}, ended bool, err error) {
	ended = true
	if p := lr.pump; p != nil {
		p.mu.Lock() // no rotation meanwhile
		defer p.mu.Unlock()
		changed, ended = p.changed, p.ended
	}
	var last os.FileInfo
	if n := len(lr.files); n > 0 {
		if last, err = lr.files[n-1].Stat(); err != nil {
			return nil, false, err
		}
	}
	var newer []*os.File
	for i := 0; ; i++ {
		f, err := os.Open(lr.paths.old(i))
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return nil, false, err
		}
		st, err := f.Stat()
		if err != nil || last != nil && os.SameFile(st, last) {
			f.Close()
			if err != nil {
				return nil, false, err
			}
			break
		}
		newer = append(newer, f)
	}
	slices.Reverse(newer)
	lr.files = append(lr.files, newer...)
	return changed, ended, nil
}

// seekTail positions the files at the last n lines; the older ones are closed.
func (lr *logReader) seekTail(n int64) error {
	for i := len(lr.files) - 1; i >= 0; i-- {
		f := lr.files[i]
		starts, err := lineStarts(f, n)
		if err != nil {
			return err
		}
		at := starts.first
		if n == 0 {
			at = starts.end
		}
		if _, err := f.Seek(at, io.SeekStart); err != nil {
			return err
		}
		if n -= starts.count; n > 0 && i > 0 {
			continue
		}
		for _, old := range lr.files[:i] {
			old.Close()
		}
		lr.files = lr.files[i:]
		return nil
	}
	return nil
}

type tail struct{ first, end, count int64 }

// lineStarts finds the last n lines of a file: where they begin, where the file
// ends, and how many there are. Parts of a long line count as one.
func lineStarts(f *os.File, n int64) (tail, error) {
	rd := bufio.NewReaderSize(io.NewSectionReader(f, 0, 1<<62), chunkSize)
	var ring []int64
	var t tail
	fresh := true // the next entry begins a line
	for {
		line, err := rd.ReadSlice('\n')
		for errors.Is(err, bufio.ErrBufferFull) {
			t.end += int64(len(line))
			line, err = rd.ReadSlice('\n')
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return t, err
		}
		if err != nil {
			break
		}
		if fresh && n > 0 {
			if int64(len(ring)) < n {
				ring = append(ring, t.end)
			} else {
				ring[t.count%n] = t.end
			}
			t.count++
		}
		_, _, partial, _ := parseLine(line)
		fresh = !partial
		t.end += int64(len(line))
	}
	if t.count > n && n > 0 {
		t.first = ring[t.count%n]
		t.count = n
	}
	return t, nil
}

// parseLine splits a log line. ok is false for what is no log line.
func parseLine(line []byte) (at, text []byte, partial, ok bool) {
	fields := bytes.SplitN(bytes.TrimSuffix(line, []byte("\n")), []byte(" "), 4)
	if len(fields) != 4 {
		return nil, nil, false, false
	}
	return fields[0], fields[3], len(fields[2]) == 1 && fields[2][0] == 'P', true
}

var errLimit = errors.New("byte limit reached")

// lineWriter writes log lines as the reader asked for them.
type lineWriter struct {
	w      io.Writer
	opts   agent.LogOptions
	left   int64 // bytes, when opts.LimitBytes is set
	inside bool  // within a line that came in parts
	skip   bool  // that line is before opts.Since
	carry  []byte
}

// copyLines copies whole lines until the end of f for now. It leaves f at the end of
// the last whole line.
func (lw *lineWriter) copyLines(ctx context.Context, f *os.File) error {
	rd := bufio.NewReaderSize(f, chunkSize)
	for {
		line, err := rd.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			if len(line) > 0 {
				_, err := f.Seek(int64(-len(line)), io.SeekCurrent)
				return err
			}
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := lw.write(line); err != nil {
			return err
		}
	}
}

func (lw *lineWriter) write(line []byte) error {
	at, text, partial, ok := parseLine(line)
	if !ok {
		return nil
	}
	if !lw.inside {
		lw.skip = false
		if !lw.opts.Since.IsZero() {
			t, err := time.Parse(time.RFC3339Nano, string(at))
			lw.skip = err == nil && t.Before(lw.opts.Since)
		}
	}
	out := lw.carry[:0]
	if lw.opts.Timestamps && !lw.inside {
		out = append(append(out, at...), ' ')
	}
	out = append(out, text...)
	if !partial {
		out = append(out, '\n')
	}
	lw.inside, lw.carry = partial, out
	if lw.skip {
		return nil
	}
	return lw.emit(out)
}

func (lw *lineWriter) emit(out []byte) error {
	limited := lw.opts.LimitBytes > 0
	if limited && int64(len(out)) >= lw.left {
		out = out[:lw.left]
	}
	if _, err := lw.w.Write(out); err != nil {
		return err
	}
	if lw.left -= int64(len(out)); limited && lw.left <= 0 {
		return errLimit
	}
	return nil
}
