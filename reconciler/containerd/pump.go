package containerd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxLine    = 16 << 10 // longer lines are written in parts
	chunkSize  = 64 << 10
	freeStep   = 1 << 20 // consumed raw bytes are given back in steps of this size
	blockSize  = 4 << 10
	pumpErrGap = time.Second
)

// pump moves the output of one container from the files that the shim appends to
// (one per stream, no time, no end) into its log.
//
// Why files: the shim writes them without us, so nothing is lost and no container
// blocks while no agent runs, and it costs no process. The position is kept in a
// file beside them: after a crash the log is cut back to the size that belongs to
// the position, so that no line is lost or written twice. Consumed bytes are
// returned to the file system by punching holes, which never races with the writer.
type pump struct {
	paths    logPaths
	maxBytes int64
	maxFiles int
	wake     chan struct{}
	stop     chan struct{} // closed to end the goroutine
	stopOnce sync.Once

	mu      sync.Mutex
	streams [2]*rawStream
	stateF  *os.File
	out     *os.File
	size    int64         // of out
	changed chan struct{} // closed and replaced after every append
	ended   bool
}

type rawStream struct {
	name  string
	f     *os.File
	pos   int64 // consumed
	freed int64
}

// openPump opens the files of an attempt and finds the position.
func openPump(paths logPaths, cfg Config) (*pump, error) {
	p := &pump{
		paths: paths, maxBytes: cfg.LogMaxBytes, maxFiles: cfg.LogFiles,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), changed: make(chan struct{}),
	}
	if err := p.open(); err != nil {
		p.closeFiles()
		return nil, fmt.Errorf("open log of %s: %w", paths.log(), err)
	}
	return p, nil
}

func (p *pump) open() error {
	var err error
	for i, path := range []string{p.paths.stdout(), p.paths.stderr()} {
		s := &rawStream{name: [2]string{"stdout", "stderr"}[i]}
		if s.f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return err
		}
		p.streams[i] = s
	}
	if p.stateF, err = os.OpenFile(p.paths.state(), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := p.openOut(); err != nil {
		return err
	}
	var saved [24]byte
	if n, err := p.stateF.ReadAt(saved[:], 0); n == len(saved) {
		p.streams[0].pos = int64(binary.LittleEndian.Uint64(saved[0:]))
		p.streams[1].pos = int64(binary.LittleEndian.Uint64(saved[8:]))
		size := int64(binary.LittleEndian.Uint64(saved[16:]))
		if p.size > size { // written, but the position was not: write it again
			if err := p.out.Truncate(size); err != nil {
				return err
			}
			p.size = size
		}
	} else if n == 0 && errors.Is(err, io.EOF) && p.size > 0 {
		p.size = 0 // died before the first position was kept
		return p.out.Truncate(0)
	}
	return nil
}

func (p *pump) openOut() error {
	f, err := os.OpenFile(p.paths.log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	p.out, p.size = f, st.Size()
	return nil
}

func (p *pump) closeFiles() {
	for _, s := range p.streams {
		if s != nil && s.f != nil {
			s.f.Close()
		}
	}
	for _, f := range []*os.File{p.stateF, p.out} {
		if f != nil {
			f.Close()
		}
	}
}

// run moves output whenever it is woken, until stopped.
func (p *pump) run(report func(error)) {
	defer p.closeFiles()
	var retry <-chan time.Time
	for {
		select {
		case <-p.stop:
			return
		case <-p.wake:
		case <-retry:
		}
		retry = nil
		if err := p.move(false); err != nil {
			report(err)
			retry = time.After(pumpErrGap)
		}
	}
}

func (p *pump) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *pump) end() { p.stopOnce.Do(func() { close(p.stop) }) }

var chunks = sync.Pool{New: func() any { b := make([]byte, chunkSize); return &b }}

// move writes what has arrived to the log; final includes an unfinished last line.
func (p *pump) move(final bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return nil
	}
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	for {
		moved := false
		for _, s := range p.streams {
			n, err := p.moveChunk(s, *buf, final)
			if err != nil {
				return err
			}
			moved = moved || n > 0
		}
		if !moved {
			break
		}
		close(p.changed)
		p.changed = make(chan struct{})
	}
	return nil
}

// moveChunk moves up to one chunk of one stream and returns how much it consumed.
func (p *pump) moveChunk(s *rawStream, buf []byte, final bool) (int64, error) {
	n, err := s.f.ReadAt(buf, s.pos)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	if n == 0 {
		return 0, nil
	}
	if p.size >= p.maxBytes {
		if err := p.rotate(); err != nil {
			return 0, fmt.Errorf("rotate log: %w", err)
		}
	}
	var out bytes.Buffer
	used := appendLines(&out, s.stamp(), s.name, buf[:n], final && n < len(buf), p.maxBytes-p.size)
	if used == 0 {
		return 0, nil
	}
	if _, err := p.out.Write(out.Bytes()); err != nil {
		// A part may have arrived: take it back, the position has not moved.
		return 0, errors.Join(err, p.out.Truncate(p.size))
	}
	p.size += int64(out.Len())
	s.pos += int64(used)
	if err := p.save(); err != nil {
		return 0, err
	}
	s.free()
	return int64(used), nil
}

// stamp is the time of the lines in the raw file: now, or that of the last write
// when they have waited for us.
func (s *rawStream) stamp() time.Time {
	now := time.Now()
	if st, err := s.f.Stat(); err == nil && now.Sub(st.ModTime()) > time.Second {
		return st.ModTime()
	}
	return now
}

// free gives consumed bytes back. A file system without holes keeps them until the
// container's end.
func (s *rawStream) free() {
	end := s.pos - s.pos%blockSize
	if end-s.freed < freeStep {
		return
	}
	if err := unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, s.freed, end-s.freed); err == nil {
		s.freed = end
	}
}

// save keeps the position together with the size of the log that belongs to it.
func (p *pump) save() error {
	var b [24]byte
	binary.LittleEndian.PutUint64(b[0:], uint64(p.streams[0].pos))
	binary.LittleEndian.PutUint64(b[8:], uint64(p.streams[1].pos))
	binary.LittleEndian.PutUint64(b[16:], uint64(p.size))
	_, err := p.stateF.WriteAt(b[:], 0)
	return err
}

// rotate starts a new log file and forgets the oldest. A crash in between leaves a
// log that is shorter than the saved size, which is taken as it is.
func (p *pump) rotate() error {
	for i := p.maxFiles - 2; i >= 0; i-- {
		if err := os.Rename(p.paths.old(i), p.paths.old(i+1)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if p.maxFiles == 1 {
		if err := os.Remove(p.paths.log()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	old := p.out
	if err := p.openOut(); err != nil {
		return err
	}
	old.Close()
	return p.save()
}

// appendLines writes complete lines, and parts of lines that are too long or, if
// final, unfinished. It stops once out holds room bytes, and returns how many bytes of
// data it used.
func appendLines(out *bytes.Buffer, at time.Time, stream string, data []byte, final bool, room int64) int {
	stamp := at.UTC().AppendFormat(nil, time.RFC3339Nano)
	used := 0
	for len(data) > 0 && int64(out.Len()) < room {
		n := bytes.IndexByte(data, '\n')
		tag, skip := " F ", 1
		switch {
		case n > maxLine || n < 0 && len(data) > maxLine:
			n, tag, skip = maxLine, " P ", 0
		case n < 0 && final:
			n, skip = len(data), 0
		case n < 0:
			return used
		}
		out.Write(stamp)
		out.WriteByte(' ')
		out.WriteString(stream)
		out.WriteString(tag)
		out.Write(data[:n])
		out.WriteByte('\n')
		used += n + skip
		data = data[n+skip:]
	}
	return used
}
