package raftstore

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// EventType says what happened to an object, as one watcher sees it.
type EventType uint8

// The types. An object that begins to match a filter is Added, one that stops to
// match is Deleted.
const (
	Added EventType = iota + 1
	Modified
	Deleted
)

// String returns the type as Kubernetes spells it.
func (t EventType) String() string {
	switch t {
	case Added:
		return "ADDED"
	case Modified:
		return "MODIFIED"
	case Deleted:
		return "DELETED"
	}
	return "UNKNOWN"
}

// Event is one change that a watcher sees. Its objects are shared and immutable.
type Event struct {
	Type EventType
	// Revision of the change. Several events of one transaction have different ones.
	Revision uint64
	Key      api.Key
	// Object is the object after the change. With Deleted it is the last one that the
	// watcher knew, with Revision as its resourceVersion.
	Object api.Object
	// Previous is the object before the change, nil if there was none; whether it
	// matched the filter says Type.
	Previous api.Object

	record *record
}

// Encoded returns what encode makes of the event. While the event is new, that is made
// once for all watchers that see it as the same Type; so all of them must encode alike,
// and nobody may change the result.
func (e *Event) Encoded(encode func() ([]byte, error)) ([]byte, error) {
	cell := &e.record.encoded[e.Type-1]
	if data := cell.Load(); data != nil {
		return *data, nil
	}
	data, err := encode()
	if err == nil && e.record.fresh.Load() {
		cell.Store(&data)
		if !e.record.fresh.Load() { // it has aged meanwhile
			cell.Store(nil)
		}
	}
	return data, err
}

// Filter selects what a watcher sees. Its zero value selects everything.
type Filter struct {
	Resource  api.Resource
	Namespace string
	Name      string
	// Match, when not nil, is asked about the objects that the other fields select.
	// It must be pure and quick.
	Match func(api.Object) bool
}

func (f *Filter) matches(k api.Key, o api.Object) bool {
	return o != nil &&
		(f.Resource == "" || f.Resource == k.Resource) &&
		(f.Namespace == "" || f.Namespace == k.Namespace) &&
		(f.Name == "" || f.Name == k.Name) &&
		(f.Match == nil || f.Match(o))
}

// event is what the watcher of a filter sees of r, if anything.
func (f *Filter) event(r *record) (Event, bool) {
	e := Event{Revision: r.Revision, Key: r.Key, Object: r.New, Previous: r.Old, record: r}
	before, after := f.matches(r.Key, r.Old), f.matches(r.Key, r.New)
	switch {
	case before && after:
		e.Type = Modified
	case after:
		e.Type = Added
	case before:
		e.Type, e.Object = Deleted, r.tombstone()
	default:
		return Event{}, false
	}
	return e, true
}

// record is one change in the history.
type record struct {
	state.Event
	end  uint64 // the last revision of its transaction
	size int

	buried sync.Once
	grave  api.Object

	// encoded is kept by type while the record is fresh.
	encoded [Deleted]atomic.Pointer[[]byte]
	fresh   atomic.Bool
}

// age lets go of what watchers have made of the record.
func (r *record) age() {
	r.fresh.Store(false)
	for i := range r.encoded {
		r.encoded[i].Store(nil)
	}
}

// tombstone is the old object with the revision of the change.
func (r *record) tombstone() api.Object {
	r.buried.Do(func() {
		r.grave = api.Clone(r.Old)
		r.grave.SetResourceVersion(strconv.FormatUint(r.Revision, 10))
	})
	return r.grave
}

// hub keeps the newest changes, for watchers to pull at their own pace: publishing
// waits for nobody, and an idle watcher costs nothing. Revisions have no gaps, so a
// revision is a place in the history.
type hub struct {
	metrics   *metrics
	maxEvents int
	maxBytes  int

	mu       sync.RWMutex
	closed   bool
	revision uint64 // of the newest state
	records  log[*record]
	bytes    int
	streams  map[api.Resource]*stream // "" is all of them
	// fresh are the newest of records, whose encodings are kept, and their bytes.
	fresh, freshBytes int
}

// freshBytes bounds the changes whose encodings are kept for other watchers: those who
// keep up read them, those who are behind make their own.
const freshBytes = 4 << 20

// stream is the part of the history that one kind of watcher reads.
type stream struct {
	records log[*record]
	wake    chan struct{} // closed and replaced by a change, nil while nobody waits
}

func newHub(events, bytes int, m *metrics) *hub {
	return &hub{maxEvents: events, maxBytes: bytes, metrics: m, streams: make(map[api.Resource]*stream)}
}

// stream must be called with mu held for writing.
func (h *hub) stream(r api.Resource) *stream {
	s := h.streams[r]
	if s == nil {
		s = &stream{}
		h.streams[r] = s
	}
	return s
}

// publish appends the changes of transactions, one batch each, that led to revision.
// It calls swap, which makes the new state visible, before anybody can hear of the
// changes, and such that nobody who sees the state is told that it is too new.
func (h *hub) publish(revision uint64, batches [][]state.Event, swap func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	swap()
	if h.records.len() == 0 {
		h.start(revision, batches)
	}
	for _, batch := range batches {
		end := batch[len(batch)-1].Revision
		for i := range batch {
			r := &record{Event: batch[i], end: end}
			r.size = sizeOf(&r.Event)
			h.bytes += r.size
			h.records.push(r)
			h.refresh(r)
			h.stream(r.Key.Resource).add(r)
		}
	}
	h.revision = revision
	if len(batches) > 0 {
		h.stream("").notify()
	}
	h.trim()
}

// refresh makes the newest record a fresh one, and others age for it.
func (h *hub) refresh(r *record) {
	r.fresh.Store(true)
	h.fresh, h.freshBytes = h.fresh+1, h.freshBytes+r.size
	for h.freshBytes > freshBytes && h.fresh > 1 {
		old := h.records.at(h.records.len() - h.fresh)
		old.age()
		h.fresh, h.freshBytes = h.fresh-1, h.freshBytes-old.size
	}
}

// start notes where an empty history begins.
func (h *hub) start(revision uint64, batches [][]state.Event) {
	if len(batches) > 0 {
		revision = batches[0][0].Revision - 1
	}
	h.revision = max(h.revision, revision)
}

func sizeOf(e *state.Event) int {
	if e.New != nil {
		return command.SizeOf(e.New)
	}
	return command.SizeOf(e.Old)
}

func (s *stream) add(r *record) {
	s.records.push(r)
	s.notify()
}

func (s *stream) notify() {
	if s.wake != nil {
		close(s.wake)
		s.wake = nil
	}
}

// trim forgets the oldest changes beyond the bounds, whole transactions at a time.
func (h *hub) trim() {
	for h.records.len() > 0 && (h.records.len() > h.maxEvents || h.bytes > h.maxBytes) {
		end := h.records.at(0).end
		for h.records.len() > 0 && h.records.at(0).end == end {
			if h.fresh == h.records.len() {
				h.fresh, h.freshBytes = h.fresh-1, h.freshBytes-h.records.at(0).size
			}
			r := h.records.pop()
			h.bytes -= r.size
			h.streams[r.Key.Resource].records.pop()
		}
	}
}

// reset forgets everything: the state was replaced as a whole.
func (h *hub) reset(revision uint64, swap func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	swap()
	h.records, h.bytes, h.revision = log[*record]{}, 0, revision
	h.fresh, h.freshBytes = 0, 0
	for _, s := range h.streams {
		s.records = log[*record]{}
		s.notify()
	}
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, s := range h.streams {
		s.notify()
	}
}

// oldest is the oldest revision that a watch can start from. mu must be held.
func (h *hub) oldest() uint64 {
	if h.records.len() == 0 {
		return h.revision
	}
	return h.records.at(0).Revision - 1
}

// maxBatch is how many events Next returns, unless one transaction has more.
const maxBatch = 1024

// Watch follows changes. It belongs to one goroutine. It needs no closing: one that
// is not used any more is forgotten.
type Watch struct {
	hub    *hub
	filter Filter
	cursor uint64 // everything up to here was seen
}

// Watch returns a watch of the changes after revision from: the revision of a View
// or of an event, or a Watch's Progress. It returns an error matching ErrCompacted
// if the history does not reach back to there (it is empty after a restart), or
// if from is newer than the state.
func (s *Store) Watch(_ context.Context, from uint64, filter Filter) (*Watch, error) {
	return s.hub.watch(from, filter)
}

func (h *hub) watch(from uint64, filter Filter) (*Watch, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, ErrClosed
	}
	if oldest := h.oldest(); from < oldest || from > h.revision {
		return nil, fmt.Errorf("watch from revision %d: %w: it holds revisions %d to %d", from, ErrCompacted, oldest, h.revision)
	}
	return &Watch{hub: h, filter: filter, cursor: from}, nil
}

// Next returns the next events, in order of revision, without gap or duplicate; it
// waits until there are some. All events of one transaction come together, and
// transactions may share a call.
//
// When ctx ends, Next returns its cause and the watch can be used on: that is how to
// wake up for a bookmark. An error matching ErrSlowWatcher and ErrCompacted means
// that the history moved on without this watch, ErrClosed that the store closed.
func (w *Watch) Next(ctx context.Context) ([]Event, error) {
	for {
		events, wake, err := w.pull()
		if err != nil || len(events) > 0 {
			return events, err
		}
		if wake == nil {
			continue // there is more to look through
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// pull looks through the history. If it finds nothing to the end, it returns what to
// wait for.
func (w *Watch) pull() ([]Event, <-chan struct{}, error) {
	records, latest, wake, err := w.hub.read(w.filter.Resource, w.cursor)
	if err != nil {
		if errors.Is(err, ErrSlowWatcher) {
			w.hub.metrics.slowWatchers.Inc()
		}
		return nil, nil, err
	}
	var events []Event
	for _, r := range records {
		if e, ok := w.filter.event(r); ok {
			events = append(events, e)
		}
	}
	w.cursor = latest
	return events, wake, nil
}

// read returns the changes of a resource after cursor, whole transactions, and up to
// which revision they are complete. If there are none, it returns a channel that is
// closed by the next change.
func (h *hub) read(resource api.Resource, cursor uint64) ([]*record, uint64, <-chan struct{}, error) {
	h.mu.RLock()
	records, latest, err := h.after(resource, cursor)
	h.mu.RUnlock()
	if err != nil || len(records) > 0 {
		return records, latest, nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	records, latest, err = h.after(resource, cursor)
	if err != nil || len(records) > 0 {
		return records, latest, nil, err
	}
	s := h.stream(resource)
	if s.wake == nil {
		s.wake = make(chan struct{})
	}
	return nil, latest, s.wake, nil
}

// after must be called with mu held. It copies at most about maxBatch records.
func (h *hub) after(resource api.Resource, cursor uint64) (found []*record, latest uint64, err error) {
	if h.closed {
		return nil, cursor, ErrClosed
	}
	if oldest := h.oldest(); cursor < oldest || cursor > h.revision {
		return nil, cursor, fmt.Errorf("watch at revision %d: %w: %w", cursor, ErrSlowWatcher, ErrCompacted)
	}
	records := &h.records
	if resource != "" {
		s := h.streams[resource]
		if s == nil {
			return nil, h.revision, nil
		}
		records = &s.records
	}
	n := records.len()
	first := sort.Search(n, func(i int) bool { return records.at(i).Revision > cursor })
	last := first
	for last < n && (last-first < maxBatch || records.at(last).end == records.at(last-1).end) {
		last++
	}
	for i := first; i < last; i++ {
		found = append(found, records.at(i))
	}
	if last < n {
		return found, records.at(last - 1).end, nil
	}
	return found, h.revision, nil
}

// Progress is the revision up to which this watch has seen everything. A watch that
// starts there misses nothing.
func (w *Watch) Progress() uint64 {
	w.hub.mu.RLock()
	defer w.hub.mu.RUnlock()
	if records, latest, err := w.hub.after(w.filter.Resource, w.cursor); err == nil && len(records) == 0 {
		w.cursor = latest
	}
	return w.cursor
}

// WaitChange waits for a state with another revision than since, and returns it: what
// a level-triggered loop needs that looks at everything.
func (s *Store) WaitChange(ctx context.Context, since uint64) (*state.State, error) {
	for {
		if view := s.View(); view.Revision() != since {
			return view, nil
		}
		w, err := s.hub.watch(since, Filter{})
		if err == nil {
			_, err = w.Next(ctx)
		}
		if err != nil && !errors.Is(err, ErrCompacted) { // compacted: it has changed
			return nil, err
		}
	}
}
