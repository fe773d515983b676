package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/schemas/api"
)

// ListOptions choose objects of a collection.
type ListOptions struct {
	Namespace     string // empty: all
	LabelSelector string
	FieldSelector string
	// Stale reads what the server has at hand, without asking its peers.
	Stale bool
}

func (o ListOptions) query() url.Values {
	q := url.Values{}
	set := func(name, v string) {
		if v != "" {
			q.Set(name, v)
		}
	}
	set("labelSelector", o.LabelSelector)
	set("fieldSelector", o.FieldSelector)
	if o.Stale {
		q.Set("resourceVersion", "0")
	}
	return q
}

// Path returns the REST path of a key's object, or of its collection when the name
// is empty.
func Path(k *api.Kind, namespace, name string) string {
	p := "/api/" + k.Version
	if k.Group != "" {
		p = "/apis/" + k.Group + "/" + k.Version
	}
	if k.Namespaced && namespace != "" {
		p += "/namespaces/" + url.PathEscape(namespace)
	}
	p += "/" + k.Plural
	if name != "" {
		p += "/" + url.PathEscape(name)
	}
	return p
}

// GetObject reads one object.
func (c *Client) GetObject(ctx context.Context, k *api.Kind, namespace, name string) (api.Object, error) {
	data, err := c.read(ctx, request{method: http.MethodGet, path: Path(k, namespace, name)})
	if err != nil {
		return nil, err
	}
	return k.DecodeJSON(data)
}

// ListObjects reads a collection and the revision it was read at.
func (c *Client) ListObjects(ctx context.Context, k *api.Kind, o ListOptions) ([]api.Object, uint64, error) {
	data, err := c.read(ctx, request{method: http.MethodGet, path: Path(k, o.Namespace, ""), query: o.query()})
	if err != nil {
		return nil, 0, err
	}
	var list struct {
		Metadata metav1.ListMeta   `json:"metadata"`
		Items    []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, 0, fmt.Errorf("list %s: %w", k.Resource, err)
	}
	objects := make([]api.Object, len(list.Items))
	for i, item := range list.Items {
		if objects[i], err = k.DecodeJSON(item); err != nil {
			return nil, 0, fmt.Errorf("list %s: %w", k.Resource, err)
		}
	}
	revision, err := strconv.ParseUint(list.Metadata.ResourceVersion, 10, 64)
	if err != nil {
		return nil, 0, fmt.Errorf("list %s: revision: %w", k.Resource, err)
	}
	return objects, revision, nil
}

// Get reads one object of type T.
func Get[T api.Object](ctx context.Context, c *Client, namespace, name string) (T, error) {
	var zero T
	o, err := c.GetObject(ctx, api.KindOf(zero), namespace, name)
	if err != nil {
		return zero, err
	}
	return o.(T), nil
}

// List reads the objects of type T and the revision they were read at.
func List[T api.Object](ctx context.Context, c *Client, o ListOptions) ([]T, uint64, error) {
	var zero T
	objects, revision, err := c.ListObjects(ctx, api.KindOf(zero), o)
	if err != nil {
		return nil, 0, err
	}
	list := make([]T, len(objects))
	for i := range objects {
		list[i] = objects[i].(T)
	}
	return list, revision, nil
}

// Table reads a collection, or one object, as the rows to print. include is "None",
// "Metadata" or "Object"; empty means Metadata.
func (c *Client) Table(ctx context.Context, k *api.Kind, name string, o ListOptions, include metav1.IncludeObjectPolicy) (*metav1.Table, error) {
	q := o.query()
	if include != "" {
		q.Set("includeObject", string(include))
	}
	data, err := c.read(ctx, request{method: http.MethodGet, path: Path(k, o.Namespace, name), query: q, accept: tableMedia})
	if err != nil {
		return nil, err
	}
	t := &metav1.Table{}
	if err := json.Unmarshal(data, t); err != nil {
		return nil, fmt.Errorf("table of %s: %w", k.Resource, err)
	}
	return t, nil
}

const tableMedia = "application/json;as=Table;v=v1;g=meta.k8s.io"

// DeletePod ends a pod; its owner replaces it. A nil grace is the pod's own.
func (c *Client) DeletePod(ctx context.Context, namespace, name string, grace *int64) error {
	body, err := json.Marshal(metav1.DeleteOptions{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "DeleteOptions"}, GracePeriodSeconds: grace})
	if err != nil {
		return fmt.Errorf("delete pod %s/%s: %w", namespace, name, err)
	}
	k, _ := api.KindFor(api.Pods)
	_, err = c.read(ctx, request{method: http.MethodDelete, path: Path(k, namespace, name), body: body, contentType: "application/json"})
	return err
}

// WatchOptions say where a watch begins.
type WatchOptions struct {
	ListOptions
	// After is the revision behind which the watch begins; zero sends the objects
	// that exist first, and then an Event of type Bookmark with Initial set.
	After uint64
	// Peers shows all pods, as others see them: without what runs in them.
	Peers   bool
	Timeout time.Duration // the server ends the watch after this; zero: as it likes
}

// Event is one message of a watch.
type Event struct {
	Type watch.EventType // Added, Modified, Deleted or Bookmark
	// Object is the changed object; for a Bookmark it has a resourceVersion only.
	Object api.Object
	// Revision is Object's resourceVersion: where a watch can be resumed.
	Revision uint64
	// Initial marks the Bookmark after the objects that existed at the beginning.
	Initial bool
}

// ErrExpired is matched by errors of a watch whose revision is not kept any more:
// begin with After zero.
var ErrExpired = errors.New("the revision is not kept any more")

// WatchObjects yields changes until the server ends the watch (no error), the
// connection breaks or ctx is done. It does not reconnect: that is the caller's
// decision, with the last Revision it has seen.
func (c *Client) WatchObjects(ctx context.Context, k *api.Kind, o WatchOptions) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		q := o.query()
		q.Set("watch", "true")
		q.Set("allowWatchBookmarks", "true")
		if o.After > 0 {
			q.Set("resourceVersion", strconv.FormatUint(o.After, 10))
		} else {
			q.Set("sendInitialEvents", "true")
			q.Set("resourceVersionMatch", string(metav1.ResourceVersionMatchNotOlderThan))
		}
		if o.Peers {
			q.Set(apiserver.PeersParameter, "true")
		}
		if o.Timeout > 0 {
			q.Set("timeoutSeconds", strconv.FormatInt(int64((o.Timeout+time.Second-1)/time.Second), 10))
		}
		base := c.base.Load()
		resp, err := c.once(ctx, base, request{method: http.MethodGet, path: Path(k, o.Namespace, ""), query: q})
		if err != nil {
			if !isStatus(err) || apierrors.IsServiceUnavailable(err) {
				c.turn(base) // whoever comes back asks another server
			}
			yield(Event{}, expiredError(err))
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewReaderSize(resp.Body, 64<<10)
		for {
			line, err := lines.ReadBytes('\n')
			if errors.Is(err, io.EOF) && len(line) == 0 {
				return
			}
			if err != nil {
				yield(Event{}, fmt.Errorf("watch %s: %w", k.Resource, err))
				return
			}
			e, err := decodeEvent(k, line)
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

// WatchRaw begins a watch of a namespace after a revision and returns the stream as
// the server sends it, one JSON event a line, for who counts and does not read.
func (c *Client) WatchRaw(ctx context.Context, k *api.Kind, namespace string, after uint64) (io.ReadCloser, error) {
	q := url.Values{"watch": {"true"}, "resourceVersion": {strconv.FormatUint(after, 10)}}
	resp, err := c.once(ctx, c.base.Load(), request{method: http.MethodGet, path: Path(k, namespace, ""), query: q})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

func decodeEvent(k *api.Kind, line []byte) (Event, error) {
	var raw struct {
		Type   watch.EventType `json:"type"`
		Object json.RawMessage `json:"object"`
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return Event{}, fmt.Errorf("watch %s: %w", k.Resource, err)
	}
	if raw.Type == watch.Error {
		var status metav1.Status
		if err := json.Unmarshal(raw.Object, &status); err != nil {
			return Event{}, fmt.Errorf("watch %s: %w", k.Resource, err)
		}
		return Event{}, expiredError(&apierrors.StatusError{ErrStatus: status})
	}
	o, err := k.DecodeJSON(raw.Object)
	if err != nil {
		return Event{}, fmt.Errorf("watch: %w", err)
	}
	e := Event{Type: raw.Type, Object: o, Initial: o.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true"}
	if e.Revision, err = strconv.ParseUint(o.GetResourceVersion(), 10, 64); err != nil {
		return Event{}, fmt.Errorf("watch %s: revision: %w", k.Resource, err)
	}
	return e, nil
}

func expiredError(err error) error {
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return fmt.Errorf("%w: %w", ErrExpired, err)
	}
	return err
}

// Report sends what a node has to say about itself, in pieces that the server
// accepts. It returns one error per mutation, nil for the applied ones. An empty
// report says that the node lives. Items may be applied twice when a connection
// breaks: mutations of nodes say how things are, so that does no harm.
func (c *Client) Report(ctx context.Context, node string, ms []api.Mutation) ([]error, error) {
	results := make([]error, 0, len(ms))
	for first := true; first || len(ms) > 0; first = false {
		n := min(len(ms), apiserver.MaxReport)
		errs, err := c.reportPiece(ctx, node, ms[:n])
		if err != nil {
			return nil, fmt.Errorf("report for node %s: %w", node, err)
		}
		results, ms = append(results, errs...), ms[n:]
	}
	return results, nil
}

func (c *Client) reportPiece(ctx context.Context, node string, ms []api.Mutation) ([]error, error) {
	report, err := apiserver.NewReport(ms)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(report)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	data, err := c.read(ctx, request{
		method: http.MethodPost, path: "/apis/" + api.GroupVersion.String() + "/nodes/" + url.PathEscape(node) + "/report",
		body: body, contentType: "application/json", again: true,
	})
	if err != nil {
		return nil, err
	}
	var answer apiserver.ReportResult
	if err := json.Unmarshal(data, &answer); err != nil {
		return nil, fmt.Errorf("decode answer: %w", err)
	}
	if len(answer.Errors) != len(ms) {
		return nil, fmt.Errorf("the server answered %d of %d items", len(answer.Errors), len(ms))
	}
	errs := make([]error, len(ms))
	for i, status := range answer.Errors {
		if status != nil {
			errs[i] = &apierrors.StatusError{ErrStatus: *status}
		}
	}
	return errs, nil
}
