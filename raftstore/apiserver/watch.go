package apiserver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

// maxWatch bounds timeoutSeconds.
const maxWatch = 24 * time.Hour

// watchOptions are the query of a watch.
type watchOptions struct {
	after     uint64 // begin behind this revision
	initial   bool   // begin with the objects that exist
	marked    bool   // tell where the initial objects end
	bookmarks bool
	timeout   time.Duration
}

func (s *Server) parseWatch(q url.Values) (watchOptions, error) {
	rv := q.Get("resourceVersion")
	o := watchOptions{initial: rv == "" || rv == "0", bookmarks: q.Get("allowWatchBookmarks") == "true"}
	var err error
	if o.after, err = parseRevision(rv); err != nil {
		return o, err
	}
	switch q.Get("sendInitialEvents") {
	case "true":
		o.initial, o.marked = true, true
	case "false":
		o.initial = false
	}
	seconds, err := strconv.ParseInt(orZero(q.Get("timeoutSeconds")), 10, 64)
	if err != nil || seconds < 0 {
		return o, apierrors.NewBadRequest("timeoutSeconds must be a number that is not negative")
	}
	o.timeout = min(time.Duration(min(seconds, int64(maxWatch/time.Second)))*time.Second, maxWatch)
	if o.timeout == 0 {
		o.timeout = s.cfg.WatchTime + rand.N(s.cfg.WatchTime) // so that not everybody comes back at once
	}
	return o, nil
}

// serveWatch streams changes until the client leaves, the time is up or the server
// stops. Errors after the first byte are sent as events.
func (s *Server) serveWatch(w http.ResponseWriter, r *http.Request, t target, who Identity) error {
	f, err := negotiate(r)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	sel, err := newSelector(t, q)
	if err != nil {
		return err
	}
	opts, err := s.parseWatch(q)
	if err != nil {
		return err
	}
	if !s.watches.enter() {
		return apierrors.NewTooManyRequests("too many watches are open", 10)
	}
	defer s.watches.leave()
	ctx, cancel := context.WithTimeout(r.Context(), opts.timeout)
	defer cancel()
	out := &eventWriter{w: w, control: http.NewResponseController(w), kind: t.kind, format: f}
	err = s.runWatch(ctx, out, sel, who, q, opts)
	switch {
	case err == nil || ctx.Err() != nil || out.broken:
		return nil
	case !out.begun:
		return err
	}
	return nil
}

// runWatch sends the initial objects, if wanted, and then every change.
func (s *Server) runWatch(ctx context.Context, out *eventWriter, sel *selector, who Identity, q url.Values, opts watchOptions) error {
	allowed := newScope(who, s.cfg.Store.View())
	filter := newWatchFilter(sel, allowed, q.Get(PeersParameter) == "true")
	if filter.peers {
		out.shape = func(o api.Object) api.Object { return peerOf(o.(*corev1.Pod)) }
	}
	if filter.refs != nil && !opts.initial {
		// Which objects the node could see at that revision is not known any more.
		return out.fail(expired("a node's watch of " + string(sel.t.kind.Resource) + " cannot be resumed: begin with sendInitialEvents"))
	}
	if opts.initial {
		view, err := s.readView(ctx, q)
		if err != nil {
			return err
		}
		opts.after = view.Revision()
		filter.begin(view)
		if err := out.sendInitial(view, filter, opts); err != nil {
			return err
		}
	}
	changes, err := s.cfg.Store.Watch(ctx, opts.after, filter.store())
	if errors.Is(err, raftstore.ErrCompacted) {
		return out.fail(expired(fmt.Sprintf("too old resource version: %d (current: %d)", opts.after, s.cfg.Store.View().Revision())))
	}
	if err != nil {
		return fmt.Errorf("watch %s: %w", sel.t.kind.Resource, err)
	}
	if err := out.flush(); err != nil { // headers at once: the client knows it is watching
		return err
	}
	return s.copyEvents(ctx, out, changes, filter, opts)
}

func (s *Server) copyEvents(ctx context.Context, out *eventWriter, changes *raftstore.Watch, filter *watchFilter, opts watchOptions) error {
	for ctx.Err() == nil {
		wait, cancel := context.WithTimeout(ctx, s.cfg.Bookmark)
		events, err := changes.Next(wait)
		cancel()
		switch {
		case errors.Is(err, raftstore.ErrCompacted):
			return out.fail(expired("the client is too slow: its changes are not kept any more"))
		case err != nil && wait.Err() != nil && ctx.Err() == nil:
			if opts.bookmarks {
				if err := out.bookmark(changes.Progress(), nil); err != nil {
					return err
				}
			}
			continue
		case err != nil:
			return err
		}
		for i := range events {
			filter.apply(s.cfg.Store, &events[i], out)
		}
		if err := out.flushPending(); err != nil {
			return err
		}
		s.pause(ctx)
	}
	return nil
}

// flushesPerCore is how many batches of events leave in a second for each core. One
// costs about 20 µs, however many events are in it.
const flushesPerCore = 10_000

// pause lets a watch that has just sent events wait for its next turn, so that those
// which come meanwhile leave together. There is no wait unless all watches together
// send more than the cores are good for.
func (s *Server) pause(ctx context.Context) {
	wait := s.flushes.Reserve().Delay()
	if wait <= 0 {
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// watchFilter decides which events a client gets, and as what.
type watchFilter struct {
	sel  *selector
	refs *watchReferences
	// peers: pods are shown as others see them, and only changes of that.
	peers bool
}

// newWatchFilter adds to the client's selector what its identity may see: a node's
// pods by their field, its config maps and secrets by the references of its pods.
func newWatchFilter(sel *selector, allowed *scope, peers bool) *watchFilter {
	f := &watchFilter{sel: sel, peers: peers && sel.t.kind.Resource == api.Pods}
	switch {
	case f.peers:
	case allowed.unfiltered(sel.t.kind.Resource):
	case sel.t.kind.Resource == api.Pods:
		sel.fields = append(sel.fields, requirement{value: sel.t.kind.Fields["spec.nodeName"], want: allowed.node, equal: true})
	default:
		f.refs = &watchReferences{node: allowed.node, references: references{}, shown: map[api.Key]uint64{}}
	}
	return f
}

// store is the part of the filter that the store can apply. What refers to what
// changes with every pod, so that is decided later, in order of revision.
func (f *watchFilter) store() raftstore.Filter {
	if f.refs == nil {
		return raftstore.Filter{Resource: f.sel.t.kind.Resource, Namespace: f.sel.t.namespace, Name: f.sel.exact, Match: f.sel.matches}
	}
	resource := f.sel.t.kind.Resource
	return raftstore.Filter{Match: func(o api.Object) bool {
		r := api.KindOf(o).Resource
		return r == resource || refers(r)
	}}
}

// refers reports whether objects of a resource say what nodes may see.
func refers(r api.Resource) bool { return r == api.Pods || r == api.Ingresses }

// begin learns what the objects in view refer to.
func (f *watchFilter) begin(view api.Reader) {
	if f.refs == nil {
		return
	}
	f.refs.references = referencesIn(view, f.refs.node)
}

func (f *watchFilter) matches(o api.Object) bool {
	return f.sel.matches(o) && (f.refs == nil || f.refs.show(o))
}

// apply turns a change into what the client must be told.
func (f *watchFilter) apply(store Store, e *raftstore.Event, out *eventWriter) {
	switch {
	case f.peers:
		f.applyPeer(e, out.add)
	case f.refs == nil:
		out.addShared(e)
	case refers(e.Key.Resource):
		f.applyReferences(store, e, out.add)
	case !f.refs.any(e.Key) || e.Revision <= f.refs.shown[e.Key]:
		// Not referred to, or older than what was shown when the reference came.
	default:
		f.applySelected(e, out.add)
	}
}

// applySelected makes up for the selector, which the store was not given.
func (f *watchFilter) applySelected(e *raftstore.Event, send func(watch.EventType, api.Object)) {
	after := e.Type != raftstore.Deleted && f.matches(e.Object)
	before := e.Previous != nil && f.matches(e.Previous)
	switch {
	case before && after:
		send(watch.Modified, e.Object)
	case after:
		send(watch.Added, e.Object)
	case before:
		gone := api.Clone(e.Previous)
		gone.SetResourceVersion(strconv.FormatUint(e.Revision, 10))
		send(watch.Deleted, gone)
	}
}

// applyReferences shows objects that are referred to from now on, and withdraws those that
// are not any more.
func (f *watchFilter) applyReferences(store Store, e *raftstore.Event, send func(watch.EventType, api.Object)) {
	after := e.Object
	if e.Type == raftstore.Deleted {
		after = nil
	}
	for ref, now := range f.refs.change(f.refs.node, e.Previous, after) {
		if ref.Resource != f.sel.t.kind.Resource {
			continue
		}
		view := store.View()
		o, ok := view.Get(ref.Key)
		other := f.refs.references[reference{ref.Key, !ref.certificate}] > 0
		switch {
		case now && ok && f.matches(o): // again, if there was another reference
			f.refs.shown[ref.Key] = view.Revision()
			send(watch.Added, o)
		case !now && !(other && (!ok || f.matches(o))):
			gone := f.sel.t.kind.New()
			gone.SetNamespace(ref.Namespace)
			gone.SetName(ref.Name)
			gone.SetResourceVersion(strconv.FormatUint(e.Revision, 10))
			delete(f.refs.shown, ref.Key)
			send(watch.Deleted, gone)
		}
	}
}

// watchReferences are those that let one node see what it watches.
type watchReferences struct {
	references
	node  string
	shown map[api.Key]uint64 // the revision at which an object was shown out of turn
}
