package apiserver

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// writeTimeout is how long one batch of events may take to leave the server: a
// client that does not read is cut off, and resumes where it was.
const writeTimeout = 30 * time.Second

// eventWriter encodes watch events, as JSON one per line.
type eventWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	kind    *api.Kind
	format  format
	shape   func(api.Object) api.Object // of what add is given; nil: as it is

	begun, broken bool
	columns       bool // column definitions were sent
	pending       []byte
	err           error // of encoding; ends the watch
}

// event is a metav1.WatchEvent that is encoded in one go.
type event struct {
	Type   watch.EventType `json:"type"`
	Object any             `json:"object"`
}

// addShared is add for an event that other watchers see just as it is: it is encoded
// once for all of them.
func (e *eventWriter) addShared(change *raftstore.Event) {
	kind := watch.EventType(change.Type.String())
	if e.format.table || e.err != nil { // a table tells of ages
		e.add(kind, change.Object)
		return
	}
	line, err := change.Encoded(func() ([]byte, error) { return encodeEvent(kind, withType(e.kind, change.Object)) })
	if err != nil {
		e.err = err
		return
	}
	e.pending = append(e.pending, line...)
}

func (e *eventWriter) add(kind watch.EventType, o api.Object) {
	if e.err != nil {
		return
	}
	if e.shape != nil {
		o = e.shape(o)
	}
	var body any = withType(e.kind, o)
	if e.format.table {
		rev, _ := strconv.ParseUint(o.GetResourceVersion(), 10, 64)
		t, err := newTable(e.kind, e.format, rev, []api.Object{o}, time.Now())
		if err != nil {
			e.err = err
			return
		}
		if e.columns {
			t.ColumnDefinitions = nil
		}
		e.columns, body = true, t
	}
	e.encode(kind, body)
}

func (e *eventWriter) encode(kind watch.EventType, body any) {
	line, err := encodeEvent(kind, body)
	if err != nil {
		e.err = err
		return
	}
	e.pending = append(e.pending, line...)
}

// encodeEvent returns an event as a line of JSON.
func encodeEvent(kind watch.EventType, body any) ([]byte, error) {
	data, err := json.Marshal(event{kind, body})
	if err != nil {
		return nil, fmt.Errorf("encode event: %w", err)
	}
	return append(data, '\n'), nil
}

const flushAt = 64 << 10 // bytes of pending events that are written at once

func (e *eventWriter) sendInitial(view api.Reader, filter *watchFilter, opts watchOptions) error {
	var failed error
	filter.sel.each(view, func(o api.Object) bool {
		if filter.matches(o) {
			e.add(watch.Added, o)
		}
		if len(e.pending) >= flushAt {
			failed = e.flushPending()
		}
		return failed == nil
	})
	if failed != nil {
		return failed
	}
	if opts.marked {
		if err := e.bookmark(view.Revision(), map[string]string{metav1.InitialEventsAnnotationKey: "true"}); err != nil {
			return err
		}
	}
	return e.flushPending()
}

// bookmark tells the client how far it has seen everything.
func (e *eventWriter) bookmark(revision uint64, annotations map[string]string) error {
	o := e.kind.New()
	o.SetResourceVersion(strconv.FormatUint(revision, 10))
	o.SetAnnotations(annotations)
	if e.format.table {
		t, err := newTable(e.kind, e.format, revision, nil, time.Time{})
		if err != nil {
			return err
		}
		if e.columns {
			t.ColumnDefinitions = nil
		}
		e.encode(watch.Bookmark, t)
	} else {
		e.encode(watch.Bookmark, o)
	}
	return e.flushPending()
}

// fail ends the watch with an ERROR event.
func (e *eventWriter) fail(err error) error {
	status := statusOf(err)
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	e.encode(watch.Error, status)
	return e.flushPending()
}

func (e *eventWriter) flushPending() error {
	if e.err != nil {
		return e.err
	}
	if len(e.pending) == 0 {
		return nil
	}
	return e.flush()
}

// flush sends what is pending, headers first: with nothing pending the client
// learns at once that it is watching.
func (e *eventWriter) flush() error {
	defer deadline(e.control)()
	if !e.begun {
		e.begun = true
		e.w.Header().Set("Content-Type", "application/json")
		e.w.WriteHeader(http.StatusOK)
	}
	_, err := e.w.Write(e.pending)
	if err == nil {
		err = e.control.Flush()
	}
	if err != nil {
		e.broken = true
		return fmt.Errorf("send events: %w", err)
	}
	e.pending = e.pending[:0]
	return nil
}
