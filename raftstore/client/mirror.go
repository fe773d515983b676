package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/schemas/api"
)

// Selection is one resource that a Mirror copies.
type Selection struct {
	Resource      api.Resource
	FieldSelector string // "spec.nodeName=n1"
	// Peers is for pods: all of them, as others see them. See [WatchOptions].
	Peers bool
}

// PeerSelections is what the network policies of a node need besides [NodeSelections].
func PeerSelections() []Selection { return []Selection{{Resource: api.Pods, Peers: true}} }

// NodeSelections is what the agent and the network plane of a node need.
func NodeSelections(node string) []Selection {
	return []Selection{
		{Resource: api.Pods, FieldSelector: "spec.nodeName=" + node},
		{Resource: api.ConfigMaps}, // the server shows those that the node's pods, and Ingresses, refer to
		{Resource: api.Secrets},
		{Resource: api.Namespaces},
		{Resource: api.Nodes},
		{Resource: api.Services},
		{Resource: api.EndpointSlices},
		{Resource: api.NetworkPolicies},
		{Resource: api.Ingresses},
		{Resource: api.IngressClasses},
	}
}

// MirrorConfig says what to copy. Client, Node and Select are required.
type MirrorConfig struct {
	Client *Client
	Node   string // on whose behalf Report speaks
	Select []Selection
	// Cache is a folder that keeps the copy, for a start without a server; empty:
	// none. It holds secrets: the folder is 0700, its files 0600.
	Cache string
	Log   *slog.Logger // nil: slog.Default()
}

// Mirror is a local copy of a part of the state, kept up to date by watches. It
// outlives the loss of every server, and of this process if it has a cache. All
// methods are safe for concurrent use.
//
// Every resource is followed by its own watch, so objects of different resources
// may be of different revisions; each resource alone is always consistent.
type Mirror struct {
	cfg     MirrorConfig
	log     *slog.Logger
	changed chan struct{}
	synced  chan struct{}
	current chan struct{}
	view    atomic.Pointer[mirrorView]

	mu        sync.Mutex // orders the writers of view, and guards what follows
	loaded    map[api.Resource]bool
	confirmed map[api.Resource]bool // loaded from a server, by this process
	revisions map[api.Resource]uint64
	dirty     map[api.Resource]bool // not in the cache yet
	save      chan struct{}         // holds one signal: dirty is not empty
}

// NewMirror returns a Mirror that holds what its cache does; [Mirror.Run] keeps it
// up to date. A cache that cannot be used is reported in the log and left out.
func NewMirror(cfg MirrorConfig) (*Mirror, error) {
	if cfg.Client == nil || cfg.Node == "" || len(cfg.Select) == 0 {
		return nil, errors.New("new mirror: Client, Node and Select are required")
	}
	m := &Mirror{
		cfg: cfg, log: cfg.Log,
		changed: make(chan struct{}, 1), synced: make(chan struct{}), current: make(chan struct{}), save: make(chan struct{}, 1),
		loaded: map[api.Resource]bool{}, confirmed: map[api.Resource]bool{}, revisions: map[api.Resource]uint64{}, dirty: map[api.Resource]bool{},
	}
	if m.log == nil {
		m.log = slog.Default()
	}
	m.view.Store(&mirrorView{objects: iradix.New[api.Object](), owned: iradix.New[api.Object]()})
	for _, s := range cfg.Select {
		if _, ok := api.KindFor(s.Resource); !ok {
			return nil, fmt.Errorf("new mirror: resource %q is not registered", s.Resource)
		}
		if cfg.Cache == "" {
			continue
		}
		revision, objects, err := readCache(cfg.Cache, s)
		if err != nil {
			level := slog.LevelInfo
			if errors.Is(err, fs.ErrNotExist) { // the first start
				level = slog.LevelDebug
			}
			m.log.Log(context.Background(), level, "the copy starts empty", "resource", s.Resource, "reason", err)
			continue
		}
		m.replace(s.Resource, objects, revision)
	}
	clear(m.dirty)
	return m, nil
}

// View returns the copy as of now. It costs nothing: the copy is a persistent tree,
// changed in place of one path per object.
func (m *Mirror) View() api.Reader { return m.view.Load() }

// Changed receives after the view has changed; it holds at most one signal.
func (m *Mirror) Changed() <-chan struct{} { return m.changed }

// Synced is closed once every resource was loaded, from a server or the cache. What
// the cache holds may be long out of date: it is enough to go on with what is
// running, and no reason to remove anything. See [Mirror.Current].
func (m *Mirror) Synced() <-chan struct{} { return m.synced }

// Current is closed once every resource was loaded from a server: what is not in the
// view does not exist, or did not a moment ago.
func (m *Mirror) Current() <-chan struct{} { return m.current }

// Report sends what the node has to say; see [Client.Report].
func (m *Mirror) Report(ctx context.Context, ms []api.Mutation) ([]error, error) {
	return m.cfg.Client.Report(ctx, m.cfg.Node, ms)
}

// Run follows the server until ctx is done, and then returns its cause. Lost
// connections are met with patience: the copy stays as it is.
func (m *Mirror) Run(ctx context.Context) error {
	var followers sync.WaitGroup
	for _, s := range m.cfg.Select {
		followers.Go(func() { m.follow(ctx, s) })
	}
	saved := make(chan struct{})
	go func() {
		defer close(saved)
		m.keepCache(ctx)
	}()
	followers.Wait()
	<-saved
	m.saveDirty() // what came since the last time
	return context.Cause(ctx)
}

const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// follow keeps one resource up to date. The first watch of a process always begins
// with everything: a cached revision may be of another history.
func (m *Mirror) follow(ctx context.Context, s Selection) {
	var after uint64
	wait := firstRetry
	for ctx.Err() == nil {
		begun := time.Now()
		revision, err := m.watchOnce(ctx, s, after)
		switch {
		case errors.Is(err, ErrExpired):
			revision = 0
			m.log.Debug("load again", "resource", s.Resource, "reason", err)
		case err != nil && ctx.Err() == nil:
			m.log.Warn("watch", "resource", s.Resource, "error", redactURL(err), "retry", wait)
		}
		if revision > after || err == nil {
			wait = firstRetry // it worked for a while
		}
		if after = revision; err == nil && time.Since(begun) > time.Second {
			continue // the server's time was up
		}
		if !sleep(ctx, wait/2+rand.N(wait/2)) {
			return
		}
		wait = min(2*wait, lastRetry)
	}
}

// redactURL drops the query of a failed request's URL, which says nothing new.
func redactURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// watchOnce follows one connection to its end, and returns the revision where the
// next one can go on.
func (m *Mirror) watchOnce(ctx context.Context, s Selection, after uint64) (uint64, error) {
	k, _ := api.KindFor(s.Resource)
	// Filtered by references: the server cannot go on, it begins again.
	if s.Resource == api.ConfigMaps || s.Resource == api.Secrets {
		after = 0
	}
	var staged []api.Object
	initial := after == 0
	opts := WatchOptions{After: after, Peers: s.Peers, ListOptions: ListOptions{FieldSelector: s.FieldSelector}}
	for e, err := range m.cfg.Client.WatchObjects(ctx, k, opts) {
		switch {
		case err != nil:
			return after, err
		case initial && e.Type == watch.Bookmark && e.Initial:
			m.replace(s.Resource, staged, e.Revision)
			m.confirm(s.Resource)
			initial, staged = false, nil
		case initial:
			staged = append(staged, e.Object)
			continue // not complete: there is no revision to go on from
		default:
			m.apply(s.Resource, e)
		}
		after = e.Revision
	}
	if initial {
		return 0, fmt.Errorf("watch %s: the connection ended before everything was there", s.Resource)
	}
	return after, ctx.Err()
}

// apply changes the view by one event.
func (m *Mirror) apply(r api.Resource, e Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.revisions[r] = e.Revision
	if e.Type == watch.Bookmark {
		return
	}
	edit := m.view.Load().edit()
	key := api.KeyOf(e.Object)
	if e.Type == watch.Deleted {
		edit.remove(key)
	} else {
		edit.put(key, e.Object)
	}
	m.publish(r, edit.done(max(m.view.Load().revision, e.Revision)))
}

// replace makes objects all that there is of a resource. If that is what the view
// has already, nothing has changed.
func (m *Mirror) replace(r api.Resource, objects []api.Object, revision uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.view.Load()
	edit := old.edit()
	differs := false
	present := make(map[api.Key]bool, len(objects))
	for _, o := range objects {
		key := api.KeyOf(o)
		present[key] = true
		if had, ok := old.Get(key); !ok || had.GetResourceVersion() != o.GetResourceVersion() || had.GetUID() != o.GetUID() {
			edit.put(key, o)
			differs = true
		}
	}
	for o := range old.List(r, "") {
		if key := api.KeyOf(o); !present[key] {
			edit.remove(key)
			differs = true
		}
	}
	m.revisions[r] = revision
	first := !m.loaded[r]
	m.loaded[r] = true
	if differs || first {
		m.publish(r, edit.done(max(old.revision, revision)))
	}
	if first && len(m.loaded) == len(m.cfg.Select) {
		close(m.synced)
	}
}

// confirm notes that a server has told all there is of a resource.
func (m *Mirror) confirm(r api.Resource) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.confirmed[r] {
		return
	}
	m.confirmed[r] = true
	if len(m.confirmed) == len(m.cfg.Select) {
		close(m.current)
		signal(m.changed) // who waited for it looks at the view again
	}
}

// publish must be called with mu held.
func (m *Mirror) publish(r api.Resource, v *mirrorView) {
	m.view.Store(v)
	m.dirty[r] = true
	signal(m.changed)
	signal(m.save)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// mirrorView is an immutable view: two persistent trees.
type mirrorView struct {
	revision uint64
	objects  *iradix.Tree[api.Object] // resource, namespace, name
	owned    *iradix.Tree[api.Object] // uid of the controller, resource, namespace, name
}

func treeKey(parts ...string) []byte {
	n := len(parts)
	for _, p := range parts {
		n += len(p)
	}
	b := make([]byte, 0, n)
	for _, p := range parts {
		b = append(append(b, p...), 0)
	}
	return b
}

func objectKey(k api.Key) []byte { return treeKey(string(k.Resource), k.Namespace, k.Name) }

// Revision implements [api.Reader]: the newest of all resources.
func (v *mirrorView) Revision() uint64 { return v.revision }

// Get implements [api.Reader].
func (v *mirrorView) Get(k api.Key) (api.Object, bool) { return v.objects.Get(objectKey(k)) }

// List implements [api.Reader].
func (v *mirrorView) List(r api.Resource, namespace string) iter.Seq[api.Object] {
	if namespace == "" {
		return scan(v.objects, treeKey(string(r)))
	}
	return scan(v.objects, treeKey(string(r), namespace))
}

// Owned implements [api.Reader].
func (v *mirrorView) Owned(uid types.UID) iter.Seq[api.Object] {
	return scan(v.owned, treeKey(string(uid)))
}

func scan(t *iradix.Tree[api.Object], prefix []byte) iter.Seq[api.Object] {
	return func(yield func(api.Object) bool) {
		it := t.Root().Iterator()
		it.SeekPrefix(prefix)
		for _, o, ok := it.Next(); ok; _, o, ok = it.Next() {
			if !yield(o) {
				return
			}
		}
	}
}

// viewEdit collects changes of a view.
type viewEdit struct{ objects, owned *iradix.Txn[api.Object] }

func (v *mirrorView) edit() *viewEdit { return &viewEdit{v.objects.Txn(), v.owned.Txn()} }

func (e *viewEdit) put(k api.Key, o api.Object) {
	old, had := e.objects.Insert(objectKey(k), o)
	if had {
		e.disown(k, old)
	}
	if ref := metav1.GetControllerOf(o); ref != nil {
		e.owned.Insert(treeKey(string(ref.UID), string(k.Resource), k.Namespace, k.Name), o)
	}
}

func (e *viewEdit) remove(k api.Key) {
	if old, had := e.objects.Delete(objectKey(k)); had {
		e.disown(k, old)
	}
}

func (e *viewEdit) disown(k api.Key, o api.Object) {
	if ref := metav1.GetControllerOf(o); ref != nil {
		e.owned.Delete(treeKey(string(ref.UID), string(k.Resource), k.Namespace, k.Name))
	}
}

func (e *viewEdit) done(revision uint64) *mirrorView {
	return &mirrorView{revision: revision, objects: e.objects.Commit(), owned: e.owned.Commit()}
}
