package raftstore

import (
	"context"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// hclogger lets hashicorp/raft log to slog. Raft reports every ordinary step at
// info level; here those are debug, so that what people see is worth reading.
//
// While a server is away raft says so many times a second. The same complaint is
// passed on once in a while; in between it is debug.
type hclogger struct {
	log     *slog.Logger
	name    string
	implied []any
	said    *complaints
}

// repeat is how often one complaint is passed on.
const repeat = 30 * time.Second

// complaints remembers when each was passed on last.
type complaints struct {
	mu   sync.Mutex
	last map[string]time.Time
}

// again reports whether the complaint was passed on a short while ago.
func (c *complaints) again(key string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.last[key]) < repeat {
		return true
	}
	if len(c.last) > 1000 { // it names servers and messages: there are few
		clear(c.last)
	}
	c.last[key] = now
	return false
}

// complaintKey tells complaints apart by their message and by whom they are about.
func complaintKey(msg string, args []any) string {
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "peer", "server-id", "id":
			msg += fmt.Sprint(" ", args[i+1])
		}
	}
	return msg
}

var _ hclog.Logger = (*hclogger)(nil)

// RaftLogger is a logger for hashicorp/raft and its parts that writes to l.
func RaftLogger(l *slog.Logger) hclog.Logger {
	return &hclogger{log: l.With("component", "raft"), said: &complaints{last: map[string]time.Time{}}}
}

func slogLevel(l hclog.Level) slog.Level {
	switch l {
	case hclog.Trace:
		return slog.LevelDebug - 4
	case hclog.Debug, hclog.Info, hclog.NoLevel:
		return slog.LevelDebug
	case hclog.Warn:
		return slog.LevelWarn
	}
	return slog.LevelError
}

// Log implements hclog.Logger.
func (h *hclogger) Log(level hclog.Level, msg string, args ...any) {
	if level == hclog.Off {
		return
	}
	to := slogLevel(level)
	if to >= slog.LevelWarn && h.said.again(complaintKey(msg, args), time.Now()) {
		to = slog.LevelDebug
	}
	h.log.Log(context.Background(), to, msg, args...)
}

// Trace implements hclog.Logger.
func (h *hclogger) Trace(msg string, args ...any) { h.Log(hclog.Trace, msg, args...) }

// Debug implements hclog.Logger.
func (h *hclogger) Debug(msg string, args ...any) { h.Log(hclog.Debug, msg, args...) }

// Info implements hclog.Logger.
func (h *hclogger) Info(msg string, args ...any) { h.Log(hclog.Info, msg, args...) }

// Warn implements hclog.Logger.
func (h *hclogger) Warn(msg string, args ...any) { h.Log(hclog.Warn, msg, args...) }

// Error implements hclog.Logger.
func (h *hclogger) Error(msg string, args ...any) { h.Log(hclog.Error, msg, args...) }

func (h *hclogger) enabled(l hclog.Level) bool {
	return h.log.Enabled(context.Background(), slogLevel(l))
}

// IsTrace implements hclog.Logger.
func (h *hclogger) IsTrace() bool { return h.enabled(hclog.Trace) }

// IsDebug implements hclog.Logger.
func (h *hclogger) IsDebug() bool { return h.enabled(hclog.Debug) }

// IsInfo implements hclog.Logger.
func (h *hclogger) IsInfo() bool { return h.enabled(hclog.Info) }

// IsWarn implements hclog.Logger.
func (h *hclogger) IsWarn() bool { return h.enabled(hclog.Warn) }

// IsError implements hclog.Logger.
func (h *hclogger) IsError() bool { return h.enabled(hclog.Error) }

// ImpliedArgs implements hclog.Logger.
func (h *hclogger) ImpliedArgs() []any { return h.implied }

// With implements hclog.Logger.
func (h *hclogger) With(args ...any) hclog.Logger {
	return &hclogger{log: h.log.With(args...), name: h.name, said: h.said, implied: append(h.implied[:len(h.implied):len(h.implied)], args...)}
}

// Name implements hclog.Logger.
func (h *hclogger) Name() string { return h.name }

// Named implements hclog.Logger.
func (h *hclogger) Named(name string) hclog.Logger {
	return h.ResetNamed(strings.TrimPrefix(h.name+"."+name, "."))
}

// ResetNamed implements hclog.Logger.
func (h *hclogger) ResetNamed(name string) hclog.Logger {
	return &hclogger{log: h.log, name: name, said: h.said, implied: h.implied}
}

// SetLevel implements hclog.Logger; slog's handler decides about levels.
func (h *hclogger) SetLevel(hclog.Level) {}

// GetLevel implements hclog.Logger.
func (h *hclogger) GetLevel() hclog.Level {
	for _, l := range []hclog.Level{hclog.Trace, hclog.Debug, hclog.Warn, hclog.Error} {
		if h.enabled(l) {
			return l
		}
	}
	return hclog.Off
}

// StandardLogger implements hclog.Logger.
func (h *hclogger) StandardLogger(o *hclog.StandardLoggerOptions) *stdlog.Logger {
	return stdlog.New(h.StandardWriter(o), "", 0)
}

// StandardWriter implements hclog.Logger.
func (h *hclogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return slog.NewLogLogger(h.log.Handler(), slog.LevelDebug).Writer()
}
