package front

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"
)

// untold is how many lines are kept for the next agent.
const untold = 256

// logs takes lines of JSON, each with one call of Write. They go to the agent. While there is
// none they go elsewhere, and the last ones are told to the next agent as well.
type logs struct {
	spill io.Writer

	mu    sync.Mutex
	lines [][]byte      // that no agent was told yet
	come  chan struct{} // holds one signal: there are some; nil: there is no agent
}

// Write implements [io.Writer].
func (l *logs) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lines) == untold { // nobody listens, or not well
		l.lines = slices.Delete(l.lines, 0, 1)
	}
	l.lines = append(l.lines, slices.Clone(line))
	if l.come == nil {
		return l.spill.Write(line)
	}
	select {
	case l.come <- struct{}{}:
	default:
	}
	return len(line), nil
}

// take takes what no agent was told yet.
func (l *logs) take() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := bytes.Join(l.lines, nil)
	l.lines = nil
	return lines
}

// serve sends the agent what is written. Whoever comes last gets it.
func (l *logs) serve(w http.ResponseWriter, r *http.Request) {
	come := make(chan struct{}, 1)
	l.mu.Lock()
	l.come = come
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.come == come {
			l.come = nil
			_, _ = l.spill.Write(bytes.Join(l.lines, nil)) // nobody is left to tell
		}
	}()
	out := http.NewResponseController(w)
	for {
		lines := l.take()
		if _, err := w.Write(lines); err != nil || out.Flush() != nil {
			_, _ = l.spill.Write(lines)
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-come:
		}
	}
}

// follow logs what a process sends, as one's own, until it ends.
func follow(ctx context.Context, from io.Reader, to *slog.Logger) error {
	lines := bufio.NewScanner(from)
	for lines.Scan() {
		var fields map[string]any
		if json.Unmarshal(lines.Bytes(), &fields) != nil {
			continue
		}
		var level slog.Level
		text, _ := fields[slog.LevelKey].(string)
		if level.UnmarshalText([]byte(text)) != nil || !to.Enabled(ctx, level) {
			continue
		}
		message, _ := fields[slog.MessageKey].(string)
		at := time.Now()
		if text, ok := fields[slog.TimeKey].(string); ok {
			if t, err := time.Parse(time.RFC3339Nano, text); err == nil {
				at = t
			}
		}
		for _, k := range []string{slog.LevelKey, slog.MessageKey, slog.TimeKey} {
			delete(fields, k)
		}
		r := slog.NewRecord(at, level, message, 0)
		for _, k := range slices.Sorted(maps.Keys(fields)) {
			r.AddAttrs(slog.Any(k, fields[k]))
		}
		_ = to.Handler().Handle(ctx, r) // as Logger does
	}
	return lines.Err()
}
