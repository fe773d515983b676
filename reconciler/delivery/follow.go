package delivery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/gitsource"
	"decree.dev/decree/schemas/api"
)

// Fetcher fetches external repositories: *gitsource.Mirror.
type Fetcher interface {
	Fetch(ctx context.Context, r gitsource.Remote) (*gitsource.Fetched, error)
}

// SystemNamespace is where the credentials of sources live.
const SystemNamespace = api.SystemNamespace

// minInterval is the shortest time between polls that nobody asked for.
const minInterval = time.Second

// fetchTimeout bounds one fetch of an external repository.
const fetchTimeout = 5 * time.Minute

// Follower polls external sources and delivers what is new. One goroutine follows
// one source, so that one repository that hangs holds up no other; Run starts and
// stops them as sources come, change and go. All methods are safe for concurrent
// use; Run must be called once at a time.
type Follower struct {
	Pipeline *Pipeline
	Fetcher  Fetcher
	Log      *slog.Logger

	mu        sync.Mutex
	following map[string]*following // by source
}

// Run follows all external sources until ctx ends, and waits for what it started.
func (f *Follower) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		wg.Wait()
		f.mu.Lock()
		f.following = nil
		f.mu.Unlock()
	}()
	for {
		view := f.Pipeline.Store.View()
		f.adopt(ctx, &wg, view)
		if err := f.Pipeline.Store.Await(ctx, view.Revision(), api.Sources); err != nil {
			return err
		}
	}
}

// adopt starts to follow new sources, stops to follow those that are gone, and
// wakes those whose spec or suspension has changed.
func (f *Follower) adopt(ctx context.Context, wg *sync.WaitGroup, view api.Reader) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.following == nil {
		f.following = map[string]*following{}
	}
	for name, fl := range f.following {
		src, ok := api.Get[*api.Source](view, "", name)
		switch {
		case ok && src.Spec.URL != "" && fl.follows(src):
			if now := termsOf(src); now != fl.terms {
				fl.terms = now
				fl.wakeUp()
			}
		case fl.ended():
			delete(f.following, name)
		default:
			fl.stop()
		}
	}
	for src := range api.List[*api.Source](view, "") {
		before := f.following[src.Name]
		if src.Spec.URL == "" || (before != nil && before.follows(src)) {
			continue
		}
		sub, cancel := context.WithCancel(ctx)
		fl := &following{
			Follower: f, name: src.Name, uid: src.UID, terms: termsOf(src),
			wake: make(chan struct{}, 1), done: make(chan struct{}), cancel: cancel,
		}
		f.following[src.Name] = fl
		wg.Go(func() {
			defer close(fl.done)
			defer cancel()
			if before != nil { // a source of this name was removed just now
				<-before.done
			}
			fl.run(sub)
		})
	}
}

// Sync asks for a poll of a source now, ahead of its interval; also a commit that
// was refused is tried again.
func (f *Follower) Sync(source string) error {
	src, err := sourceOf(f.Pipeline.Store.View(), source)
	if err != nil {
		return err
	}
	if src.Spec.URL == "" {
		return fmt.Errorf("source %q: its repository is built in and needs no sync: git push brings commits into force", source)
	}
	if err := suspended(src); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	fl := f.following[source]
	if fl == nil {
		return fmt.Errorf("source %q is not followed by this server yet: try again", source)
	}
	fl.wakeUp()
	return nil
}

// terms are what, when it changes, asks for a poll at once.
type terms struct {
	generation int64
	suspended  bool
}

func termsOf(src *api.Source) terms { return terms{src.Generation, src.Status.Suspended != nil} }

// following is one source that is being followed.
type following struct {
	*Follower
	name   string
	uid    types.UID
	wake   chan struct{}
	cancel context.CancelFunc
	done   chan struct{}

	// These two belong to adopt.

	terms   terms // as last seen
	stopped bool  // cancel was called

	// What follows belongs to the source's own goroutine.

	failures int       // of delivery in a row
	refused  refused   // the commit that was refused last
	told     time.Time // when the status was last written
}

// follows is false for another source that has the name now.
func (fl *following) follows(src *api.Source) bool { return !fl.stopped && src.UID == fl.uid }

func (fl *following) stop() {
	fl.stopped = true
	fl.cancel()
}

func (fl *following) wakeUp() {
	select {
	case fl.wake <- struct{}{}:
	default:
	}
}

func (fl *following) ended() bool {
	select {
	case <-fl.done:
		return true
	default:
		return false
	}
}

// run polls the source at its interval and when it is woken.
func (fl *following) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		asked := false
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-fl.wake:
			asked = true
		}
		// Linearizable, because what comes is judged by the commit in force: a server that
		// has just begun to lead, or that leads no more without knowing, could take an
		// ordinary commit for a rewind.
		_, src, err := fl.Pipeline.read(ctx, fl.name)
		if errors.Is(err, ErrNoSource) || (err == nil && src.UID != fl.uid) {
			continue // adopt is about to end this
		}
		if err == nil {
			err = fl.poll(ctx, src, asked)
		} else {
			src = &api.Source{}
		}
		if ctx.Err() != nil {
			return
		}
		timer.Reset(fl.next(src, err))
	}
}

// next is the time until the next poll that nobody asks for. What failed in the
// cluster itself is tried again soon; a repository that fails is left alone for its
// interval.
func (fl *following) next(src *api.Source, err error) time.Duration {
	interval := src.Spec.Interval.Duration
	if interval <= 0 {
		interval = gitsource.DefaultInterval
	}
	interval = max(interval, minInterval)
	if err == nil {
		fl.failures = 0
		return gitsource.Jitter(interval)
	}
	fl.failures++
	if fl.failures&(fl.failures-1) == 0 {
		fl.Log.Warn("source not followed", "source", fl.name, "failures", fl.failures, "err", err)
	}
	return min(retry.Wait(fl.failures), gitsource.Jitter(interval))
}

// poll fetches once and delivers the commit if it is not in force. What is wrong
// with the repository or the commit is written into the source's Ready condition,
// and nothing else changes. The error is about the cluster.
func (fl *following) poll(ctx context.Context, src *api.Source, asked bool) error {
	if err := suspended(src); err != nil {
		return fl.report(ctx, src.Generation, "", notReady(ReasonSuspended, err.Error()))
	}
	fetched, err := fl.fetch(ctx, src)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fl.report(ctx, src.Generation, "", notReady(ReasonFetchError, err.Error()))
	}
	hash := fetched.Hash
	switch {
	case inForce(src, hash):
		return nil
	case fetched.Rewound && src.Spec.Commit == "":
		return fl.report(ctx, src.Generation, hash, notReady(ReasonRewound, fmt.Sprintf(
			"the repository does not contain the commit in force any more: %.7s does not descend from %.7s; if the rewrite is meant, set spec.commit to %s until that is in force", hash, src.Status.Applied, hash)))
	case !asked && fl.refused.still(src, hash, time.Now()):
		return fl.report(ctx, src.Generation, hash, fl.refused.condition)
	}
	return fl.deliver(ctx, src, fetched)
}

func (fl *following) deliver(ctx context.Context, src *api.Source, fetched *gitsource.Fetched) error {
	out, err := fl.Pipeline.Deliver(ctx, Request{Source: fl.name, Commit: fetched.Commit, Parent: src.Status.Applied})
	switch {
	case out != nil && !out.Applied:
		c := notReady(out.Reason, summary(out.Diagnostics))
		fl.refused.again(out, fetched.Hash, c, time.Now())
		return errors.Join(err, fl.report(ctx, out.Generation, fetched.Hash, c))
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, ErrSuspended), errors.Is(err, ErrNoSource), errors.Is(err, ErrSuperseded):
		return nil // it has just changed, and the next poll says so
	case err != nil:
		return errors.Join(err, fl.report(ctx, src.Generation, fetched.Hash, notReady(ReasonDeliveryError, err.Error())))
	}
	fl.refused = refused{}
	return fl.report(ctx, out.Generation, fetched.Hash, ready("at "+fetched.Hash))
}

// fetch asks the repository, with the credentials of the source.
func (fl *following) fetch(ctx context.Context, src *api.Source) (*gitsource.Fetched, error) {
	remote, err := fl.remote(src)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	return fl.Fetcher.Fetch(ctx, remote)
}

// remote assembles what a fetch needs, credentials included.
func (fl *following) remote(src *api.Source) (gitsource.Remote, error) {
	r := gitsource.Remote{URL: src.Spec.URL, Branch: src.Spec.Branch, Tag: src.Spec.Tag, Commit: src.Spec.Commit, Last: src.Status.Applied}
	if r.Branch == "" && r.Tag == "" && r.Commit == "" {
		r.Branch = "main"
	}
	if src.Spec.SecretRef == nil {
		return r, nil
	}
	name := src.Spec.SecretRef.Name
	secret, ok := api.Get[*corev1.Secret](fl.Pipeline.Store.View(), SystemNamespace, name)
	if !ok {
		return r, fmt.Errorf("secret %q is not in namespace %q: spec.secretRef of source %q names it", name, SystemNamespace, src.Name)
	}
	r.Auth = gitsource.Auth{
		Username: string(secret.Data["username"]), Password: string(secret.Data["password"]),
		Token: string(secret.Data["token"]), CA: secret.Data["ca.crt"],
		SSHKey: secret.Data["identity"], KnownHosts: secret.Data["known_hosts"],
	}
	return r, nil
}
