package apiserver

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"decree.dev/decree/schemas/api"
)

// readView returns the state that a query asks for: everything acknowledged by
// default, the local copy with resourceVersion=0, and anything at least as new as
// another resourceVersion.
func (s *Server) readView(ctx context.Context, q url.Values) (api.Reader, error) {
	at, err := parseRevision(q.Get("resourceVersion"))
	if err != nil {
		return nil, err
	}
	var view api.Reader = s.cfg.Store.View()
	switch rv := q.Get("resourceVersion"); {
	case rv == "0", rv != "" && view.Revision() >= at:
		return view, nil
	}
	newest, err := s.cfg.Store.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if view = newest; at > view.Revision() {
		return nil, tooLargeRevision(at, view.Revision())
	}
	return view, nil
}

func parseRevision(rv string) (uint64, error) {
	if rv == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(rv, 10, 64)
	if err != nil {
		return 0, apierrors.NewBadRequest(fmt.Sprintf("resourceVersion %q is not a number", clip(rv, 32)))
	}
	return n, nil
}

func tooLargeRevision(at, current uint64) error {
	err := apierrors.NewTimeoutError(fmt.Sprintf("Too large resource version: %d, current: %d", at, current), 1)
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge, Message: "Too large resource version"}}
	return err
}

func expired(what string) error { return apierrors.NewResourceExpired(what) }

// serveGet answers with one object.
func (s *Server) serveGet(w http.ResponseWriter, r *http.Request, t target) error {
	f, err := negotiate(r)
	if err != nil {
		return err
	}
	view, err := s.readView(r.Context(), r.URL.Query())
	if err != nil {
		return err
	}
	o, ok := view.Get(t.key())
	if !ok {
		return apierrors.NewNotFound(groupResource(t.kind.Resource), t.name)
	}
	if f.table {
		rev, _ := strconv.ParseUint(o.GetResourceVersion(), 10, 64)
		return s.writeTable(w, t, f, rev, []api.Object{o}, metav1.ListMeta{})
	}
	return writeObject(w, http.StatusOK, f, withType(t.kind, o))
}

// list is a Kubernetes list whose items were encoded one by one.
type list struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []api.Object `json:"items"`
}

// serveList answers with the selected objects of a collection.
func (s *Server) serveList(w http.ResponseWriter, r *http.Request, t target, who Identity) error {
	f, err := negotiate(r)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	sel, err := newSelector(t, q)
	if err != nil {
		return err
	}
	limit, err := strconv.ParseInt(orZero(q.Get("limit")), 10, 64)
	if err != nil || limit < 0 {
		return apierrors.NewBadRequest("limit must be a number that is not negative")
	}
	view, from, err := s.pageView(r.Context(), q)
	if err != nil {
		return err
	}
	objects, more := collect(view, sel, newScope(who, view), from, limit)
	meta := metav1.ListMeta{ResourceVersion: strconv.FormatUint(view.Revision(), 10)}
	if more {
		last := objects[len(objects)-1]
		meta.Continue = position{view.Revision(), last.GetNamespace(), last.GetName()}.encode()
		s.pages.keep(view, time.Now())
	}
	if f.table {
		return s.writeTable(w, t, f, view.Revision(), objects, meta)
	}
	for i, o := range objects {
		objects[i] = withType(t.kind, o)
	}
	return writeObject(w, http.StatusOK, f, list{
		TypeMeta: metav1.TypeMeta{APIVersion: t.kind.GroupVersion().String(), Kind: t.kind.Kind + "List"},
		ListMeta: meta,
		Items:    objects,
	})
}

func orZero(s string) string {
	if s == "" {
		return "0"
	}
	return s
}

// collect returns up to limit (zero: all) selected objects behind a position.
func collect(view api.Reader, sel *selector, allowed *scope, from position, limit int64) (objects []api.Object, more bool) {
	objects = []api.Object{}
	all := allowed.unfiltered(sel.t.kind.Resource)
	sel.each(view, func(o api.Object) bool {
		if !from.before(o) || !all && !allowed.sees(api.KeyOf(o)) {
			return true
		}
		if limit > 0 && int64(len(objects)) == limit {
			more = true
			return false
		}
		objects = append(objects, o)
		return true
	})
	return objects, more
}

// pageView returns the view a list must use and where it goes on.
func (s *Server) pageView(ctx context.Context, q url.Values) (api.Reader, position, error) {
	if token := q.Get("continue"); token != "" {
		from, err := decodePosition(token)
		if err != nil {
			return nil, from, err
		}
		view, ok := s.pages.find(from.Revision, time.Now())
		if !ok {
			return nil, from, expired("the continue token is too old: list again from the start")
		}
		return view, from, nil
	}
	if q.Get("resourceVersionMatch") == string(metav1.ResourceVersionMatchExact) {
		at, err := parseRevision(q.Get("resourceVersion"))
		if err != nil {
			return nil, position{}, err
		}
		if view := s.cfg.Store.View(); view.Revision() == at {
			return view, position{}, nil
		}
		if view, ok := s.pages.find(at, time.Now()); ok {
			return view, position{}, nil
		}
		return nil, position{}, expired(fmt.Sprintf("revision %d is not kept any more", at))
	}
	view, err := s.readView(ctx, q)
	return view, position{}, err
}

func (s *Server) writeTable(w http.ResponseWriter, t target, f format, revision uint64, objects []api.Object, meta metav1.ListMeta) error {
	table, err := newTable(t.kind, f, revision, objects, time.Now())
	if err != nil {
		return err
	}
	table.Continue = meta.Continue
	return writeObject(w, http.StatusOK, f, table)
}

// writeObject encodes v before anything is sent, so that an error is an answer too.
func writeObject(w http.ResponseWriter, code int, f format, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	media := "application/json"
	if f.yaml {
		media = "application/yaml"
		if data, err = yaml.JSONToYAML(data); err != nil {
			return fmt.Errorf("encode answer: %w", err)
		}
	}
	w.Header().Set("Content-Type", media)
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(code)
	_, _ = w.Write(data) // the client went away: nobody to tell
	return nil
}

// position is where the next page of a list begins: behind an object, at a revision.
type position struct {
	Revision  uint64 `json:"rv"`
	Namespace string `json:"ns,omitempty"`
	Name      string `json:"name"`
}

func (p position) before(o api.Object) bool {
	if p.Name == "" {
		return true
	}
	if ns := o.GetNamespace(); ns != p.Namespace {
		return ns > p.Namespace
	}
	return o.GetName() > p.Name
}

func (p position) encode() string {
	data, _ := json.Marshal(p) // numbers and strings always encode
	return base64.RawURLEncoding.EncodeToString(data)
}

func decodePosition(token string) (position, error) {
	var p position
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		err = json.Unmarshal(data, &p)
	}
	if err != nil || p.Name == "" {
		return p, apierrors.NewBadRequest("the continue token is not one of this server")
	}
	return p, nil
}

// pageCache keeps the few views that unfinished lists are reading, so that all pages
// of a list show one revision.
type pageCache struct {
	mu    sync.Mutex
	views []keptView // oldest first
}

type keptView struct {
	view  api.Reader
	until time.Time
}

const (
	keptViews   = 16
	keptViewFor = 2 * time.Minute
)

func (c *pageCache) keep(v api.Reader, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(now)
	for i := range c.views {
		if c.views[i].view.Revision() == v.Revision() {
			c.views[i].until = now.Add(keptViewFor)
			return
		}
	}
	if len(c.views) == keptViews {
		c.views = c.views[1:]
	}
	c.views = append(c.views, keptView{v, now.Add(keptViewFor)})
}

func (c *pageCache) find(revision uint64, now time.Time) (api.Reader, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(now)
	for _, k := range c.views {
		if k.view.Revision() == revision {
			return k.view, true
		}
	}
	return nil, false
}

func (c *pageCache) drop(now time.Time) {
	kept := c.views[:0]
	for _, k := range c.views {
		if now.Before(k.until) {
			kept = append(kept, k)
		}
	}
	clear(c.views[len(kept):])
	c.views = kept
}
