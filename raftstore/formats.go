package raftstore

import (
	"fmt"
	"sync"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// formats is what a store knows of the formats of log entries.
type formats struct {
	mu  sync.Mutex
	now int // of new entries, while this server leads
	// used is the newest format in the snapshot of this server and in the log after it, as
	// of its start, and of all since. While it leads and has caught up, nothing that it may
	// send to others is newer, but for what it has kept of the log before the snapshot: a
	// server that is new is sent that if it goes back to the first entry.
	used    int
	joining map[string]int // servers that are being added, and how often
}

// note takes down that something is written in a format.
func (f *formats) note(format int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.used = max(f.used, format)
}

// encode makes a log entry, which counts as written.
func (f *formats) encode(txns ...[]byte) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	entry, err := command.EncodeEntry(f.now, txns...)
	if err == nil {
		f.used = max(f.used, command.FormatOfEntry(entry))
	}
	return entry, err
}

// TooOldError says that a server cannot be added to the cluster.
type TooOldError struct {
	ID    string
	Knows int // the newest log format that the server understands
	Used  int // the newest one that the cluster has written
}

// Error implements error.
func (e *TooOldError) Error() string {
	return fmt.Sprintf("server %s understands log formats up to %d, and this cluster has written format %d: the server could not read that, and would stop for good. "+
		"Install the version of decree that the other servers have (`decree members` shows it), and start it again", e.ID, e.Knows, e.Used)
}

// CodeTooOld is the code of a [TooOldError] between servers.
const CodeTooOld = "too-old"

// ErrorCode tells other servers what the error is.
func (*TooOldError) ErrorCode() string { return CodeTooOld }

// CheckFormat returns a [*TooOldError] if a server that understands formats up to knows
// could not read what this cluster has written, as far as this server has it.
func (s *Store) CheckFormat(id string, knows int) error {
	s.formats.mu.Lock()
	defer s.formats.mu.Unlock()
	return s.formats.check(id, knows)
}

func (f *formats) check(id string, knows int) error {
	if knows < f.used {
		return &TooOldError{ID: id, Knows: knows, Used: f.used}
	}
	return nil
}

// understands is the newest format that a server understands: what it has said when it
// announced itself.
func (s *Store) understands(id string) int {
	if id == s.cfg.NodeID {
		return s.cfg.Format
	}
	if o, ok := api.Get[*api.Server](s.View(), "", id); ok {
		return max(command.Oldest, o.Status.Format)
	}
	return command.Oldest
}

// settleFormat makes the format of new entries the newest one that every server of the
// configuration understands, and every one that is being added.
func (s *Store) settleFormat() {
	s.formats.mu.Lock()
	defer s.formats.mu.Unlock()
	s.settleLocked()
}

func (s *Store) settleLocked() {
	newest := s.cfg.Format
	for _, m := range s.Members() {
		newest = min(newest, s.understands(m.ID))
	}
	for id := range s.formats.joining {
		newest = min(newest, s.understands(id))
	}
	if old := s.formats.now; old != newest {
		s.formats.now = newest
		s.log.Info("format of log entries", "format", newest, "before", old)
	}
}

// letIn has everything written such that a new server can read it, until done is called.
// What was written before it must understand.
func (s *Store) letIn(id string) (done func(), err error) {
	f := &s.formats
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check(id, s.understands(id)); err != nil {
		return nil, err
	}
	f.joining[id]++
	s.settleLocked()
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.joining[id]--; f.joining[id] == 0 {
			delete(f.joining, id)
		}
	}, nil
}
